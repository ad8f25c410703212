/**
 * Combine in normal mode: check, pack, one call. In: expert outputs for the rows of a dispatch. Out: per token of this
 * rank, the reduced sum of its rows, pulled from the ranks that hold them. Called by `EpBuffer.combine`.
 */
import { struct } from "./ffi/struct.ts";
import type { Core, OperationOptions } from "./core.ts";
import { DispatchHandle } from "./handle.ts";
import type { DType } from "./dtype.ts";
import { checkTensor, describe, flat, rowStride } from "./payload.ts";
import type { EpEvent } from "./stream.ts";
import type { Tensor } from "./tensor.ts";

const combineStruct = struct("deepep_combine_args");

/** Options of `EpBuffer.combine`. */
export interface CombineOptions extends OperationOptions {
  /** f32, shaped as the dispatch's received `topkWeights`: brought back to the tokens and summed. For backward passes. */
  topkWeights?: Tensor;
  /** f32 `[numTokens, numTopk]`, expert layout only: row k of a token is multiplied by it. */
  weights?: Tensor;
  /** One or two bf16 `[numTokens, hidden]`, added before the rows. */
  bias?: Tensor | readonly Tensor[];
  /** bf16 `[numTokens, hidden]` to write to. Default: a new tensor, yours to release. */
  out?: Tensor<"bf16">;
}

/** What a combine gives. */
export interface CombineResult extends Disposable {
  /** bf16 `[numTokens, hidden]`: the reduced tokens. Yours: release it (unless you gave it as `out`). */
  readonly x: Tensor<"bf16">;
  /** With `topkWeights`: f32 `[numTokens, numTopk]`. */
  readonly topkWeights: Tensor<"f32"> | undefined;
  /** Marks the end of the operation. */
  readonly event: EpEvent;
}

/** Answers the channels, and how many rows there are where nobody knows yet how many are needed: else 0. */
function checkShapes(core: Core, y: Tensor, handle: DispatchHandle, o: CombineOptions): [number, number] {
  checkTensor(core, "combine", "y", y, ["bf16"], [undefined, undefined]);
  const hidden = y.shape[1]!;
  if (hidden === 0 || hidden % 8 !== 0 || hidden > core.options.hidden) {
    throw new RangeError(
      `Cannot combine: y is ${describe(y)}, hidden needs a multiple of 8 up to the buffer's ${core.options.hidden}`,
    );
  }
  const { counts, layout } = handle;
  const need = counts && (layout === "rank" ? counts.numTokens : counts.numRows);
  let given = Infinity;
  for (const [name, tensor] of [["y", y], ["topkWeights", o.topkWeights]] as const) {
    if (!tensor) continue;
    const rows = tensor.shape[0]!;
    if (need !== undefined && rows < need) {
      throw new RangeError(`Cannot combine: ${name} is ${describe(tensor)}, the dispatch received ${need} rows`);
    }
    if (need === undefined && rows === 0) {
      throw new RangeError(
        `Cannot combine: ${name} is ${describe(tensor)}, and what the dispatch received is not known`,
      );
    }
    given = Math.min(given, rows);
  }
  if (o.weights && layout !== "expert") {
    throw new TypeError(
      "Cannot combine: weights need the expert layout; a row of the rank layout is already the sum of its experts, weight them before",
    );
  }
  return [hidden, need === undefined ? given : 0];
}

/** Enqueues a combine. Nothing to wait for: failures show at `await result.event` and when the result is read. */
export function combine(core: Core, y: Tensor, handle: DispatchHandle, o: CombineOptions): CombineResult {
  return core.collective("COMBINE", () => enqueue(core, y, handle, o));
}

function enqueue(core: Core, y: Tensor, handle: DispatchHandle, o: CombineOptions): CombineResult {
  core.open("combine");
  if (!(handle instanceof DispatchHandle)) throw new TypeError("Cannot combine: handle is no handle of a dispatch");
  const { native } = handle.use(core, "combine");
  const [hidden, num_rows] = checkShapes(core, y, handle, o);
  const { numTokens, numTopk, layout } = handle;
  const tokens = [numTokens, hidden], perEntry = [numTokens, numTopk];
  const biases = o.bias === undefined ? [] : "address" in o.bias ? [o.bias] : o.bias;
  if (biases.length > 2) throw new RangeError(`Cannot combine: ${biases.length} biases, at most 2`);
  const weightsShape = layout === "rank" ? [undefined, numTopk] : [undefined];
  const topk_weights = flat(core, "combine", "topkWeights", o.topkWeights, ["f32"], weightsShape);
  const fixed = {
    hidden,
    handle: native,
    num_rows,
    topk_weights,
    weights: flat(core, "combine", "weights", o.weights, ["f32"], perEntry),
    bias_0: flat(core, "combine", "bias", biases[0], ["bf16"], tokens),
    bias_1: flat(core, "combine", "bias", biases[1], ["bf16"], tokens),
    x_stride: rowStride("combine", "y", y),
  };
  flat(core, "combine", "out", o.out, ["bf16"], tokens);
  const slot = handle.slotIndex;
  if (slot < 0) core.needsNoCapture("combine a released result");
  const operation = core.operation("combine", o, 0), { event } = operation;
  const made: Tensor[] = [];
  const release = () => made.forEach((tensor) => tensor.release());
  const alloc = <D extends DType>(dtype: D, shape: readonly number[]): Tensor<D> => {
    const tensor = core.alloc(dtype, shape, event);
    made.push(tensor as Tensor);
    return tensor;
  };
  let x: Tensor<"bf16">, backWeights: Tensor<"f32"> | undefined;
  try {
    x = o.out ?? alloc("bf16", tokens);
    backWeights = o.topkWeights ? alloc("f32", perEntry) : undefined;
    const placed = {
      slot,
      x: isOutputRegion(core, y, slot) ? 0n : y.address,
      out: x.address,
      out_topk_weights: backWeights?.address ?? 0n,
    };
    core.launch("deepep_combine", combineStruct, [fixed, placed], operation);
  } catch (error) {
    core.device.forget(operation.fields.done_id);
    release();
    throw error;
  }
  core.writes(o.out?.hold, event);
  return { x, topkWeights: backWeights, event, [Symbol.dispose]: release };
}

/** Whether `y` is what `handle.expertOutput()` gave: then it lies where peers pull from, and nothing is copied. */
export function isOutputRegion(core: Core, y: Tensor, slot: number): boolean {
  return slot >= 0 && y.hold !== undefined && y.address === core.outputAddress(slot) && y.contiguous;
}
