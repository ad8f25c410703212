/**
 * The thin layer between the cases and what they test: a world of ranks driven at once, over plain arrays.
 *
 * In: inputs of every rank. Out: outputs of every rank, in the reference's types. Implemented over the reference here, and over
 * `EpBuffer` in drivers.ts. Calls are made on every unmasked rank without waiting between ranks; entries of masked ranks are ignored
 * in inputs and empty or undefined in outputs. A driver turns rows back into contiguous row-major bytes, whatever strides its tensors have.
 */
import type { ScaleStrides } from "../../lib/layout.ts";
import {
  type CombineInput,
  type CombineOutput,
  type DispatchLayout,
  type LowLatencyCombineInput,
  type LowLatencyOptions,
  type LowLatencyOutput,
  type RankInput,
  type RankOutput,
  referenceCombine,
  referenceDispatch,
  referenceDispatchLayout,
  type ReferenceHandle,
  referenceLowLatencyCombine,
  referenceLowLatencyDispatch,
  type RowLayout,
} from "../../lib/reference/mod.ts";

/** The options of the buffers of a world; all ranks get the same. */
export interface WorldOptions {
  readonly numRanks: number;
  readonly hidden: number;
  readonly numExperts: number;
  readonly numTopk: number;
  readonly maxTokensPerRank: number;
  /** 0 or absent: no low-latency mode. */
  readonly maxLowLatencyTokensPerRank?: number;
  readonly maxRecvTokens?: number;
  readonly numSlots?: number;
  readonly maxRowBytes?: number;
  readonly maxScaleBytes?: number;
  /** How long a rank waits for a peer, milliseconds. */
  readonly timeoutMs?: number;
  /** Calls go on without a peer that is not there in time. */
  readonly maskOnTimeout?: boolean;
}

/** How a driver puts inputs into memory. What is received does not depend on it. */
export interface InputStrides {
  /** Bytes between rows of x; a multiple of 16. */
  readonly rowGap?: number;
  /** Scales are given column-major. */
  readonly scalesColumnMajor?: boolean;
  /** Elements between rows of scales, or between columns where they are column-major. */
  readonly scaleGap?: number;
}

/** A dispatch. */
export interface DispatchCall {
  readonly numTopk: number;
  readonly layout?: RowLayout;
  readonly expertAlignment?: number;
  readonly zeroPadding?: boolean;
  readonly noCpuSync?: boolean;
  readonly scalesColumnMajor?: boolean;
  /** Take the routing from the handle of an earlier dispatch of this driver. */
  readonly cached?: Dispatched;
  readonly inputStrides?: InputStrides;
}

/** A result that holds a slot on every rank. */
export interface Held {
  /** Strides of the received scales on each rank, where the driver knows. */
  readonly scaleStrides?: readonly (ScaleStrides | undefined)[];
  /** Gives the slots back. */
  release(): Promise<void>;
}
export interface Dispatched extends Held {
  readonly ranks: readonly RankOutput[];
}
export interface LowLatencyDispatched extends Held {
  readonly ranks: readonly LowLatencyOutput[];
}

/** A combine. */
export interface CombineCall {
  readonly hidden: number;
  /** Expert outputs are written into the slot's expert-output region beforehand, and combine is given none. */
  readonly zeroCopy?: boolean;
  /** Use any free slot instead of the dispatch's. */
  readonly anySlot?: boolean;
}

/** A low-latency dispatch. */
export interface LowLatencyCall extends Pick<LowLatencyOptions, "numTopk" | "fp8" | "round" | "ue8m0"> {
  readonly scalesColumnMajor?: boolean;
  /** Send and receive in two calls; all ranks send before any receives. */
  readonly recvHook?: boolean;
  readonly inputStrides?: InputStrides;
}

/** The receiving half of a call that every rank has sent: on every rank, once. */
export type Receive<T> = () => Promise<T>;

/** A low-latency combine. */
export interface LowLatencyCombineCall {
  readonly hidden: number;
  readonly zeroCopy?: boolean;
  readonly recvHook?: boolean;
  readonly fp8?: boolean;
}

/** An accident to inject once: a delay, silence, or the end of the process. Names are those of the ABI, in camelCase. */
export interface Delay {
  readonly op: "dispatch" | "combine" | "lowLatencyDispatch" | "lowLatencyCombine";
  readonly phase: "notify" | "send" | "arrive" | "publish" | "reduce";
  readonly delayUs?: number;
  /** Default "delay". */
  readonly action?: "delay" | "exit" | "stall";
}

/** A world under test. Calls reject with {@linkcode WorldFailure}. */
export interface WorldDriver extends AsyncDisposable {
  readonly options: WorldOptions;
  dispatchLayout(inputs: readonly RankInput[], numTopk: number): Promise<DispatchLayout[]>;
  dispatch(inputs: readonly RankInput[], call: DispatchCall): Promise<Dispatched>;
  combine(from: Dispatched, inputs: readonly CombineInput[], call: CombineCall): Promise<CombineOutput[]>;
  lowLatencyDispatch(inputs: readonly RankInput[], call: LowLatencyCall): Promise<Receive<LowLatencyDispatched>>;
  lowLatencyCombine(
    from: LowLatencyDispatched,
    inputs: readonly LowLatencyCombineInput[],
    call: LowLatencyCombineCall,
  ): Promise<Receive<Uint16Array[]>>;
  /** Masks ranks on every other rank, for good. */
  mask(ranks: readonly number[]): Promise<void>;
  /** Makes a rank late; absent where nothing can be injected. */
  delay?(rank: number, delay: Delay): Promise<void>;
}

/** Makes the ranks of a world; buffers are connected when it resolves. */
export type NewWorld = (options: WorldOptions) => Promise<WorldDriver>;

/** A call that failed on at least one rank. */
export class WorldFailure extends Error {
  override readonly name = "WorldFailure";
  /** What each rank rejected with; undefined where it did not. */
  readonly failures: readonly unknown[];
  constructor(failures: readonly unknown[]) {
    super(failures.map((failure, rank) => `rank ${rank}: ${failure ?? "succeeded"}`).join("\n"));
    this.failures = failures;
  }
  /** The code of each rank: an EpError's, else the error's class, "ok" where the rank succeeded. */
  get codes(): string[] {
    return this.failures.map((failure) => {
      if (failure === undefined) return "ok";
      const { code, name } = failure as { code?: unknown; name?: string };
      return typeof code === "string" ? code : String(name);
    });
  }
}

/** Waits for every rank, then gives the values or throws all failures at once. Drivers end their calls with it. */
export async function settleWorld<T>(promises: readonly PromiseLike<T>[]): Promise<T[]> {
  const settled = await Promise.allSettled(promises);
  if (settled.some((s) => s.status === "rejected")) {
    throw new WorldFailure(settled.map((s) => s.status === "rejected" ? s.reason : undefined));
  }
  return settled.map((s) => (s as PromiseFulfilledResult<T>).value);
}

/** The reference as a driver: subject of the brute-force checks, and what shows that the cases run. */
export const newReferenceWorld: NewWorld = (options) => Promise.resolve(new ReferenceDriver(options));

class ReferenceDriver implements WorldDriver {
  readonly options: WorldOptions;
  #masked: readonly number[] = [];
  #handles: WeakMap<Dispatched, ReferenceHandle> = new WeakMap();
  #calls: WeakMap<LowLatencyDispatched, LowLatencyOptions> = new WeakMap();

  constructor(options: WorldOptions) {
    this.options = options;
  }

  dispatchLayout(inputs: readonly RankInput[], numTopk: number): Promise<DispatchLayout[]> {
    const { numExperts, numRanks } = this.options;
    return this.#run(() =>
      inputs.map(({ topkIdx, numTokens }) =>
        referenceDispatchLayout(topkIdx!, { numTokens, numTopk, numExperts, numRanks })
      )
    );
  }

  dispatch(inputs: readonly RankInput[], call: DispatchCall): Promise<Dispatched> {
    const { cached, ...options } = { ...this.options, ...call, masked: this.#masked };
    return this.#run(() => {
      const old = cached && this.#handles.get(cached);
      const { ranks, handle } = referenceDispatch(inputs, { ...options, ...(old ? { cached: old } : {}) });
      const result = { ranks, release: () => Promise.resolve() };
      this.#handles.set(result, handle);
      return result;
    });
  }

  combine(from: Dispatched, inputs: readonly CombineInput[], call: CombineCall): Promise<CombineOutput[]> {
    return this.#run(() => referenceCombine(this.#handles.get(from)!, inputs, { ...call, masked: this.#masked }));
  }

  lowLatencyDispatch(inputs: readonly RankInput[], call: LowLatencyCall): Promise<Receive<LowLatencyDispatched>> {
    const maxTokensPerRank = this.options.maxLowLatencyTokensPerRank ?? 0;
    const options = { ...this.options, ...call, maxTokensPerRank, masked: this.#masked };
    return this.#run(() => {
      const result = {
        ranks: referenceLowLatencyDispatch(inputs, options),
        release: () => Promise.resolve(),
      };
      this.#calls.set(result, options);
      return () => Promise.resolve(result);
    });
  }

  lowLatencyCombine(
    from: LowLatencyDispatched,
    inputs: readonly LowLatencyCombineInput[],
    call: LowLatencyCombineCall,
  ): Promise<Receive<Uint16Array[]>> {
    const options = { ...this.#calls.get(from)!, ...call, fp8: call.fp8 ?? false, masked: this.#masked };
    return this.#run(() => {
      const sums = referenceLowLatencyCombine(inputs, options);
      return () => Promise.resolve(sums);
    });
  }

  mask(ranks: readonly number[]): Promise<void> {
    this.#masked = [...this.#masked, ...ranks];
    return Promise.resolve();
  }

  [Symbol.asyncDispose](): Promise<void> {
    return Promise.resolve();
  }

  /** The reference fails for the world; a driver fails by rank. */
  #run<T>(call: () => T): Promise<T> {
    try {
      return Promise.resolve(call());
    } catch (error) {
      const code = (error as Error).message.includes("would receive") ? "capacity" : "invalidArgument";
      const failure = Object.assign(error as Error, { code });
      return Promise.reject(new WorldFailure(Array.from({ length: this.options.numRanks }, () => failure)));
    }
  }
}
