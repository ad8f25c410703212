/** The CUDA backend at the ends of its sizes: no tokens, one, thousands, 16 ranks, rows of 14336 bytes. */
import { test } from "node:test";
import { runMostTokens, thereAndBack } from "./support/big_worlds.ts";
import { noCuda, noCudaLowLatency } from "./support/cuda.ts";
import { localWorlds } from "./support/drivers.ts";
import { runLowLatencySizes } from "./support/low_latency_sizes.ts";
import { inEveryWay, runSizes } from "./support/sizes.ts";
import { suite } from "./support/suite.ts";
import type { WorldSpec } from "./support/worlds.ts";

const newWorld = localWorlds("cuda");
const base = { numRanks: 4, numExperts: 16, numTopk: 4, hidden: 64 } as const;

/** In every way. */
const worlds: readonly WorldSpec[] = [
  { ...base, name: "0 tokens on all ranks", tokens: [0, 0, 0, 0] },
  { ...base, name: "1 token on one rank", tokens: [0, 0, 1, 0] },
  { ...base, name: "more tokens than blocks", tokens: [700, 513, 1, 640] },
  { ...base, name: "hidden 8", hidden: 8, tokens: [17, 33, 2, 9] },
  // Eight parts a token: four pieces of a row, and what travels beside the rows of four ranks. A block has 16 warps.
  { ...base, name: "as few tokens as one block sends, and more", hidden: 4096, tokens: [1, 2, 4, 3] },
  { ...base, name: "as many tokens as all blocks have warps for", hidden: 4096, tokens: [32, 31, 16, 15] },
  { ...base, name: "few tokens in FP8", hidden: 7168, tokens: [1, 2, 9, 5], payload: { kind: "fp8" } },
  { ...base, name: "few tokens, the last piece of 16 bytes", hidden: 1032, tokens: [1, 2, 3, 8] },
  { ...base, name: "rows of 64 KiB", hidden: 32768, tokens: [3, 2, 0, 1] },
];

/** Once, since the reference takes its time. */
const big: readonly (WorldSpec & { layout: "rank" | "expert" })[] = [
  { ...base, name: "4096 tokens a rank", tokens: [4096, 4096, 0, 4095], layout: "rank" },
  { ...base, name: "4096 tokens a rank, skewed", tokens: [4096, 1, 4096, 4095], routing: "skewed", layout: "expert" },
  {
    name: "4096 tokens of hidden 7168",
    numRanks: 2,
    numExperts: 8,
    numTopk: 2,
    hidden: 7168,
    tokens: [4096, 4096],
    layout: "rank",
  },
];

runLowLatencySizes({ name: "cuda", newWorld, skip: noCudaLowLatency });
runSizes({ name: "cuda", newWorld, skip: noCuda });
runMostTokens({ name: "cuda", newWorld, skip: noCuda });

suite("cuda: sizes", noCuda, () => {
  for (const spec of worlds) {
    test(spec.name, { timeout: 60_000 }, () => inEveryWay(newWorld, spec));
  }
  for (const { layout, ...spec } of big) {
    test(`${spec.name}, ${layout} layout`, { timeout: 120_000 }, () => thereAndBack(newWorld, spec, layout));
  }
});
