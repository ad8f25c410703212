/**
 * Normal mode at the ends of its sizes that every backend is tested at: 9 to 16 ranks of one thread, 32 experts a token. In: a
 * subject; a world. Out: tests; dispatch and combine in every way. Called by the tests of the backends.
 */
import { test } from "node:test";
import type { Subject } from "./cases.ts";
import { everyWay } from "./combine_cases.ts";
import { everyCall } from "./dispatch_cases.ts";
import type { NewWorld } from "./driver.ts";
import { suite } from "./suite.ts";
import { makeWorld, type WorldSpec } from "./worlds.ts";

const base = { numRanks: 4, numExperts: 16, numTopk: 4, hidden: 64 } as const;

/** Ranks that are no power of two, so that experts, blocks and warps are shared out unevenly, and 16. */
export const manyRanks: readonly WorldSpec[] = [
  ...[9, 15].map((numRanks): WorldSpec => {
    const tokens = Array.from({ length: numRanks }, (_, r) => 2 * r % 7);
    return { ...base, name: `${numRanks} ranks`, numRanks, numExperts: 32, tokens };
  }),
  {
    ...base,
    name: "16 ranks",
    numRanks: 16,
    numExperts: 40,
    numTopk: 6,
    tokens: Array.from({ length: 16 }, (_, r) => 3 * r),
  },
];

const worlds: readonly WorldSpec[] = [
  ...manyRanks,
  ...(["i32", "i64"] as const).map((topkType): WorldSpec => {
    const tokens = [20, 3, 0, 33];
    return { ...base, name: `32 experts a token, ${topkType}`, numExperts: 48, numTopk: 32, tokens, topkType };
  }),
];

/** A world in every way. */
export async function inEveryWay(newWorld: NewWorld, spec: WorldSpec): Promise<void> {
  const world = makeWorld(spec, 7);
  await everyCall(newWorld, world);
  await everyWay(newWorld, world);
}

/** Registers the cases. */
export function runSizes({ name, newWorld, skip }: Subject): void {
  suite(`${name}: sizes of normal mode`, skip, () => {
    for (const spec of worlds) test(spec.name, { timeout: 60_000 }, () => inEveryWay(newWorld, spec));
  });
}
