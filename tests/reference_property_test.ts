/**
 * Properties of the reference over drawn worlds: what it receives holds up to brute force, what it combines is the dense sum, and modes
 * agree with each other. fast-check draws shapes and routings, shrinks what fails and prints the seed.
 */
import { assertEquals } from "@std/assert";
import * as fc from "fast-check";
import { test } from "node:test";
import { bytesOf, castFromFp8, castToFp8, f32FromBf16, viewAs } from "../lib/dtype.ts";
import { referenceCombine, referenceDispatch, referenceDispatchLayout } from "../lib/reference/mod.ts";
import { referenceLowLatencyCombine, referenceLowLatencyDispatch } from "../lib/reference/mod.ts";
import { checkReceived, dealExperts, denseSum } from "./support/brute_force.ts";
import { expertLayoutOutput, lowLatencyOutput, rankLayoutOutput } from "./support/experts.ts";
import { runSeed } from "./support/random.ts";
import { enoughRows, makeWorld, type TestWorld } from "./support/worlds.ts";

const seed = runSeed() | 0;
const run = { seed, numRuns: 120 };

/** Worlds of any shape; sums in them are exact. */
const worlds: fc.Arbitrary<TestWorld> = fc.record({
  tokens: fc.array(fc.nat({ max: 12 }), { minLength: 1, maxLength: 8 }),
  numExperts: fc.integer({ min: 1, max: 20 }),
  numTopk: fc.integer({ min: 1, max: 8 }),
  routing: fc.constantFrom("distinct", "mixed", "skewed", "oneExpert", "oneRank", "none"),
  dropped: fc.constantFrom(0, 0.3),
  topkType: fc.constantFrom("i32", "i64"),
  weights: fc.boolean(),
  seed: fc.nat(),
}).map(({ seed, ...spec }) =>
  makeWorld({ ...spec, name: "drawn", numRanks: spec.tokens.length, hidden: 16, values: "integers" }, seed)
);
const alignments = fc.constantFrom(1, 2, 3, 8);

const property = (name: string, holds: (world: TestWorld, expertAlignment: number) => void): void => {
  test(`${name} (seed ${seed})`, () => fc.assert(fc.property(worlds, alignments, holds), run));
};

property("what arrives is what was sent, in order, with nothing lost", (world, expertAlignment) => {
  for (const layout of ["rank", "expert"] as const) {
    const call = { layout, expertAlignment, maxRecvTokens: enoughRows(world, expertAlignment) };
    checkReceived(world, referenceDispatch(world.inputs, { ...world, ...call }).ranks, call);
  }
});

property("combine is the dense sum, in either layout and in low latency", (world, expertAlignment) => {
  const dense = world.inputs.map((_, rank) => denseSum(world, rank));
  for (const layout of ["rank", "expert"] as const) {
    const options = { ...world, layout, expertAlignment, maxRecvTokens: enoughRows(world, expertAlignment) };
    const { ranks, handle } = referenceDispatch(world.inputs, options);
    const outputs = layout === "rank" ? rankLayoutOutput : expertLayoutOutput;
    const inputs = ranks.map((recv, rank) => {
      const { topkWeights } = world.inputs[rank]!;
      const weights = layout === "expert" && topkWeights !== undefined ? { weights: topkWeights } : {};
      return { x: outputs(world, rank, recv), ...weights };
    });
    assertEquals(referenceCombine(handle, inputs, world).map((output) => output.x), dense);
  }
  const options = { ...world, maxTokensPerRank: world.maxTokensPerRank * world.numTopk };
  const inputs = referenceLowLatencyDispatch(world.inputs, options).map((recv, rank) => {
    const { numTokens, topkIdx, topkWeights } = world.inputs[rank]!;
    const x = lowLatencyOutput(world, rank, recv);
    return { numTokens, topkIdx: topkIdx!, x, ...(topkWeights ? { topkWeights } : {}) };
  });
  assertEquals(referenceLowLatencyCombine(inputs, options), dense);
});

property("weights that travel there and back are the weights", (world, expertAlignment) => {
  if (!world.weights) return;
  for (const layout of ["rank", "expert"] as const) {
    const options = { ...world, layout, expertAlignment, maxRecvTokens: enoughRows(world, expertAlignment) };
    const { ranks, handle } = referenceDispatch(world.inputs, options);
    const inputs = ranks.map(({ numRows, topkWeights }) => ({
      x: new Uint16Array(numRows),
      topkWeights: topkWeights!,
    }));
    referenceCombine(handle, inputs, { hidden: 1 }).forEach(({ topkWeights }, rank) => {
      const { topkIdx, topkWeights: sent } = world.inputs[rank]!;
      assertEquals(topkWeights, sent!.map((w, entry) => Number(topkIdx![entry]) < 0 ? 0 : w));
    });
  }
});

property("layout counts, expert groups and low latency agree", (world) => {
  const { ranks } = referenceDispatch(world.inputs, { ...world, layout: "expert", maxRecvTokens: enoughRows(world) });
  const lowLatency = referenceLowLatencyDispatch(world.inputs, {
    ...world,
    maxTokensPerRank: world.maxTokensPerRank * world.numTopk,
  });
  const layouts = world.inputs.map(({ topkIdx, numTokens }) =>
    referenceDispatchLayout(topkIdx!, { ...world, numTokens })
  );
  ranks.forEach((recv, rank) => {
    assertEquals([...recv.numTokensPerRank], layouts.map((layout) => layout.numTokensPerRank[rank]));
    assertEquals(lowLatency[rank]!.numTokensPerExpert, recv.numTokensPerExpert);
    // Expert groups, without padding, laid end to end are low latency's experts.
    const packed = lowLatency[rank]!.experts.flatMap((rows) => [...rows.x]);
    assertEquals(packed, [...recv.x]);
  });
  const perExpert = dealExperts(world.numExperts, world.numRanks).map((_, expert) =>
    layouts.reduce((sum, layout) => sum + layout.numTokensPerExpert[expert]!, 0)
  );
  assertEquals(ranks.flatMap((recv) => [...recv.numTokensPerExpert]), perExpert);
});

property("a masked rank is a world without its tokens and experts", (world, expertAlignment) => {
  const gone = world.numRanks - 1;
  const owners = dealExperts(world.numExperts, world.numRanks);
  const inputs = world.inputs.map((input, rank) => {
    const topkIdx = input.topkIdx!.map((expert: number | bigint) => {
      const dropped = rank === gone || owners[Number(expert)] === gone;
      return (dropped ? (typeof expert === "bigint" ? -1n : -1) : expert) as never;
    });
    return { ...input, topkIdx } as typeof input;
  });
  for (const layout of ["rank", "expert"] as const) {
    const options = { ...world, layout, expertAlignment, maxRecvTokens: enoughRows(world, expertAlignment) };
    const masked = referenceDispatch(world.inputs, { ...options, masked: [gone] }).ranks.slice(0, gone);
    const without = referenceDispatch(inputs, options).ranks.slice(0, gone);
    // Rank layout passes no index or weight of an entry on another rank, so even those agree.
    assertEquals(masked, without);
  }
  const options = { ...world, maxTokensPerRank: world.maxTokensPerRank * world.numTopk };
  const roundTrip = (of: TestWorld, options: TestWorld & { masked?: number[] }): unknown => {
    const recv = referenceLowLatencyDispatch(of.inputs, options);
    const inputs = recv.map((received, rank) => {
      const { numTokens, topkIdx } = of.inputs[rank]!;
      return { numTokens, topkIdx: topkIdx!, x: lowLatencyOutput(of, rank, received) };
    });
    const sums = referenceLowLatencyCombine(inputs, options);
    assertEquals(recv[gone]!.numTokensPerExpert.every((count) => count === 0), true);
    return [recv.slice(0, gone), sums.slice(0, gone)];
  };
  assertEquals(roundTrip(world, { ...options, masked: [gone] }), roundTrip({ ...world, inputs }, options));
});

test(`FP8 casts low latency makes are those of the dtype module (seed ${seed})`, () => {
  fc.assert(
    fc.property(fc.integer({ min: 1, max: 40 }), fc.boolean(), fc.boolean(), fc.nat(), (blocks, round, ue8m0, seed) => {
      const hidden = 16 * blocks;
      const world = makeWorld({ name: "fp8", numRanks: 1, numExperts: 1, numTopk: 1, hidden, tokens: [3] }, seed);
      const options = { ...world, fp8: true, round, ue8m0: round && ue8m0 };
      const [recv] = referenceLowLatencyDispatch(world.inputs, options);
      const x = viewAs("bf16", world.inputs[0]!.x);
      const { data, scales } = castToFp8(x, 3, hidden, options);
      assertEquals([recv!.experts[0]!.x, recv!.experts[0]!.scales], [data, bytesOf(scales)]);
      const back = f32FromBf16(castFromFp8(data, scales, 3, hidden));
      const largest = Math.max(...f32FromBf16(x).map(Math.abs));
      f32FromBf16(x).forEach((value, i) => assertEquals(Math.abs(back[i]! - value) <= largest / 14, true));
    }),
    run,
  );
});
