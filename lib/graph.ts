/**
 * CUDA graphs: operations recorded once and replayed as one launch, with new routing and rows in the same tensors. In: a
 * stream and a function that makes the calls. Out: a `Graph`. While a capture is open, core.ts gives operations no
 * completion ids and notes here what they use; nothing runs. Called by `EpBuffer.capture`.
 */
import { struct } from "./ffi/struct.ts";
import { combine, type CombineOptions, type CombineResult } from "./combine.ts";
import type { Core, OperationOptions } from "./core.ts";
import { captureDispatch, type DispatchOptions, type DispatchResult } from "./dispatch.ts";
import { EpError } from "./error.ts";
import type { DispatchHandle, SharedRouting } from "./handle.ts";
import {
  lowLatencyCombine,
  type LowLatencyCombineOptions,
  type LowLatencyCombineResult,
  lowLatencyDispatch,
  type LowLatencyDispatchOptions,
  type LowLatencyResult,
  type Received,
} from "./low_latency.ts";
import type { Payload } from "./payload.ts";
import { EpEvent, type Stream, streamAddress } from "./stream.ts";
import { forgotten, type Hold, type Tensor } from "./tensor.ts";

const graphStruct = struct("deepep_graph_args");

/** What the operations of a capture use: kept, or at least watched, as long as the graph may be replayed. */
export interface Captured {
  readonly stream: Stream;
  /** Bit s: slot s was free when the capture began, and is not yet taken by it. */
  freeSlots: number;
  /** Slots that its calls have taken: by a result that is held, or released in the capture, so that a later call may take it. */
  readonly slots: Map<number, "held" | "released">;
  /** Memory that is read or written. */
  readonly used: Set<Hold>;
  /** Memory that is written: its reader must hear of a replay that failed. */
  readonly written: Set<Hold>;
  readonly routings: Set<SharedRouting>;
}

/**
 * The operations that can be captured, each as `EpBuffer`'s of the same name but synchronous: what they return describes
 * what a replay will leave in the same memory. Their events order what is captured together, as `previousEvent` or by
 * `event.wait()`, and say nothing outside of the capture: there use the event of {@linkcode Graph.launch}.
 */
export interface Recorder {
  /** The stream that is captured: the default of every `stream` option. */
  readonly stream: Stream;
  /**
   * Shapes are the capacity and counts stay on the device, as with `cpuSync: false`. The slot is held until release: a result
   * that is released in the capture leaves it to later calls, so that a graph of many layers needs but two slots. Then the
   * graph holds it.
   */
  dispatch<X extends Payload>(x: X, options: Omit<DispatchOptions, "cpuSync">): DispatchResult<X>;
  /** The dispatch's result must still be held. */
  combine(y: Tensor, handle: DispatchHandle, options?: CombineOptions): CombineResult;
  /** Sends tokens into the masked expert-major layout. */
  lowLatencyDispatch<X extends Payload, O extends LowLatencyDispatchOptions>(
    x: X,
    options: O,
  ): LowLatencyResult<Received<X, O>>;
  /** Brings weighted expert outputs back. */
  lowLatencyCombine(y: Tensor, options: LowLatencyCombineOptions): LowLatencyCombineResult;
  /** A barrier of all unmasked ranks. */
  barrier(options?: OperationOptions): EpEvent;
}

/**
 * Captured operations. Every rank replays the same graph in the same order. Before a replay write new rows and routing into
 * the captured tensors; after it read the results. Once something that it uses was released it cannot be launched any more.
 */
export class Graph<T = unknown> implements Disposable {
  /** What the captured function returned: results whose memory every replay fills anew. */
  readonly results: T;
  readonly #core: Core;
  readonly #native: bigint;
  readonly #captured: Captured;
  readonly #slots: readonly number[];
  #released = false;

  /** @ignore Use `buffer.capture()`. */
  constructor(core: Core, native: bigint, captured: Captured, results: T) {
    this.#core = core;
    this.#native = native;
    this.#captured = captured;
    this.results = results;
    this.#slots = releasedIn(captured);
    core.keepSlots(this.#slots, { owner: core, alive: true });
    core.graphs.add(this);
    forgotten.register(this, { what: "a graph", owner: core }, this);
  }

  /**
   * Enqueues a replay, in the order of `stream` (default: the captured one) and of the buffer's other operations. Collective,
   * when what was captured is. The event marks its end.
   *
   * @throws {EpError} `closed` when the graph, or a result or tensor that it uses, was released
   */
  launch(options: { stream?: Stream } = {}): EpEvent {
    const core = this.#core;
    core.open("launch a graph");
    const gone = this.#released ? "it was released" : [...this.#captured.used].find((hold) => !hold.alive)?.released;
    if (gone !== undefined) {
      const why = this.#released ? gone : `memory that it uses was given back by ${gone}`;
      throw new EpError(`Cannot launch the graph: ${why}`, { code: "closed", op: "graph", rank: core.rank });
    }
    const stream = options.stream ?? this.#captured.stream;
    const event = core.launchGraph(this.#native, stream, graphStruct);
    for (const hold of this.#captured.written) hold.producer = event;
    return event;
  }

  /** Frees the graph, after the replays that were enqueued. What it used stays with its owners, but for slots that it holds. */
  release(): void {
    if (this.#released) return;
    this.#core.needsNoCapture("release a graph");
    this.#released = true;
    forgotten.unregister(this);
    this.#core.graphs.delete(this);
    this.#core.device.end("deepep_graph_destroy", this.#native, "graph");
    this.#core.dropSlots(this.#slots, this.#core.commStream); // where replays run
    for (const routing of this.#captured.routings) this.#core.routings.drop(routing);
  }
  /** {@linkcode release}. */
  [Symbol.dispose](): void {
    this.release();
  }
}

/** Slots that were released in a capture, and not taken again. */
function releasedIn({ slots }: Captured): number[] {
  return [...slots].filter(([, state]) => state === "released").map(([slot]) => slot);
}

/** Ends a capture; answers the native graph. @throws {EpError} when a call in it failed */
function end(core: Core, stream: bigint): bigint {
  graphStruct.pack({ stream });
  core.call("deepep_graph_end", graphStruct, "graph");
  return graphStruct.get("graph");
}

/** Captures what `record` enqueues. */
export function capture<T>(core: Core, stream: Stream, record: (operations: Recorder) => T): Graph<T> {
  core.open("capture a graph");
  const address = streamAddress("capture a graph", stream);
  if (typeof record !== "function") {
    throw new TypeError("Cannot capture a graph: needs a function that makes the calls");
  }
  core.needsNoCapture("capture a graph");
  const captured: Captured = {
    stream,
    freeSlots: core.info().free_slots,
    slots: new Map(),
    used: new Set(),
    written: new Set(),
    routings: new Set(),
  };
  graphStruct.pack({ stream: address });
  core.call("deepep_graph_begin", graphStruct, "graph");
  const made: Disposable[] = [];
  let results: T, native: bigint;
  try {
    core.captured = captured;
    try {
      results = record(recorder(core, captured, made));
    } catch (error) {
      try {
        core.device.end("deepep_graph_destroy", end(core, address), "graph");
      } catch {
        // There is no graph after a call that failed, and the reason is thrown below.
      }
      throw error;
    }
    native = end(core, address);
    if (typeof (results as PromiseLike<unknown> | undefined)?.then === "function" && !(results instanceof EpEvent)) {
      core.device.end("deepep_graph_destroy", native, "graph");
      throw new TypeError(
        "Cannot capture a graph: the function is asynchronous, and nothing may be awaited in a capture",
      );
    }
  } catch (error) {
    core.captured = undefined;
    core.keepSlots(releasedIn(captured), undefined);
    for (const result of made) result[Symbol.dispose]();
    for (const routing of captured.routings) core.routings.drop(routing);
    throw error;
  }
  core.captured = undefined;
  return new Graph(core, native, captured, results);
}

/** The operations, for as long as the capture is open. What they make is released when it comes to nothing. */
function recorder(core: Core, captured: Captured, made: Disposable[]): Recorder {
  const note = <R extends Disposable>(launch: () => R): R => {
    if (core.captured !== captured) {
      throw new EpError("Cannot record an operation: the capture has ended", { code: "closed", op: "graph" });
    }
    const result = launch();
    made.push(result);
    return result;
  };
  return {
    stream: captured.stream,
    dispatch: (x, options) => note(() => captureDispatch(core, x, options)),
    combine: (y, handle, options = {}) => note(() => combine(core, y, handle, options)),
    lowLatencyDispatch: (x, options) => note(() => lowLatencyDispatch(core, x, options)),
    lowLatencyCombine: (y, options) => note(() => lowLatencyCombine(core, y, options)),
    barrier: (options = {}) => core.barrier(options),
  };
}
