/**
 * Low-latency mode: dispatch into a masked expert-major layout and weighted combine, for decode. One call a phase,
 * nothing to await before a launch. In: bf16 rows (cast to FP8 inside unless told) and routing. Called by
 * `EpBuffer.lowLatencyDispatch` and `lowLatencyCombine`.
 */
import { constants } from "./ffi/abi.ts";
import { struct } from "./ffi/struct.ts";
import { isOutputRegion } from "./combine.ts";
import type { Core, Operation, OperationOptions } from "./core.ts";
import { itemSize } from "./dtype.ts";
import { EpError } from "./error.ts";
import { type HeldSlot, SlotResult } from "./handle.ts";
import {
  checkLive,
  describe,
  flat,
  parts,
  type Payload,
  payloadFields,
  routingFields,
  type ScaledRows,
} from "./payload.ts";
import type { EpEvent } from "./stream.ts";
import { type Hold, Tensor } from "./tensor.ts";

const FLAG = constants.FLAG;
const dispatchStruct = struct("deepep_low_latency_dispatch_args");
const combineStruct = struct("deepep_low_latency_combine_args");
const receiveStruct = struct("deepep_receive_args");

/** Options of `EpBuffer.lowLatencyDispatch`. */
export interface LowLatencyDispatchOptions extends OperationOptions {
  /** i32 or i64 `[numTokens, numTopk]`: expert of each entry, -1 = none. */
  topkIdx: Tensor;
  /** Cast bf16 rows to e4m3 with one scale per 128 channels; hidden must be a multiple of 16. Default true for bf16 rows without scales. */
  fp8?: boolean;
  /** FP8: round scales up to powers of two. Default false. */
  roundScale?: boolean;
  /** FP8 with `roundScale`: scales are 8-bit exponents, four to an i32. Default false. */
  useUe8m0?: boolean;
  /** Scales are column-major per expert, as TMA wants them. Default true, as in DeepEP. */
  scalesColumnMajor?: boolean;
  /** Only send; `received()` or `hook()` enqueues the receiving half. Default false. */
  recvHook?: boolean;
  /** i32 `[numLocalExperts]`: rows received are added to it. */
  expertStats?: Tensor;
  /** i64 `[numRanks]`: nanoseconds waited for each peer are added to it, by both halves of a call with `recvHook`. */
  waitStats?: Tensor;
}

/** Drives `lowLatencyCombine`: which slot a low-latency dispatch filled. Ends with its result. */
export class LowLatencyHandle {
  readonly #core: Core;
  readonly #slot: HeldSlot;
  /** @ignore */
  constructor(core: Core, slot: HeldSlot) {
    this.#core = core;
    this.#slot = slot;
  }
  /** @ignore The slot, checked to be held and to belong to `core`. */
  use(core: Core, op: string): HeldSlot {
    if (core !== this.#core) {
      throw new TypeError(`Cannot ${op}: the handle belongs to ${this.#core.label}, not to ${core.label}`);
    }
    if (!this.#slot.hold.alive) {
      throw new EpError(`Cannot ${op}: the dispatch's result was released`, { code: "closed", op });
    }
    return this.#slot;
  }
  /**
   * The slot's expert-output region, bf16 `[numLocalExperts, maxRows, hidden]`: write expert outputs here and pass the
   * tensor to `lowLatencyCombine`, which then copies nothing. Writes belong in `stream` order.
   */
  expertOutput(options: OperationOptions = {}): Tensor<"bf16"> {
    const { index: slot } = this.use(this.#core, "expertOutput");
    const address = this.#core.expertOutput(slot, options);
    return new Tensor(address, "bf16", outputShape(this.#core), { hold: this.#slot.hold });
  }
}

const maxRows = (core: Core): number => core.numRanks * core.options.maxLowLatencyTokensPerRank;
const outputShape = (core: Core): number[] => [core.numLocalExperts, maxRows(core), core.options.hidden];

/** The receiving half of a call: enqueued at once, or by `hook()`. */
class Receive {
  readonly #core: Core;
  readonly #name: "deepep_low_latency_dispatch_receive" | "deepep_low_latency_combine_receive";
  readonly #op: string;
  readonly #slot: HeldSlot;
  readonly #options: OperationOptions;
  readonly #uses: Readonly<Record<string, Tensor | undefined>>;
  event: EpEvent;
  #open: boolean;

  /** `uses`: the caller's tensors that this half reads and writes. */
  constructor(
    core: Core,
    { op, event }: Operation,
    slot: HeldSlot,
    options: OperationOptions & { recvHook?: boolean },
    uses: Readonly<Record<string, Tensor | undefined>>,
  ) {
    this.#core = core;
    this.#op = op;
    this.#uses = uses;
    this.#name = op === "lowLatencyDispatch"
      ? "deepep_low_latency_dispatch_receive"
      : "deepep_low_latency_combine_receive";
    this.#slot = slot;
    this.event = event;
    this.#options = options;
    this.#open = options.recvHook ?? false;
  }
  /** Enqueues the receiving half, once. */
  hook(): EpEvent {
    if (this.#open) {
      if (!this.#slot.hold.alive) {
        const what = this.#op === "lowLatencyDispatch" ? "it" : "the dispatch's result";
        throw new EpError(`Cannot receive: ${what} was released`, { code: "closed", op: this.#op });
      }
      for (const [name, tensor] of Object.entries(this.#uses)) {
        if (tensor) checkLive(this.#core, this.#op, name, tensor);
      }
      const { stream, asyncFinish, numSms, timeoutMs } = this.#options;
      const options = {
        ...(stream && { stream }),
        ...(asyncFinish && { asyncFinish }),
        ...(numSms && { numSms }),
        ...(timeoutMs && { timeoutMs }),
      };
      const operation = this.#core.operation(this.#op, options, 0);
      this.#core.launch(this.#name, receiveStruct, [{ slot: this.#slot.index }], operation);
      this.#open = false;
      this.event = operation.event;
    }
    return this.event;
  }
}

/** What a low-latency dispatch received: per local expert, rows packed from 0. Valid until `release()`. */
export class LowLatencyResult<X extends Payload = Payload> extends SlotResult {
  /**
   * Rows `[numLocalExperts, maxRows, hidden]` with `maxRows = numRanks * maxLowLatencyTokensPerRank`: with `fp8`
   * `{ data: f8e4m3, scales: f32 or i32 }`, else of the dtype that was sent. Only the first `count[e]` rows of an expert hold data.
   * Tokens that list an expert more than once can overfill it: the dispatch then fails on every rank, code `capacity`.
   */
  readonly x: X;
  /** i32 `[numLocalExperts]`: rows of each expert. */
  readonly count: Tensor<"i32">;
  /** i32 `[numLocalExperts, maxRows]`: token index at the source rank. */
  readonly srcInfo: Tensor<"i32">;
  /** i64 `[numLocalExperts, numRanks]`: `begin << 32 | count` of each source rank's rows. */
  readonly layoutRange: Tensor<"i64">;
  /** For `lowLatencyCombine`. */
  readonly handle: LowLatencyHandle;
  readonly #receive: Receive;

  /** @ignore */
  constructor(core: Core, slot: HeldSlot, receive: Receive, values: {
    x: X;
    count: Tensor<"i32">;
    srcInfo: Tensor<"i32">;
    layoutRange: Tensor<"i64">;
  }) {
    super(core, slot, receive.event);
    this.#receive = receive;
    this.x = values.x;
    this.count = values.count;
    this.srcInfo = values.srcInfo;
    this.layoutRange = values.layoutRange;
    this.handle = new LowLatencyHandle(core, slot);
  }
  /** With `recvHook`: enqueues the receiving half, once; else does nothing. Returns the event of the arrival. */
  hook(): EpEvent {
    const event = this.#receive.hook();
    this.arrives(event);
    return event;
  }
  /** Waits on the host until the rows are here, after {@linkcode hook}. @throws {EpError} when the operation failed */
  async received(): Promise<void> {
    await this.hook();
  }
}

function castFlags(x: Payload, o: LowLatencyDispatchOptions): number {
  const plain = !("data" in x) && x.dtype === "bf16";
  const fp8 = o.fp8 ?? plain;
  if (fp8 && !plain) {
    throw new TypeError(
      "Cannot lowLatencyDispatch: fp8 casts bf16 rows without scales; send other rows with fp8: false",
    );
  }
  if (o.roundScale && !fp8) throw new TypeError("Cannot lowLatencyDispatch: roundScale belongs to fp8");
  if (o.useUe8m0 && !o.roundScale) throw new TypeError("Cannot lowLatencyDispatch: useUe8m0 needs roundScale: true");
  return (fp8 ? FLAG.FP8[0] : 0) | (o.roundScale ? FLAG.ROUND_SCALE[0] : 0) | (o.useUe8m0 ? FLAG.UE8M0[0] : 0) |
    (o.scalesColumnMajor ?? true ? FLAG.SCALES_COLUMN_MAJOR[0] : 0) | (o.recvHook ? FLAG.RECEIVE_HOOK[0] : 0);
}

/** What bf16 rows arrive as when they are cast inside: e4m3 with f32 scales, or i32 of four exponents each. */
export type CastRows = ScaledRows<"f8e4m3", "f32" | "i32">;

/**
 * What arrives of `X`: e4m3 rows with scales when bf16 rows are cast, else what was sent; either, where the types do not
 * tell whether they are.
 */
export type Received<X extends Payload, O extends LowLatencyDispatchOptions> = O extends { fp8: false } ? X
  : X extends Tensor<"bf16"> ? O extends { fp8: true } ? CastRows : "fp8" extends keyof O ? X | CastRows : CastRows
  : Tensor<"bf16"> extends X ? X | CastRows
  : X;

/** Enqueues a low-latency dispatch. */
export function lowLatencyDispatch<X extends Payload, O extends LowLatencyDispatchOptions>(
  core: Core,
  x: X,
  o: O,
): LowLatencyResult<Received<X, O>> {
  return core.collective("LOW_LATENCY_DISPATCH", () => enqueueDispatch(core, x, o));
}

function enqueueDispatch<X extends Payload, O extends LowLatencyDispatchOptions>(
  core: Core,
  x: X,
  o: O,
): LowLatencyResult<Received<X, O>> {
  const op = "lowLatencyDispatch";
  needsLowLatency(core, op);
  const routing = routingFields(core, op, o.topkIdx, core.options.maxLowLatencyTokensPerRank);
  const payload = payloadFields(core, op, x, routing.num_tokens);
  const flags = castFlags(x, o);
  if (flags & FLAG.FP8[0] && core.options.hidden % 16 !== 0) {
    throw new RangeError(`Cannot ${op}: hidden is ${core.options.hidden}, rows of fp8 need a multiple of 16`);
  }
  if (flags & FLAG.FP8[0] && payload.row_bytes !== 2 * core.options.hidden) {
    throw new RangeError(
      `Cannot ${op}: x is ${describe(x as Tensor)}, fp8 needs the buffer's hidden of ${core.options.hidden}`,
    );
  }
  const expert_stats = flat(core, op, "expertStats", o.expertStats, ["i32"], [core.numLocalExperts]);
  const wait_stats = flat(core, op, "waitStats", o.waitStats, ["i64"], [core.numRanks]);
  const slotWanted = core.wantSlot(op);
  const operation = core.operation(op, o, flags);
  const own = { slot: slotWanted, expert_stats, wait_stats };
  core.launch("deepep_low_latency_dispatch", dispatchStruct, [own, routing, payload], operation);
  const out = dispatchStruct.outputs();
  const hold = core.holdSlot(out.slot, "low-latency dispatch");
  core.writes(hold, operation.event);
  const slot: HeldSlot = { index: out.slot, hold }, held = { hold };
  const receive = new Receive(core, operation, slot, o, { expertStats: o.expertStats, waitStats: o.waitStats });
  return new LowLatencyResult(core, slot, receive, {
    x: received(core, x, flags, out, held) as Received<X, O>,
    count: new Tensor(out.recv_count, "i32", [core.numLocalExperts], held),
    srcInfo: new Tensor(out.recv_src_info, "i32", [core.numLocalExperts, maxRows(core)], held),
    layoutRange: new Tensor(out.recv_layout_range, "i64", [core.numLocalExperts, core.numRanks], held),
  });
}

function needsLowLatency(core: Core, op: string): void {
  core.open(op);
  if ((core.capabilities.features & constants.FEATURE.LOW_LATENCY[0]) === 0) {
    throw new EpError(`Cannot ${op}: the ${core.device.backend} backend of this version has no low-latency mode`, {
      code: "unsupported",
      op,
      rank: core.rank,
    });
  }
  if (core.options.maxLowLatencyTokensPerRank === 0) {
    throw new EpError(`Cannot ${op}: the buffer was created without maxLowLatencyTokensPerRank`, {
      code: "unsupported",
      op,
    });
  }
}

function received(
  core: Core,
  x: Payload,
  flags: number,
  out: ReturnType<typeof dispatchStruct.outputs>,
  held: { hold: Hold },
): Payload {
  const rows = [core.numLocalExperts, maxRows(core)], { data, scales } = parts("lowLatencyDispatch", x);
  const strides = (width: number) =>
    [out.recv_scales_expert_stride, out.recv_scales_row_stride, out.recv_scales_elem_stride].map((s) =>
      Number(s) / width
    );
  if (flags & FLAG.FP8[0]) {
    const { hidden } = core.options, blocks = Math.ceil(hidden / 128), ue8m0 = (flags & FLAG.UE8M0[0]) !== 0;
    const shape = [...rows, ue8m0 ? Math.ceil(blocks / 4) : blocks];
    return {
      data: new Tensor(out.recv_x, "f8e4m3", [...rows, hidden], held),
      scales: new Tensor<"f32" | "i32">(out.recv_scales, ue8m0 ? "i32" : "f32", shape, {
        strides: strides(4),
        ...held,
      }),
    } satisfies ScaledRows;
  }
  const recvX = new Tensor(out.recv_x, data.dtype, [...rows, data.shape[1]!], held);
  if (!scales) return recvX;
  const shape = [...rows, scales.shape[1]!];
  return {
    data: recvX,
    scales: new Tensor(out.recv_scales, scales.dtype, shape, { strides: strides(itemSize[scales.dtype]), ...held }),
  };
}

/** Options of `EpBuffer.lowLatencyCombine`. */
export interface LowLatencyCombineOptions extends OperationOptions {
  /** The dispatch's `topkIdx`. */
  topkIdx: Tensor;
  /** f32 `[numTokens, numTopk]`: weight of each entry's row. */
  topkWeights: Tensor;
  /** The dispatch's handle. */
  handle: LowLatencyHandle;
  /** bf16 `[numTokens, hidden]` to write to. Default: a new tensor, yours to release. */
  out?: Tensor<"bf16">;
  /**
   * Expert outputs travel as e4m3 with one scale per 128 channels: half the bytes, at the error of e4m3. The same on every
   * rank; hidden must be a multiple of 16. What `expertOutput()` gave is cast in place. Default false.
   */
  fp8?: boolean;
  /** Only send; `received()` or `hook()` enqueues the receiving half. Default false. */
  recvHook?: boolean;
  /** i64 `[numRanks]`: nanoseconds waited for each peer are added to it, by both halves of a call with `recvHook`. */
  waitStats?: Tensor;
}

/** What a low-latency combine gives. */
export class LowLatencyCombineResult implements Disposable {
  /** bf16 `[numTokens, hidden]`: the weighted sums. Yours: release it (unless you gave it as `out`). */
  readonly x: Tensor<"bf16">;
  readonly #core: Core;
  readonly #receive: Receive;
  readonly #release: () => void;
  /** @ignore */
  constructor(core: Core, x: Tensor<"bf16">, receive: Receive, release: () => void) {
    this.#core = core;
    this.x = x;
    this.#receive = receive;
    this.#release = release;
  }
  /** Marks the end of what was enqueued so far. */
  get event(): EpEvent {
    return this.#receive.event;
  }
  /** With `recvHook`: enqueues the receiving half, once; else does nothing. Returns the event of the result. */
  hook(): EpEvent {
    const event = this.#receive.hook();
    this.#core.writes(this.x.hold, event);
    return event;
  }
  /** Waits on the host until the result is there. @throws {EpError} when the operation failed */
  async received(): Promise<void> {
    await this.hook();
  }
  /** Gives the result back. */
  [Symbol.dispose](): void {
    this.#release();
  }
}

/** Enqueues a low-latency combine. */
export function lowLatencyCombine(core: Core, y: Tensor, o: LowLatencyCombineOptions): LowLatencyCombineResult {
  return core.collective("LOW_LATENCY_COMBINE", () => enqueueCombine(core, y, o));
}

function enqueueCombine(core: Core, y: Tensor, o: LowLatencyCombineOptions): LowLatencyCombineResult {
  const op = "lowLatencyCombine";
  needsLowLatency(core, op);
  if (!(o.handle instanceof LowLatencyHandle)) {
    throw new TypeError(`Cannot ${op}: options.handle is no handle of a low-latency dispatch`);
  }
  const held = o.handle.use(core, op), slot = held.index;
  const address = flat(core, op, "x", y, ["bf16"], outputShape(core));
  const routing = routingFields(core, op, o.topkIdx, core.options.maxLowLatencyTokensPerRank);
  const topk_weights = flat(core, op, "topkWeights", o.topkWeights, ["f32"], [routing.num_tokens, routing.num_topk]);
  const wait_stats = flat(core, op, "waitStats", o.waitStats, ["i64"], [core.numRanks]);
  const shape = [routing.num_tokens, core.options.hidden];
  flat(core, op, "out", o.out, ["bf16"], shape);
  if (o.fp8 && core.options.hidden % 16 !== 0) {
    throw new RangeError(`Cannot ${op}: hidden is ${core.options.hidden}, rows of fp8 need a multiple of 16`);
  }
  const operation = core.operation(op, o, (o.recvHook ? FLAG.RECEIVE_HOOK[0] : 0) | (o.fp8 ? FLAG.FP8[0] : 0));
  let made: Tensor<"bf16"> | undefined;
  const release = () => made?.release();
  try {
    made = o.out ? undefined : core.alloc("bf16", shape, operation.event);
    const own = {
      slot,
      topk_weights,
      x: isOutputRegion(core, y, slot) ? 0n : address,
      out: (made ?? o.out!).address,
      wait_stats,
    };
    core.launch("deepep_low_latency_combine", combineStruct, [own, routing], operation);
  } catch (error) {
    core.device.forget(operation.fields.done_id);
    release();
    throw error;
  }
  core.writes(o.out?.hold, operation.event);
  const out = made ?? o.out!, { topkIdx, topkWeights, waitStats } = o;
  return new LowLatencyCombineResult(
    core,
    out,
    new Receive(core, operation, held, o, { out, topkIdx, topkWeights, waitStats }),
    release,
  );
}
