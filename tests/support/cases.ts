/**
 * The case suite that every backend passes: dispatch, combine and low latency against the reference, bit for bit.
 *
 * In: a name and a function that makes worlds. Out: tests, registered with node:test. Called by the test files of the reference, of
 * cpu, cuda and nvshmem. The cases themselves are in the files beside this one.
 */
import type { NewWorld } from "./driver.ts";
export { runCombineCases } from "./combine_cases.ts";
export { runDispatchCases } from "./dispatch_cases.ts";
export { runLowLatencyCases } from "./low_latency_cases.ts";
export { runMostTokens } from "./big_worlds.ts";
export { runLowLatencySizes } from "./low_latency_sizes.ts";
export { runSizes } from "./sizes.ts";

/** What the suite runs over. */
export interface Subject {
  /** Begins the names of the tests. */
  readonly name: string;
  readonly newWorld: NewWorld;
  /** Why the suite cannot run here; its tests are then one skipped test that says so. */
  readonly skip?: string | false;
  /** Random worlds a suite draws; default 8. DEEPEP_TEST_RANDOM overrides it. */
  readonly numRandom?: number;
  /** Where random worlds begin; default a new seed a run, or DEEPEP_SEED. Names of tests and errors have it. */
  readonly seed?: number;
}
