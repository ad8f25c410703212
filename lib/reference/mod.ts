/**
 * The reference: what dispatch and combine mean, in slow and obvious TypeScript, a whole world at a time.
 *
 * In: the inputs of all ranks. Out: the outputs of all ranks. Called by the tests of every backend, which must give the same
 * bits, and by the demo and the benchmarks, which verify before they time.
 */
export * from "./combine.ts";
export * from "./dispatch.ts";
export * from "./gate.ts";
export * from "./layout.ts";
export * from "./low_latency.ts";
export type { RankInput, RowLayout, TopkIdx, World } from "./world.ts";
