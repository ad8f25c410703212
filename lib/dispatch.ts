/**
 * Dispatch in normal mode: check, pack, one call. In: rows and routing of this rank's tokens. Out: the rows that other
 * ranks sent here, as views of a slot, with the handle that brings results back. Called by `EpBuffer.dispatch`.
 */
import { constants } from "./ffi/abi.ts";
import { struct, type StructOutputs } from "./ffi/struct.ts";
import type { Core, OperationOptions } from "./core.ts";
import { itemSize } from "./dtype.ts";
import {
  DispatchHandle,
  type HeldSlot,
  type RecvCounts,
  type ReleaseOptions,
  type RowLayout,
  SlotResult,
} from "./handle.ts";
import { checkTensor, flat, parts, type Payload, payloadFields, type RoutingFields, routingFields } from "./payload.ts";
import type { DispatchLayout } from "./dispatch_layout.ts";
import { type Hold, Tensor } from "./tensor.ts";
import type { EpEvent } from "./stream.ts";

const FLAG = constants.FLAG;
const dispatchStruct = struct("deepep_dispatch_args");

/** Options of `EpBuffer.dispatch`. */
export interface DispatchOptions extends OperationOptions {
  /** i32 or i64 `[numTokens, numTopk]`: expert of each entry, -1 = none. */
  topkIdx?: Tensor;
  /** f32 `[numTokens, numTopk]`. */
  topkWeights?: Tensor;
  /**
   * Instead of `topkIdx`: destinations as `getDispatchLayout` gives them. Rank layout only, without `recv.topkIdx`; without
   * `numTokensPerExpert` the counts per expert are 0. Beside `topkIdx`, which says the same, it is not looked at.
   */
  dispatchLayout?: Pick<DispatchLayout, "isTokenInRank"> & Partial<DispatchLayout>;
  /**
   * Instead of both: the routing of an earlier dispatch. The rows may be others, their number not. Counts that are on the host
   * are not waited for again; those of a dispatch with `cpuSync: false` are, unless this one has it too, and so are others since
   * ranks were masked, or where `maskOnTimeout` may mask them. Which rows a kept handle stands for is then that of its latest
   * dispatch; a result that is held keeps its own.
   */
  handle?: DispatchHandle;
  /** Row layout. Default `"rank"`, or the handle's. */
  layout?: RowLayout;
  /** Counts per expert are rounded up to it; in the expert layout groups begin at multiples of it. Default 1. */
  expertAlignment?: number;
  /** Expert layout: write zeros into the alignment padding. Default false. */
  zeroPadding?: boolean;
  /** Received scales are column-major, columns padded to 16 bytes, as TMA wants them. Default false. */
  scalesColumnMajor?: boolean;
  /**
   * Resolve when the counts are on the host. `false`: shapes are the capacity, `maxRecvTokens` rows, and counts stay on the
   * device; of rows that did not come only `topkIdx` is set, to -1, in the rank layout. Default true.
   */
  cpuSync?: boolean;
  /** i32 `[numLocalExperts]`: entries received, without padding, are added to it, by a dispatch with a handle too. */
  expertStats?: Tensor;
}

/** Counts that stay on the device. */
export interface DeviceCounts {
  /** i32 `[2]`: tokens received; rows of the layout in use. */
  readonly numRows: Tensor<"i32">;
  /** i32 `[numLocalExperts]`, rounded up to `expertAlignment`. */
  readonly numTokensPerExpert: Tensor<"i32">;
  /** i32 `[numRanks]`: tokens from each source rank. */
  readonly numTokensPerRank: Tensor<"i32">;
}

/** What a dispatch received. Its tensors are views of a slot, valid until `release()`. */
export class DispatchResult<X extends Payload = Payload> extends SlotResult implements RecvCounts {
  /** Received rows, of the dtype that was sent: `[numTokens, …]` (rank layout) or `[numRows, …]` (expert layout). */
  readonly x: X;
  /** Rank layout, with `topkIdx`: same dtype, `[numTokens, numTopk]`: local expert index, -1 where the entry is another rank's. */
  readonly topkIdx: Tensor<"i32" | "i64"> | undefined;
  /** With `topkWeights`: f32 `[numTokens, numTopk]`, 0 where the entry is another rank's; expert layout `[numRows]`. */
  readonly topkWeights: Tensor<"f32"> | undefined;
  /** Brings results back: `combine(y, handle)`; repeats the routing: `dispatch(x, { handle })`. */
  readonly handle: DispatchHandle;
  readonly numTokens: number;
  readonly numRows: number;
  readonly #host: RecvCounts;
  readonly #out: Outputs;
  #srcIdx: Tensor<"i32"> | undefined;
  #counts: DeviceCounts | undefined;

  /** @ignore */
  constructor(core: Core, slot: HeldSlot, event: EpEvent, values: {
    x: X;
    topkIdx: Tensor<"i32" | "i64"> | undefined;
    topkWeights: Tensor<"f32"> | undefined;
    handle: DispatchHandle;
    host: RecvCounts;
    out: Outputs;
  }) {
    super(core, slot, event);
    this.x = values.x;
    this.topkIdx = values.topkIdx;
    this.topkWeights = values.topkWeights;
    this.handle = values.handle;
    this.numTokens = values.host.numTokens;
    this.numRows = values.host.numRows;
    this.#host = values.host;
    this.#out = values.out;
  }

  // Made when they are asked for: most programs look at few of them, and the call has no time.

  get numTokensPerExpert(): readonly number[] {
    return this.#host.numTokensPerExpert;
  }
  get numTokensPerRank(): readonly number[] {
    return this.#host.numTokensPerRank;
  }
  /** i32 `[rows]`: source rank * maxTokensPerRank + token; -1 in padding between rows that came. */
  get srcIdx(): Tensor<"i32"> {
    const rows = this.handle.layout === "rank" ? this.numTokens : this.numRows;
    return this.#srcIdx ??= this.#i32(this.#out.recv_src_idx, rows);
  }
  /** The same counts on the device. */
  get counts(): DeviceCounts {
    const { recv_num_rows, recv_num_tokens_per_expert, recv_num_tokens_per_rank } = this.#out;
    return this.#counts ??= {
      numRows: this.#i32(recv_num_rows, 2),
      numTokensPerExpert: this.#i32(recv_num_tokens_per_expert, this.core.numLocalExperts),
      numTokensPerRank: this.#i32(recv_num_tokens_per_rank, this.core.numRanks),
    };
  }
  #i32(address: bigint, n: number): Tensor<"i32"> {
    return new Tensor(address, "i32", [n], { hold: this.slot.hold });
  }

  /** Gives the slot back, and the handle unless it was kept. */
  override release(options: ReleaseOptions = {}): void {
    super.release(options);
    this.handle.releaseWithResult();
  }
}

/** The routing of a call, as fields of its struct: from topkIdx, from a layout, or from a handle. */
interface Routing {
  readonly fields: Partial<RoutingFields> & {
    readonly num_tokens: number;
    readonly num_topk: number;
    readonly is_token_in_rank?: bigint;
    readonly num_tokens_per_expert?: bigint;
  };
  readonly topk_weights: bigint;
  readonly flags: number;
}

function routing(core: Core, x: Payload, o: DispatchOptions): Routing {
  const routes = o.topkIdx !== undefined || o.dispatchLayout !== undefined;
  if (routes === (o.handle !== undefined)) {
    throw new TypeError(
      `Cannot dispatch: needs a routing (topkIdx or dispatchLayout) or a handle, got ${routes ? "both" : "neither"}`,
    );
  }
  const { data } = parts("dispatch", x);
  checkTensor(core, "dispatch", "x", data, [], [undefined, undefined]);
  const rows = data.shape[0]!;
  if (o.handle) {
    const { numTokens, numTopk } = o.handle;
    if (o.topkWeights && numTopk === 0) {
      throw new TypeError("Cannot dispatch: topkWeights need topkIdx, and the handle's dispatch had none");
    }
    if (rows !== numTokens) {
      throw new RangeError(`Cannot dispatch: x has ${rows} tokens, the handle's dispatch had ${numTokens}`);
    }
    const topk_weights = flat(core, "dispatch", "topkWeights", o.topkWeights, ["f32"], [numTokens, numTopk]);
    const topk_idx_bytes = o.handle.topkIdxDtype ? itemSize[o.handle.topkIdxDtype] : 0;
    return {
      fields: { num_tokens: numTokens, num_topk: numTopk, topk_idx_bytes },
      topk_weights,
      flags: FLAG.CACHED[0],
    };
  }
  if (rows > core.options.maxTokensPerRank) {
    throw new RangeError(
      `Cannot dispatch: x has ${rows} tokens, the buffer holds ${core.options.maxTokensPerRank} a rank`,
    );
  }
  if (o.dispatchLayout && !o.topkIdx) {
    if (o.topkWeights) throw new TypeError("Cannot dispatch: topkWeights need topkIdx");
    if (o.layout === "expert") throw new TypeError("Cannot dispatch: the expert layout needs topkIdx");
    const { isTokenInRank, numTokensPerExpert } = o.dispatchLayout;
    return {
      fields: {
        num_tokens: rows,
        num_topk: 0,
        is_token_in_rank: flat(core, "dispatch", "dispatchLayout.isTokenInRank", isTokenInRank, ["bool", "u8"], [
          rows,
          core.numRanks,
        ]),
        num_tokens_per_expert: flat(
          core,
          "dispatch",
          "dispatchLayout.numTokensPerExpert",
          numTokensPerExpert,
          ["i32"],
          [core.options.numExperts],
        ),
      },
      topk_weights: 0n,
      flags: 0,
    };
  }
  const fields = routingFields(core, "dispatch", o.topkIdx!, core.options.maxTokensPerRank);
  const topk_weights = flat(core, "dispatch", "topkWeights", o.topkWeights, ["f32"], [
    fields.num_tokens,
    fields.num_topk,
  ]);
  return { fields, topk_weights, flags: 0 };
}

/** Checks, packs and makes the call. */
function enqueue(core: Core, x: Payload, o: DispatchOptions) {
  core.open("dispatch");
  if (o.handle !== undefined && !(o.handle instanceof DispatchHandle)) {
    throw new TypeError("Cannot dispatch: handle is no handle of a dispatch");
  }
  const layout = o.layout ?? o.handle?.layout ?? "rank";
  const alignment = o.expertAlignment ?? o.handle?.expertAlignment ?? 1;
  checkChoices(layout, alignment, o);
  const { fields, topk_weights, flags } = routing(core, x, o);
  const payload = payloadFields(core, "dispatch", x, fields.num_tokens);
  const expert_stats = flat(core, "dispatch", "expertStats", o.expertStats, ["i32"], [core.numLocalExperts]);
  const cached = o.handle?.use(core, "dispatch");
  // Rows move when a rank is masked, and there are fewer.
  const known = o.handle?.maskings === core.maskings ? o.handle.counts : undefined;
  const sync = o.cpuSync ?? (known === undefined && !core.captured);
  if (sync) core.needsNoCapture("dispatch with cpuSync");
  const slotWanted = core.wantSlot("dispatch");
  const used = cached ?? core.routings.take(fields.num_tokens);
  used.users++; // this call, until its result is: who released the handle meanwhile gives the routing to nobody else
  const counts_id = sync ? core.device.nextId() : 0;
  try {
    const operation = core.operation(
      "dispatch",
      o,
      flags |
        (o.zeroPadding ? FLAG.ZERO_PADDING[0] : 0) | (o.scalesColumnMajor ? FLAG.SCALES_COLUMN_MAJOR[0] : 0) |
        (sync || known && !core.captured ? 0 : FLAG.NO_CPU_SYNC[0]),
    );
    const own = {
      layout: constants.LAYOUT[layout === "rank" ? "RANK" : "EXPERT"][0],
      handle: used.native,
      slot: slotWanted,
      expert_alignment: alignment,
      topk_weights,
      expert_stats,
      counts_id,
    };
    core.launch("deepep_dispatch", dispatchStruct, [own, fields, payload], operation);
    const facts = {
      layout,
      numTokens: fields.num_tokens,
      numTopk: fields.num_topk,
      expertAlignment: alignment,
      maskings: core.maskings,
      topkIdxDtype: o.handle ? o.handle.topkIdxDtype : o.topkIdx?.dtype as "i32" | "i64" | undefined,
    };
    // What the result will need of the arguments: the caller may change them while it awaits.
    return {
      operation,
      used,
      known,
      sync,
      counts_id,
      facts,
      ...parts("dispatch", x),
      weighted: o.topkWeights !== undefined,
    };
  } catch (error) {
    core.device.forget(counts_id);
    core.routings.drop(used);
    throw error;
  }
}

/** Enqueues a dispatch; resolves when the counts are known, or at once without `cpuSync`. */
export async function dispatch<X extends Payload>(
  core: Core,
  x: X,
  o: DispatchOptions = {},
): Promise<DispatchResult<X>> {
  const sent = core.collective("DISPATCH", () => enqueue(core, x, o)), taken = take(core, sent);
  if (!sent.sync) return finish(core, sent, taken, sent.known);
  let counts: RecvCounts;
  try {
    core.check(await core.status(sent.counts_id), sent.counts_id, "dispatch");
    counts = readCounts(core, taken.out.host_counts);
  } catch (error) {
    core.routings.drop(sent.used);
    core.releaseSlot(taken.slot.index, taken.slot.hold);
    throw error;
  }
  return finish(core, sent, taken, counts);
}

/** Records a dispatch in a capture: nothing is known of its counts, so there is nothing to await. */
export function captureDispatch<X extends Payload>(core: Core, x: X, o: DispatchOptions): DispatchResult<X> {
  const sent = core.collective("DISPATCH", () => enqueue(core, x, o));
  return finish(core, sent, take(core, sent), sent.known);
}

/** What the call wrote. */
type Outputs = StructOutputs<"deepep_dispatch_args">;

/** Reads what the call wrote, before another call does, and holds its slot. */
function take(core: Core, { operation }: ReturnType<typeof enqueue>) {
  const out = dispatchStruct.outputs();
  const slot: HeldSlot = { index: out.slot, hold: core.holdSlot(out.slot, "dispatch") };
  core.writes(slot.hold, operation.event);
  return { out, slot };
}

function finish<X extends Payload>(
  core: Core,
  sent: ReturnType<typeof enqueue>,
  { out, slot }: ReturnType<typeof take>,
  known: RecvCounts | undefined,
): DispatchResult<X> {
  const { layout, numTopk, topkIdxDtype } = sent.facts;
  const handle = new DispatchHandle(core, sent.used, slot, { ...sent.facts, counts: known });
  core.routings.drop(sent.used); // the handle is its user now
  const host: RecvCounts = known ??
    { numTokens: out.max_rows, numRows: out.max_rows, numTokensPerExpert: [], numTokensPerRank: [] };
  const rows = layout === "rank" ? host.numTokens : host.numRows;
  const hold: { hold: Hold } = { hold: slot.hold };
  return new DispatchResult<X>(core, slot, sent.operation.event, {
    x: received(sent, rows, out, hold) as X,
    topkIdx: numTopk > 0 && layout === "rank"
      ? new Tensor(out.recv_topk_idx, topkIdxDtype ?? "i64", [rows, numTopk], hold)
      : undefined,
    topkWeights: sent.weighted
      ? new Tensor(out.recv_topk_weights, "f32", layout === "rank" ? [rows, numTopk] : [rows], hold)
      : undefined,
    handle,
    host,
    out,
  });
}

function checkChoices(layout: RowLayout, alignment: number, o: DispatchOptions): void {
  if (layout !== "rank" && layout !== "expert") {
    throw new RangeError(`Cannot dispatch: layout is ${JSON.stringify(layout)}, needs "rank" or "expert"`);
  }
  if (!(Number.isSafeInteger(alignment) && alignment >= 1 && alignment <= 65536)) {
    throw new RangeError(`Cannot dispatch: expertAlignment is ${alignment}, needs 1 to 65536`);
  }
  if (o.handle && (layout !== o.handle.layout || alignment !== o.handle.expertAlignment)) {
    throw new RangeError(
      `Cannot dispatch: layout ${layout} and alignment ${alignment} differ from the handle's ${o.handle.layout} and ${o.handle.expertAlignment}`,
    );
  }
  if (o.zeroPadding && layout !== "expert") {
    throw new TypeError("Cannot dispatch: zeroPadding belongs to the expert layout");
  }
}

/** Counts as they were read: arrays are made when they are asked for. */
class HostCounts implements RecvCounts {
  readonly numTokens: number;
  readonly numRows: number;
  readonly #all: Int32Array;
  readonly #numLocalExperts: number;
  #perExpert: readonly number[] | undefined;
  #perRank: readonly number[] | undefined;

  constructor(all: Int32Array, numLocalExperts: number) {
    this.numTokens = all[0]!;
    this.numRows = all[1]!;
    this.#all = all;
    this.#numLocalExperts = numLocalExperts;
  }
  get numTokensPerExpert(): readonly number[] {
    return this.#perExpert ??= Array.from(this.#all.subarray(2, 2 + this.#numLocalExperts));
  }
  get numTokensPerRank(): readonly number[] {
    return this.#perRank ??= Array.from(this.#all.subarray(2 + this.#numLocalExperts));
  }
}

function readCounts(core: Core, address: bigint): RecvCounts {
  const all = new Int32Array(new ArrayBuffer(4 * (2 + core.numLocalExperts + core.numRanks)));
  core.device.hostRead(address, all);
  return new HostCounts(all, core.numLocalExperts);
}

/** Views of the received rows and scales, shaped as what was sent. */
function received(
  { data, scales }: ReturnType<typeof parts>,
  rows: number,
  out: { recv_x: bigint; recv_scales: bigint; recv_scales_row_stride: bigint; recv_scales_elem_stride: bigint },
  hold: { hold: Hold },
): Payload {
  const recvX = new Tensor(out.recv_x, data.dtype, [rows, data.shape[1]!], hold);
  if (!scales) return recvX;
  const width = itemSize[scales.dtype];
  const strides = [Number(out.recv_scales_row_stride) / width, Number(out.recv_scales_elem_stride) / width];
  return {
    data: recvX,
    scales: new Tensor(out.recv_scales, scales.dtype, [rows, scales.shape[1]!], { strides, ...hold }),
  };
}
