/**
 * DeepEP for TypeScript: expert-parallel dispatch and combine for Mixture-of-Experts models, for Bun and Deno.
 *
 * Tokens live on one rank, their top-k experts on others. `dispatch` sends every token to the ranks that own its
 * experts, `combine` brings the expert outputs back and reduces them. On NVIDIA GPUs, with CUDA graphs, or on the
 * CPU with threads and shared memory; the same code runs on either.
 *
 * @example Four ranks in one process, on the CPU backend
 * ```ts
 * import { EpBuffer, Group } from "@deepep/deepep";
 *
 * const numTokens = 2, hidden = 16;
 * const out = await Promise.all(Group.local(4).map(async (group) => {
 *   await using buffer = await EpBuffer.create(group, {
 *     backend: "cpu", hidden, numExperts: 8, numTopk: 2, maxTokensPerRank: numTokens,
 *   });
 *   using x = buffer.tensor("bf16", [numTokens, hidden], new Float32Array(numTokens * hidden).fill(group.rank + 1));
 *   using topkIdx = buffer.tensor("i32", [numTokens, 2], Int32Array.of(0, 7, 2, 3));
 *   using recv = await buffer.dispatch(x, { topkIdx });
 *   using back = await buffer.combine(recv.x, recv.handle); // every expert is the identity here
 *   return (await back.x.read())[0];
 * }));
 * // token 0 went to the ranks of experts 0 and 7: twice itself; 2, 4, 6 and 8 in bf16
 * if (out.join() !== [0x4000, 0x4080, 0x40c0, 0x4100].join()) throw new Error(`wrong: ${out}`);
 * ```
 *
 * @module
 */
export { type BufferStats, EpBuffer } from "./lib/buffer.ts";
export type { BufferOptions, BufferSize } from "./lib/connect.ts";
export type { BufferShape, ResolvedOptions } from "./lib/plan.ts";
export type { Backend, Capabilities, Wake } from "./lib/device.ts";
export type { OperationOptions } from "./lib/core.ts";
export { Graph, type Recorder } from "./lib/graph.ts";
export {
  type BufferPlanOptions,
  formatLaunchPlan,
  type LaunchPlan,
  launchPlan,
  type LaunchPlanOptions,
  type PlannedOp,
} from "./lib/launch_plan.ts";
export { type DeviceCounts, type DispatchOptions, DispatchResult } from "./lib/dispatch.ts";
export type { DispatchLayout } from "./lib/dispatch_layout.ts";
export type { CombineOptions, CombineResult } from "./lib/combine.ts";
export { DispatchHandle, type RecvCounts, type ReleaseOptions, type RowLayout, SlotResult } from "./lib/handle.ts";
export {
  type CastRows,
  type LowLatencyCombineOptions,
  LowLatencyCombineResult,
  type LowLatencyDispatchOptions,
  LowLatencyHandle,
  LowLatencyResult,
  type Received,
} from "./lib/low_latency.ts";
export type { Payload, ScaledRows } from "./lib/payload.ts";
export { Tensor } from "./lib/tensor.ts";
export { EpEvent, Stream } from "./lib/stream.ts";
export { EpError, type EpErrorCode, type EpErrorDetails, LibraryError } from "./lib/error.ts";
export {
  type CollectiveOptions,
  type ConnectOptions,
  Group,
  type GroupStatic,
  type JoinOptions,
  type LocalOptions,
} from "./lib/group/group.ts";
export {
  bf16FromF32,
  castFromFp8,
  castToFp8,
  type DType,
  e4m3FromF32,
  f32FromBf16,
  f32FromE4m3,
  type Fp8Options,
  type Fp8Rows,
  itemSize,
  type TypedArrayOf,
} from "./lib/dtype.ts";
