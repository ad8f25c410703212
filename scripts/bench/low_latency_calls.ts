/**
 * Low-latency calls of all ranks, and what they move.
 *
 * In: buffers with what each rank sends. Out: results, chains, bytes. Called by low_latency.ts on the host's clock and by
 * gpu/low_latency on the device's.
 */
import type {
  EpEvent,
  LowLatencyCombineOptions,
  LowLatencyCombineResult,
  LowLatencyDispatchOptions,
  LowLatencyResult,
  OperationOptions,
  Payload,
  Tensor,
} from "../../mod.ts";

/** Options of a dispatch but its routing. */
export type DispatchChoices = Omit<LowLatencyDispatchOptions, "topkIdx">;
/** Options of a combine but its routing and its handle. */
export type CombineChoices = Omit<LowLatencyCombineOptions, "topkIdx" | "topkWeights" | "handle" | "out">;

/** What makes calls: a buffer, or the recorder of a capture. */
export interface Operations {
  lowLatencyDispatch(x: Payload, options: LowLatencyDispatchOptions): LowLatencyResult;
  lowLatencyCombine(y: Tensor, options: LowLatencyCombineOptions): LowLatencyCombineResult;
  barrier(options?: OperationOptions): EpEvent;
}

/** Calls with one routing. */
export class LowLatencyCalls {
  readonly #topkIdx: readonly Tensor[];
  readonly #topkWeights: readonly Tensor[];

  constructor(routing: { readonly topkIdx: readonly Tensor[]; readonly topkWeights: readonly Tensor[] }) {
    this.#topkIdx = routing.topkIdx;
    this.#topkWeights = routing.topkWeights;
  }

  /** A rank's dispatch. With `recvHook` the receiving half is enqueued, too, unless `sendOnly`. */
  dispatch(
    operations: Operations,
    rank: number,
    { x, sendOnly = false, ...choices }: DispatchChoices & { x: Payload; sendOnly?: boolean },
  ): LowLatencyResult {
    const result = operations.lowLatencyDispatch(x, { ...choices, topkIdx: this.#topkIdx[rank]! });
    if (choices.recvHook && !sendOnly) result.hook();
    return result;
  }

  /** A rank's combine. With `recvHook` as {@linkcode dispatch}. */
  combine(
    operations: Operations,
    rank: number,
    { y, of, out, sendOnly = false, ...choices }: CombineChoices & {
      y: Tensor;
      of: LowLatencyResult;
      out: Tensor<"bf16">;
      sendOnly?: boolean;
    },
  ): LowLatencyCombineResult {
    const [topkIdx, topkWeights] = [this.#topkIdx[rank]!, this.#topkWeights[rank]!];
    const result = operations.lowLatencyCombine(y, { ...choices, topkIdx, topkWeights, handle: of.handle, out });
    if (choices.recvHook && !sendOnly) result.hook();
    return result;
  }
}

/** Bytes of a row of FP8 with an f32 scale per 128 channels. */
export const fp8RowBytes = (hidden: number): number => hidden + 4 * Math.ceil(hidden / 128);

/** Least traffic over all ranks of a call that sends `rows` rows of `tokens` tokens: bytes read once and bytes written once. */
export const lowLatencyBytes = {
  /** bf16 rows read, rows of `rowBytes` written. */
  dispatch: (
    { tokens, rows, hidden }: { tokens: number; rows: number; hidden: number },
    rowBytes = fp8RowBytes(hidden),
  ) => tokens * 2 * hidden + rows * rowBytes,
  combine: ({ tokens, rows, hidden }: { tokens: number; rows: number; hidden: number }): number =>
    (rows + tokens) * 2 * hidden,
} as const;
