/**
 * Low-latency mode at the ends of its sizes: fewer tokens than blocks and warps, many, 9 to 16 ranks, 32 experts a token, rows that
 * are a multiple of 16 bytes and of nothing more, rows of 32 KiB. In: a subject. Out: tests. Called by the tests of the
 * backends.
 */
import { test } from "node:test";
import type { Subject } from "./cases.ts";
import { everyWay } from "./low_latency_cases.ts";
import { manyRanks } from "./sizes.ts";
import { suite } from "./suite.ts";
import { makeWorld, type WorldSpec } from "./worlds.ts";

const base = { numRanks: 4, numExperts: 16, numTopk: 4, hidden: 64 } as const;
const few = [1, 2, 3, 8].map((n): WorldSpec => {
  return { ...base, name: `${n} tokens a rank`, hidden: 7168, numTopk: 8, tokens: [n, n, n, n] };
});

const worlds: readonly WorldSpec[] = [
  ...few,
  { ...base, name: "1 token on one rank", hidden: 7168, tokens: [0, 0, 1, 0] },
  { ...base, name: "256 tokens a rank", tokens: [256, 255, 0, 256] },
  { ...base, name: "256 tokens a rank, to one expert", tokens: [256, 256, 256, 256], routing: "oneExpert" },
  { ...base, name: "1024 tokens a rank", tokens: [1024, 1024, 1023, 1], dropped: 0.2 },
  ...manyRanks,
  { ...base, name: "32 experts a token", numExperts: 48, numTopk: 32, tokens: [20, 3, 0, 33], topkType: "i64" },
  { ...base, name: "hidden 8", hidden: 8, tokens: [17, 33, 2, 9] },
  { ...base, name: "hidden 136", hidden: 136, tokens: [7, 1, 12, 9], topkType: "i64" },
  { ...base, name: "rows of 32 KiB", hidden: 16384, tokens: [3, 2, 0, 1] },
];

/** Registers the cases. */
export function runLowLatencySizes({ name, newWorld, skip }: Subject): void {
  suite(`${name}: sizes of low latency`, skip, () => {
    for (const spec of worlds) test(spec.name, { timeout: 60_000 }, () => everyWay(newWorld, makeWorld(spec, 7)));
  });
}
