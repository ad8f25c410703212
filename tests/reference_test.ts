/**
 * The reference: hand-written expectations for the tiny world, the case suite with the reference as its own subject, and brute-force
 * checks that share no code with it.
 */
import { assertEquals, assertThrows } from "@std/assert";
import { describe, test } from "node:test";
import { bf16FromF32, f32FromBf16 } from "../lib/dtype.ts";
import { referenceCombine, referenceDispatch, referenceDispatchLayout } from "../lib/reference/mod.ts";
import { referenceLowLatencyCombine, referenceLowLatencyDispatch } from "../lib/reference/mod.ts";
import { checkReceived } from "./support/brute_force.ts";
import { runCombineCases, runDispatchCases, runLowLatencyCases } from "./support/cases.ts";
import { newReferenceWorld } from "./support/driver.ts";
import { enoughRows, namedWorlds, tinyWorld } from "./support/worlds.ts";

const f32 = (...values: number[]): Float32Array => Float32Array.from(values);
const bf16 = (...values: number[]): Uint16Array => bf16FromF32(Float32Array.from(values));

describe("tiny world", () => {
  const world = tinyWorld(); // tokens a = 0, b = 1 of rank 0, c = 0 of rank 1, d = 0 of rank 3; 2 tokens a rank at most
  const options = { numExperts: 8, numTopk: 2, maxTokensPerRank: 2 };
  const [a, b, c, d] = [0, 1, 2, 6];

  test("rank layout", () => {
    const { ranks } = referenceDispatch(world.inputs, { ...options, expertAlignment: 4 });
    assertEquals(ranks.map((rank) => [...rank.srcIdx]), [[a], [a, c, d], [d], [b]]);
    assertEquals(ranks.map((rank) => [...rank.topkIdx!].map(Number)), [[0, -1], [-1, 1, 1, -1, 1, -1], [-1, 0], [
      1,
      0,
    ]]);
    assertEquals(ranks.map((rank) => [...rank.numTokensPerExpert]), [[4, 0], [0, 4], [4, 0], [4, 4]]);
    assertEquals(ranks.map((rank) => [...rank.numTokensPerRank]), [[1, 0, 0, 0], [1, 1, 0, 1], [0, 0, 0, 1], [
      1,
      0,
      0,
      0,
    ]]);
    const weight = (rank: number, entry: number): number => world.inputs[rank]!.topkWeights![entry]!;
    assertEquals([...ranks[1]!.topkWeights!], [0, weight(0, 1), weight(1, 0), 0, weight(3, 0), 0]);
    assertEquals(ranks[2]!.x, world.inputs[3]!.x);
  });

  test("expert layout", () => {
    const { ranks } = referenceDispatch(world.inputs, { ...options, layout: "expert", expertAlignment: 2 });
    assertEquals(ranks.map((rank) => [...rank.srcIdx]), [[a, -1], [a, c, d, -1], [d, -1], [b, -1, b, -1]]);
    assertEquals(ranks.map((rank) => [...rank.numTokensPerExpert]), [[2, 0], [0, 4], [2, 0], [2, 2]]);
    assertEquals(ranks.map((rank) => [rank.numTokens, rank.numRows]), [[1, 2], [3, 4], [1, 2], [1, 4]]);
    const weights = world.inputs[0]!.topkWeights!;
    assertEquals([...ranks[3]!.topkWeights!], [weights[3]!, 0, weights[2]!, 0]); // expert 6 is b's second entry
  });

  test("layout counts", () => {
    const shape = { numTokens: 2, numTopk: 2, numExperts: 8, numRanks: 4 };
    const layout = referenceDispatchLayout(world.inputs[0]!.topkIdx!, shape);
    assertEquals([...layout.numTokensPerRank], [1, 1, 0, 1]);
    assertEquals([...layout.numTokensPerExpert], [1, 0, 0, 1, 0, 0, 1, 1]);
    assertEquals([...layout.isTokenInRank], [1, 1, 0, 0, 0, 0, 0, 1]);
  });

  test("low latency", () => {
    const ranks = referenceLowLatencyDispatch(world.inputs, options);
    assertEquals(ranks.map((rank) => rank.experts.map((e) => [...e.srcInfo])), [[[0], []], [[], [0, 0, 0]], [[0], []], [
      [1],
      [
        1,
      ],
    ]]);
    assertEquals([...ranks[1]!.layoutRange.slice(4)], [1n, (1n << 32n) | 1n, 2n << 32n, (2n << 32n) | 1n]);
    assertEquals([...ranks[1]!.numTokensPerExpert], [0, 3]);
  });
});

describe("arithmetic of combine", () => {
  const options = { numExperts: 2, numTopk: 2, maxTokensPerRank: 1 };
  const input = { numTokens: 1, x: new Uint8Array(0), rowBytes: 0, topkIdx: Int32Array.of(1, 0) };
  const empty = { ...input, numTokens: 0, topkIdx: new Int32Array(0) };
  const sum = (rows: [number, number], rest: object = {}, layout: "rank" | "expert" = "rank"): number => {
    const { handle } = referenceDispatch([input, empty], { ...options, layout });
    const ranks = rows.map((value, rank) => ({ x: bf16(value), ...(rank === 0 ? rest : {}) }));
    return f32FromBf16(referenceCombine(handle, ranks, { hidden: 1 })[0]!.x)[0]!;
  };

  test("every step is rounded to f32, in order", () => {
    const big = 2 ** 25; // adding 1 to it is lost in f32
    assertEquals(sum([1, -big], { bias0: bf16(big) }), 0); // (big + 1) - big, rank 0 first
    assertEquals(sum([-big, 1], { bias0: bf16(big) }), 1);
    assertEquals(sum([1, -big], { bias0: bf16(big) }, "expert"), 1); // k 0 is expert 1, on rank 1
    assertEquals(sum([1, 0], { bias0: bf16(big), bias1: bf16(-big) }), 1);
    assertEquals(sum([3, 5], { weights: Float32Array.of(10, 100) }, "expert"), 350);
    const tenth = Math.fround(0.1);
    const weights = Float32Array.of(-Math.fround(tenth * 3), tenth);
    assertEquals(sum([3, 1], { weights }, "expert"), 0); // a fused multiply-add would leave what the product lost
  });

  test("zeros", () => {
    assertEquals(Object.is(sum([-0, -0]), 0), true);
    assertEquals(Object.is(sum([-0, -0], { bias0: bf16(-0) }), -0), true);
  });

  test("infinities cancel to NaN, of one pattern", () => {
    const { handle } = referenceDispatch([input, empty], options);
    const out = referenceCombine(handle, [{ x: bf16(Infinity) }, { x: bf16(-Infinity) }], { hidden: 1 });
    assertEquals([...out[0]!.x], [0x7fff]);
  });

  test("low latency: every step is rounded, in ascending k", () => {
    const tenth = Math.fround(0.1);
    const sum = (topkIdx: number[], weights: number[], rows: [number, number]): number => {
      const input = { numTokens: 1, topkIdx: Int32Array.from(topkIdx), topkWeights: Float32Array.from(weights) };
      const ranks = [{ ...input, x: [bf16(rows[0]), bf16(rows[1])] }];
      return f32FromBf16(referenceLowLatencyCombine(ranks, { ...options, numTopk: weights.length, hidden: 1 })[0]!)[0]!;
    };
    assertEquals(sum([0, 1], [-Math.fround(tenth * 3), tenth], [1, 3]), 0); // not fused
    const listed = { numTokens: 1, topkIdx: Int32Array.of(1, 0, 1), x: [bf16(-(2 ** 25)), bf16(1, 2 ** 25)] };
    const more = { ...options, numTopk: 3, maxTokensPerRank: 3, hidden: 1 };
    // k 0 is 1, k 1 is -2 ** 25, which swallows it, k 2 is 2 ** 25.
    assertEquals([...f32FromBf16(referenceLowLatencyCombine([listed], more)[0]!)], [0]);
    const other = { ...listed, topkIdx: Int32Array.of(1, 1, 0), x: [bf16(1), bf16(-(2 ** 25), 2 ** 25)] };
    assertEquals([...f32FromBf16(referenceLowLatencyCombine([other], more)[0]!)], [1]);
  });

  test("rows and weights on masked ranks are left out", () => {
    for (const layout of ["rank", "expert"] as const) {
      const { handle } = referenceDispatch([input, empty], { ...options, layout });
      const topkWeights = layout === "rank" ? [f32(0, 3), f32(5, 0)] : [f32(3), f32(5)];
      const ranks = [{ x: bf16(2), topkWeights: topkWeights[0]! }, { x: bf16(7), topkWeights: topkWeights[1]! }];
      const [all] = referenceCombine(handle, ranks, { hidden: 1 });
      assertEquals([...f32FromBf16(all!.x), ...all!.topkWeights!], [9, 5, 3]);
      const [masked] = referenceCombine(handle, ranks, { hidden: 1, masked: [1] });
      assertEquals([...f32FromBf16(masked!.x), ...masked!.topkWeights!], [2, 0, 3]);
    }
  });

  test("low latency without weights counts every entry once", () => {
    const topkIdx = Int32Array.of(0, 0);
    const ranks = [{ numTokens: 1, topkIdx, x: [bf16(2, 5), bf16()] }];
    const [out] = referenceLowLatencyCombine(ranks, { ...options, hidden: 1 });
    assertEquals([...f32FromBf16(out!)], [7]);
  });
});

describe("refusals of the reference", () => {
  const { inputs } = tinyWorld();
  const options = { numExperts: 8, numTopk: 2, maxTokensPerRank: 2 };
  const dispatch = (more: object) => () => referenceDispatch(inputs, { ...options, ...more });
  test("say what was being done, with the values", () => {
    assertThrows(
      dispatch({ maxTokensPerRank: 1 }),
      RangeError,
      "Cannot dispatch: rank 0 has 2 tokens, the buffer holds 1",
    );
    assertThrows(dispatch({ maxRecvTokens: 2 }), RangeError, "rank 1 would receive 3 rows, its buffer holds 2");
    assertThrows(dispatch({ numExperts: 7 }), RangeError, "entry 0 of token 1 of rank 0 is expert 7, there are 7");
    assertThrows(dispatch({ numTopk: 3 }), TypeError, "topkIdx of rank 0 has 4 elements, not 6");
    assertThrows(dispatch({ expertAlignment: 0 }), RangeError, "expertAlignment is 0");
    const { handle } = referenceDispatch(inputs, options);
    assertThrows(dispatch({ cached: handle }), TypeError, "rank 0 has a routing and a handle with one");
    assertThrows(dispatch({ cached: handle, layout: "expert" }), RangeError, "but the handle has layout rank");
    const x = new Uint16Array(16);
    assertThrows(
      () => referenceCombine(handle, inputs.map(() => ({ x })), { hidden: 16 }),
      TypeError,
      "x of rank 1 has 16",
    );
  });
});

describe("brute force", () => {
  for (const world of namedWorlds()) {
    test(world.name, () => {
      for (const layout of ["rank", "expert"] as const) {
        for (const expertAlignment of [1, 4]) {
          const call = { layout, expertAlignment, maxRecvTokens: enoughRows(world, expertAlignment) };
          checkReceived(world, referenceDispatch(world.inputs, { ...world, ...call }).ranks, call);
        }
      }
    });
  }
});

const subject = { name: "reference", newWorld: newReferenceWorld };
runDispatchCases(subject);
runCombineCases(subject);
runLowLatencyCases(subject);
