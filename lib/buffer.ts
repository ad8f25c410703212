/**
 * `EpBuffer`, what users hold: symmetric memory, slots and streams of one rank. In: a group and options. Out: dispatch
 * and combine in normal and low-latency mode. Each method is one line to the file that does it.
 */
import { struct } from "./ffi/struct.ts";
import { combine, type CombineOptions, type CombineResult } from "./combine.ts";
import { type BufferOptions, type BufferSize, connect, sizeHint } from "./connect.ts";
import type { Core, OperationOptions } from "./core.ts";
import type { Backend, Capabilities } from "./device.ts";
import { dispatch, type DispatchOptions, type DispatchResult } from "./dispatch.ts";
import { type DispatchLayout, getDispatchLayout } from "./dispatch_layout.ts";
import { bf16FromF32, type DType, type TypedArrayOf } from "./dtype.ts";
import { EpError } from "./error.ts";
import { capture, type Graph, type Recorder } from "./graph.ts";
import type { Group } from "./group/group.ts";
import type { DispatchHandle } from "./handle.ts";
import {
  lowLatencyCombine,
  type LowLatencyCombineOptions,
  type LowLatencyCombineResult,
  lowLatencyDispatch,
  type LowLatencyDispatchOptions,
  type LowLatencyResult,
  type Received,
} from "./low_latency.ts";
import { fill } from "./memory.ts";
import { checkLive, type Payload } from "./payload.ts";
import { bufferPlan, type BufferPlanOptions, type LaunchPlan } from "./launch_plan.ts";
import type { ResolvedOptions } from "./plan.ts";
import type { EpEvent, Stream } from "./stream.ts";
import type { Tensor } from "./tensor.ts";

const maskStruct = struct("deepep_mask_args");
const recoverStruct = struct("deepep_buffer_recover_args");

/** Counters of a buffer. */
export interface BufferStats {
  /** Dispatches that ended, either mode. */
  readonly numDispatches: number;
  /** Combines that ended, either mode. */
  readonly numCombines: number;
  /** Operations that failed. */
  readonly numFailures: number;
  /** Rows pushed to all ranks, this one included. */
  readonly rowsSent: number;
  /** Their payload and scale bytes. */
  readonly bytesSent: number;
  /** Expert-output rows read. */
  readonly rowsPulled: number;
  /** Nanoseconds waited for each rank in dispatches. */
  readonly dispatchWaitNs: BigInt64Array;
  /** Nanoseconds waited for each rank in combines. */
  readonly combineWaitNs: BigInt64Array;
}

/** Expert-parallel communication of one rank. Create it with all ranks; close it with `await using` or `close()`. */
export class EpBuffer implements AsyncDisposable {
  readonly #core: Core;
  readonly #group: Group;
  /** Why this backend was taken. */
  readonly backendReason: string;

  private constructor(group: Group, core: Core, reason: string) {
    this.#group = group;
    this.#core = core;
    this.backendReason = reason;
  }

  /**
   * Creates a rank's buffer and connects it with every other rank's. Collective over the group.
   *
   * @throws {RangeError} when an option is out of range
   * @throws {EpError} `mismatch` when ranks give different options, `aborted` when another rank failed, `timeout` when one is missing,
   *   `system` without a driver that is new enough or a GPU, `unsupported` on a GPU that the library has no code for;
   *   `scripts/doctor.ts` says the same of a machine, and what to do
   * @throws {LibraryError} when the backend's library cannot be found, loaded or trusted
   */
  static async create(group: Group, options: BufferOptions): Promise<EpBuffer> {
    const { core, reason } = await connect(group, options);
    return new EpBuffer(group, core, reason);
  }

  /** What a buffer with these options would allocate on each of `numRanks` ranks, by purpose. Allocates nothing. */
  static sizeHint(options: BufferOptions & { numRanks: number }): Promise<BufferSize> {
    return sizeHint(options);
  }

  /** This rank. */
  get rank(): number {
    return this.#core.rank;
  }
  /** Ranks in the group. */
  get numRanks(): number {
    return this.#core.numRanks;
  }
  /** Experts of this rank. */
  get numLocalExperts(): number {
    return this.#core.numLocalExperts;
  }
  /** Index of the first of them among all experts. */
  get firstLocalExpert(): number {
    return this.#core.firstLocalExpert;
  }
  /** Every option with its value. */
  get options(): Readonly<ResolvedOptions> {
    return this.#core.options;
  }
  /** The library that does the work. */
  get backend(): Backend {
    return this.#core.device.backend;
  }
  /** The GPU that this rank is on, as the process numbers them; 0 on the cpu backend. */
  get deviceIndex(): number {
    return this.#core.deviceIndex;
  }
  /** What the device can do. */
  get capabilities(): Capabilities {
    return this.#core.capabilities;
  }
  /**
   * Multiprocessors that an operation of normal mode uses unless it says; 0 on cpu. In low-latency mode it can be more, see
   * {@linkcode EpBuffer.plan}.
   */
  get numSms(): number {
    return this.#core.info().num_sms;
  }
  /** Ranks that share this rank's device, itself included. */
  get ranksOnDevice(): number {
    return this.#core.info().ranks_on_device;
  }
  /** The buffer's own compute stream: the default of every `stream` option. On cuda, operations that it waits for run on it. */
  get stream(): Stream {
    return this.#core.stream;
  }
  /**
   * The communication stream: where operations run that do not run on the caller's (with `asyncFinish`, `previousEvent` or a
   * foreign stream, in a graph; on cpu always). An event recorded on it stands for all operations so far, wherever they ran.
   */
  get commStream(): Stream {
    return this.#core.commStream;
  }

  // --- normal mode

  /**
   * Counts where the tokens of this rank go. Not collective; dispatch with `topkIdx` does not need it.
   *
   * @throws {TypeError} on a wrong dtype or shape
   */
  getDispatchLayout(topkIdx: Tensor, options: OperationOptions = {}): DispatchLayout {
    return getDispatchLayout(this.#core, topkIdx, options);
  }

  /**
   * Sends every token to the ranks that own its experts. Resolves when the counts are known; the rows arrive in stream
   * order. Collective. Calls of one rank launch in the order they are made, before the first `await`.
   *
   * @throws {TypeError} on a wrong dtype or shape, or a tensor of another buffer
   * @throws {RangeError} on too many tokens, or a row that does not fit
   * @throws {EpError} `capacity` (on every rank) when a rank would receive more than it holds, `invalidArgument` on an
   *   expert index outside the experts (`aborted` on the others), `noFreeSlot`, `timeout`, `peerLost`, `mismatch`
   */
  dispatch<X extends Payload>(x: X, options: DispatchOptions): Promise<DispatchResult<X>> {
    return dispatch(this.#core, x, options);
  }

  /**
   * Brings expert outputs back and reduces them: `out = bias + sum of the token's rows`, in f32, in a fixed order.
   * Resolves when it is enqueued. Collective. Expert outputs go through the slot of the handle's result; when that was
   * released (a kept handle), a free slot is borrowed until the call has ended, and there must be one.
   *
   * @throws {TypeError} on a wrong dtype or shape, or a tensor or handle of another buffer
   * @throws {EpError} `closed` when the handle was released; later failures come from `event` and from reading the result
   */
  // deno-lint-ignore require-await -- so that a refusal is a rejection, as it is in dispatch
  async combine(y: Tensor, handle: DispatchHandle, options: CombineOptions = {}): Promise<CombineResult> {
    return combine(this.#core, y, handle, options);
  }

  // --- low-latency mode

  /** Sends tokens into the masked expert-major layout. Launches at once. Collective. Throws as {@linkcode dispatch} does. */
  lowLatencyDispatch<X extends Payload, O extends LowLatencyDispatchOptions>(
    x: X,
    options: O,
  ): LowLatencyResult<Received<X, O>> {
    return lowLatencyDispatch(this.#core, x, options);
  }

  /** Brings weighted expert outputs back. Launches at once. Collective. Throws as {@linkcode combine} does. */
  lowLatencyCombine(y: Tensor, options: LowLatencyCombineOptions): LowLatencyCombineResult {
    return lowLatencyCombine(this.#core, y, options);
  }

  // --- order

  /** Makes a stream on the buffer's device. On cuda, an operation that is given it, and that it waits for, runs on it. */
  createStream(): Stream {
    return this.#core.createStream();
  }
  /** Ends a stream of {@linkcode createStream} after its work. */
  destroyStream(stream: Stream): Promise<void> {
    return this.#core.destroyStream(stream);
  }
  /** Marks the present end of `stream` (default: the buffer's). */
  record(stream?: Stream): EpEvent {
    return this.#core.record(stream);
  }
  /** Enqueues a barrier of all unmasked ranks. Collective. `await` the event to wait on the host. */
  barrier(options: OperationOptions = {}): EpEvent {
    return this.#core.barrier(options);
  }

  /**
   * Records the operations that `record` makes on `stream`, instead of running them, as a CUDA graph. What other libraries
   * enqueue on `stream` meanwhile becomes part of it. `record` is synchronous and gets the operations as functions that are,
   * too; nothing can be awaited or read in it. When it throws, the capture ends, what it made is released, and the error goes
   * on. Dispatches take a slot each, which their results hold until they are released. Tensors that the operations use must
   * stay; rows and routing are read from them at every replay. Not collective, but its replays are.
   *
   * @throws {EpError} `unsupported` on a backend without graphs
   *
   * @example
   * ```ts
   * import type { EpBuffer, Tensor } from "@deepep/deepep";
   *
   * async function replayed(buffer: EpBuffer, x: Tensor<"bf16">, topkIdx: Tensor<"i32">, batches: Uint16Array[]) {
   *   using graph = buffer.capture(buffer.stream, (operations) => {
   *     const recv = operations.dispatch(x, { topkIdx });
   *     return { recv, out: operations.combine(recv.x, recv.handle) };
   *   });
   *   using recv = graph.results.recv, out = graph.results.out;
   *   for (const rows of batches) {
   *     x.write(rows);
   *     graph.launch();
   *     console.log(recv.counts.numRows.address, await out.x.read());
   *   }
   * }
   * ```
   */
  capture<T>(stream: Stream, record: (operations: Recorder) => T): Graph<T> {
    return capture(this.#core, stream, record);
  }

  /**
   * How a dispatch or combine of either mode would be launched: blocks, warps, shared memory. `formatLaunchPlan` makes a line of it.
   *
   * @throws {EpError} `unsupported` on the cpu backend, `invalidArgument` when `numSms` does not fit beside the ranks of the device
   */
  plan(options: BufferPlanOptions): LaunchPlan {
    return bufferPlan(this.#core, options);
  }

  // --- memory

  /**
   * Allocates a tensor, uninitialised or from host data. A `Float32Array` for a bf16 tensor is rounded to nearest even.
   *
   * @example
   * ```ts
   * import { EpBuffer, Group } from "@deepep/deepep";
   * const [group] = Group.local(1);
   * await using buffer = await EpBuffer.create(group!, { hidden: 8, numExperts: 1, numTopk: 1, maxTokensPerRank: 1, backend: "cpu" });
   * using x = buffer.tensor("bf16", [1, 8], Float32Array.of(1, 2, 3, 4, 5, 6, 7, 8));
   * if ((await x.read())[0] !== 0x3f80) throw new Error("1 is 0x3f80 in bf16");
   * ```
   */
  tensor<D extends DType>(
    dtype: D,
    shape: readonly number[],
    data?: TypedArrayOf<D> | (D extends "bf16" ? Float32Array : never),
    options: { stream?: Stream } = {},
  ): Tensor<D> {
    const tensor = this.#core.alloc(dtype, shape);
    if (data === undefined) return tensor;
    try {
      tensor.write(
        (dtype === "bf16" && data instanceof Float32Array ? bf16FromF32(data) : data) as TypedArrayOf<D>,
        options,
      );
    } catch (error) {
      tensor.release();
      throw error;
    }
    return tensor;
  }
  /** Fills a contiguous tensor with a byte value, in stream order. */
  fill(tensor: Tensor, value: number, options: { stream?: Stream } = {}): void {
    checkLive(this.#core, "fill", "the tensor", tensor);
    fill(this.#core, tensor, value, options.stream);
  }
  /** Copies a tensor's bytes to another of the same size, in stream order. Both contiguous. */
  copy(to: Tensor, from: Tensor, options: { stream?: Stream } = {}): void {
    checkLive(this.#core, "copy", "the destination", to);
    checkLive(this.#core, "copy", "the source", from);
    if (to.byteLength !== from.byteLength || !to.contiguous || !from.contiguous) {
      throw new RangeError(
        `Cannot copy ${from.byteLength} bytes to ${to.byteLength}: sizes must be equal and both contiguous`,
      );
    }
    this.#core.copy(to.address, from.address, from.byteLength, options.stream);
  }
  /** Copies any tensor, a foreign one too, to the host. See {@linkcode Tensor.read}. */
  async read(tensor: Tensor, options: { stream?: Stream } = {}): Promise<Uint8Array> {
    checkLive(this.#core, "read", "the tensor", tensor);
    return new Uint8Array(await this.#core.readTensor(tensor, options.stream));
  }
  /** Copies bytes from the host to any contiguous tensor, a foreign one too. */
  write(tensor: Tensor, data: ArrayBufferView, options: { stream?: Stream } = {}): void {
    checkLive(this.#core, "write", "the tensor", tensor);
    if (data.byteLength !== tensor.byteLength || !tensor.contiguous) {
      throw new RangeError(
        `Cannot write ${data.byteLength} bytes: the tensor has ${tensor.byteLength} and must be contiguous`,
      );
    }
    this.#core.writeTensor(tensor, data, options.stream);
  }

  // --- failures

  /**
   * Leaves a peer out of every wait, send and reduction from the next call on. Local: every survivor does it. Where a call has
   * failed because of this peer, `failed` ends with it; low-latency combines that were still to be received then are `aborted`.
   * That needs survivors who have made equally many calls, as they have where each awaits a call before it makes the next; else
   * {@linkcode recover} with `masked`. Throws `RangeError` when it is no peer.
   */
  maskRank(rank: number): void {
    this.#mask(rank, 1);
  }
  /**
   * Takes a masked peer in again. Alone it is enough where the peer has made as many calls meanwhile, and none has failed because
   * of it since the last recovery: else every rank, the peer too, calls {@linkcode recover} after it.
   */
  unmaskRank(rank: number): void {
    this.#mask(rank, 0);
  }
  #mask(rank: number, masked: number): void {
    this.#core.open("mask a rank");
    this.#checkPeer("mask", rank);
    maskStruct.pack({ rank, masked });
    this.#core.call("deepep_mask", maskStruct, "mask");
    this.#core.maskings++;
  }
  #checkPeer(doing: string, rank: number): void {
    if (!(Number.isSafeInteger(rank) && rank >= 0 && rank < this.numRanks) || rank === this.rank) {
      throw new RangeError(`Cannot ${doing} rank ${rank}: needs another rank below ${this.numRanks}`);
    }
  }
  /** The masked ranks, ascending. */
  get maskedRanks(): number[] {
    return bits(this.#core.info().masked_ranks, this.numRanks);
  }
  /** Whether an earlier call failed half-way: recover, or mask the culprit. */
  get failed(): boolean {
    return this.#core.info().failed === 1;
  }

  /**
   * After a call failed half-way: the survivors agree on a fresh start. Collective over the ranks that are left; needs
   * their group to be alive. Results held before stay readable, but their handles must not be combined any more.
   *
   * @param options `masked`: ranks to leave out from now on, the same on every survivor
   * @throws {EpError} `mismatch` when ranks leave out different ones, `aborted` when another rank could not recover, `system` when
   * CUDA has failed; all ranks may try again
   */
  async recover(options: { masked?: readonly number[]; timeoutMs?: number } = {}): Promise<void> {
    const core = this.#core;
    core.open("recover");
    for (const rank of options.masked ?? []) this.#checkPeer("recover without", rank);
    await Promise.allSettled([core.record(core.commStream), core.record()]);
    const info = core.info();
    const masked = new Set([...bits(info.masked_ranks, this.numRanks), ...options.masked ?? []]);
    const ranks = Array.from({ length: this.numRanks }, (_, r) => r).filter((r) => !masked.has(r));
    const mine = new BigUint64Array(new ArrayBuffer(16));
    mine[0] = info.captured === 1 ? core.stats().epoch : info.epoch;
    mine[1] = [...masked].reduce((mask, r) => mask | 1n << BigInt(r), 0n);
    const wait = options.timeoutMs === undefined ? {} : { timeoutMs: options.timeoutMs };
    const all = await this.#group.allGather(new Uint8Array(mine.buffer), { ranks, ...wait });
    const words = ranks.map((r) => new BigUint64Array(all[r]!.slice().buffer));
    const other = words.findIndex((w) => w[1] !== mine[1]);
    if (other >= 0) {
      throw new EpError(
        `Cannot recover: rank ${this.rank} leaves out ranks ${[...masked].join(", ") || "none"}, rank ${
          ranks[other]
        } ranks ${bits(words[other]![1]!, this.numRanks).join(", ") || "none"}`,
        { code: "mismatch", op: "recover", rank: this.rank, peer: ranks[other]! },
      );
    }
    recoverStruct.pack({ epoch: words.reduce((most, w) => w[0]! > most ? w[0]! : most, 0n), masked_ranks: mine[1] });
    let refused: unknown;
    try {
      core.call("deepep_buffer_recover", recoverStruct, "recover");
      core.maskings++;
    } catch (error) {
      refused = error;
    }
    // Nobody may send on the new epochs before everybody has left the old ones.
    const refusals = await this.#group.allGather(Uint8Array.of(refused === undefined ? 0 : 1), { ranks, ...wait });
    if (refused !== undefined) throw refused;
    const refuser = ranks.find((r) => refusals[r]![0] !== 0);
    if (refuser !== undefined) {
      throw new EpError(`Cannot recover: rank ${refuser} could not, and says why there`, {
        code: "aborted",
        op: "recover",
        rank: this.rank,
        peer: refuser,
      });
    }
  }

  /**
   * Counters, and how long each peer was waited for. On cuda that is a look at the GPU, some 10 µs, unless nothing can have run
   * since the last one.
   *
   * @throws {EpError} `system` when the GPU does not answer within 100 ms, since its copies to the host have other work, or when
   * CUDA has failed
   */
  stats(): BufferStats {
    const stats = this.#core.stats();
    const waits = new BigInt64Array(new ArrayBuffer(16 * this.numRanks));
    this.#core.device.hostRead(stats.wait_ns, waits);
    return {
      numDispatches: Number(stats.num_dispatches),
      numCombines: Number(stats.num_combines),
      numFailures: Number(stats.num_failures),
      rowsSent: Number(stats.rows_sent),
      bytesSent: Number(stats.bytes_sent),
      rowsPulled: Number(stats.rows_pulled),
      dispatchWaitNs: waits.slice(0, this.numRanks),
      combineWaitNs: waits.slice(this.numRanks),
    };
  }

  /** @ignore For tests: the inside. */
  get core(): Core {
    return this.#core;
  }

  /** Waits for what this rank has enqueued, then frees everything. Local: never waits for another rank's close. */
  close(): Promise<void> {
    return this.#core.close();
  }
  /** {@linkcode close}. */
  [Symbol.asyncDispose](): Promise<void> {
    return this.close();
  }
}

const bits = (mask: bigint, n: number): number[] =>
  Array.from({ length: n }, (_, r) => r).filter((r) => mask >> BigInt(r) & 1n);
