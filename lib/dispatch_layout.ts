/**
 * The layout of a routing: how many tokens go where. Not needed for a dispatch with topkIdx, which counts itself; here
 * for those who balance load by it, and for code that comes from DeepEP. Called by `EpBuffer.getDispatchLayout`.
 */
import { struct } from "./ffi/struct.ts";
import type { Core, OperationOptions } from "./core.ts";
import type { DType } from "./dtype.ts";
import { routingFields } from "./payload.ts";
import type { EpEvent } from "./stream.ts";
import type { Tensor } from "./tensor.ts";

const layoutStruct = struct("deepep_dispatch_layout_args");

/** Where the tokens of this rank go. The tensors are yours: release them. */
export interface DispatchLayout extends Disposable {
  /** i32 `[numRanks]`: tokens that go to each rank. */
  readonly numTokensPerRank: Tensor<"i32">;
  /** i32 `[numExperts]`: entries that go to each expert. */
  readonly numTokensPerExpert: Tensor<"i32">;
  /** bool `[numTokens, numRanks]`. */
  readonly isTokenInRank: Tensor<"bool">;
  /** Marks the end of the counting. */
  readonly event: EpEvent;
}

/** Enqueues the counting of `topkIdx`. Not collective. */
export function getDispatchLayout(core: Core, topkIdx: Tensor, options: OperationOptions): DispatchLayout {
  core.open("getDispatchLayout");
  const routing = routingFields(core, "getDispatchLayout", topkIdx, core.options.maxTokensPerRank);
  const operation = core.operation("getDispatchLayout", options, 0), { event } = operation;
  const made: Tensor[] = [];
  const release = () => made.forEach((tensor) => tensor.release());
  const alloc = <D extends DType>(dtype: D, shape: readonly number[]): Tensor<D> => {
    const tensor = core.alloc(dtype, shape, event);
    made.push(tensor as Tensor);
    return tensor;
  };
  let numTokensPerRank: Tensor<"i32">, numTokensPerExpert: Tensor<"i32">, isTokenInRank: Tensor<"bool">;
  try {
    numTokensPerRank = alloc("i32", [core.numRanks]);
    numTokensPerExpert = alloc("i32", [core.options.numExperts]);
    isTokenInRank = alloc("bool", [routing.num_tokens, core.numRanks]);
    const outputs = {
      num_tokens_per_rank: numTokensPerRank.address,
      num_tokens_per_expert: numTokensPerExpert.address,
      is_token_in_rank: isTokenInRank.address,
    };
    core.launch("deepep_get_dispatch_layout", layoutStruct, [routing, outputs], operation);
  } catch (error) {
    core.device.forget(operation.fields.done_id);
    release();
    throw error;
  }
  return { numTokensPerRank, numTokensPerExpert, isTokenInRank, event, [Symbol.dispose]: release };
}
