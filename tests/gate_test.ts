/**
 * Gates: small routings worked out by hand, ties, and drawn logits against an independent choice in f64.
 */
import { assert, assertEquals, assertThrows } from "@std/assert";
import { describe, test } from "node:test";
import { gateDeepSeekV3, gateSoftmax } from "../lib/reference/mod.ts";
import { Random } from "./support/random.ts";

const f32 = (...x: number[]): Float32Array => Float32Array.from(x);
const near = (a: number, b: number): boolean => Math.abs(a - b) <= 1e-6 * Math.max(1, Math.abs(b));

describe("DeepSeek-V3 gate", () => {
  const small = { numExperts: 6, numGroups: 3, numTopkGroups: 2, numTopk: 2, scale: 1 };

  test("groups are chosen by their two best, so the best expert can lose", () => {
    // Group 0 has the best expert, groups 1 and 2 the better pairs.
    const { topkIdx, topkWeights } = gateDeepSeekV3(f32(1.5, -9, 1, 1.2, 1.1, 1), 1, small);
    assertEquals([...topkIdx], [3, 4]);
    const [a, b] = [1 / (1 + Math.exp(-1.2)), 1 / (1 + Math.exp(-1.1))];
    assert(near(topkWeights[0]!, a / (a + b)) && near(topkWeights[1]!, b / (a + b)));
  });

  test("the bias chooses but does not weigh", () => {
    const bias = f32(0, 0, 0, 0, 5, 4);
    const { topkIdx, topkWeights } = gateDeepSeekV3(f32(1, 1, 1, 1, 0, 0), 1, { ...small, bias });
    assertEquals([...topkIdx], [4, 5]);
    assertEquals([...topkWeights], [0.5, 0.5]);
  });

  test("ties: the lower group and the lower expert win", () => {
    const { topkIdx } = gateDeepSeekV3(new Float32Array(256), 1);
    assertEquals([...topkIdx], [0, 1, 2, 3, 4, 5, 6, 7]);
    assertEquals([...gateDeepSeekV3(f32(0, 0, 0, 0, 3, 0), 1, { ...small, numTopk: 3 }).topkIdx], [4, 0, 1]);
  });

  test("negative biased scores of open groups beat closed groups", () => {
    const bias = f32(-9, -9, -8, -8, -7, -7);
    assertEquals([...gateDeepSeekV3(new Float32Array(6), 1, { ...small, numTopk: 4, bias }).topkIdx], [4, 5, 2, 3]);
  });

  test("drawn logits: at most 4 groups, 8 different experts, weights that add up to the scale", () => {
    const random = new Random(11);
    const numTokens = 200;
    const logits = Float32Array.from({ length: numTokens * 256 }, () => random.float() * 8 - 4);
    const bias = Float32Array.from({ length: 256 }, () => random.float() - 0.5);
    const { topkIdx, topkWeights } = gateDeepSeekV3(logits, numTokens, { bias });
    for (let token = 0; token < numTokens; token++) {
      const experts = [...topkIdx.subarray(token * 8, token * 8 + 8)];
      const score = (e: number): number => 1 / (1 + Math.exp(-logits[token * 256 + e]!));
      const biased = Array.from({ length: 256 }, (_, e) => score(e) + bias[e]!);
      const strength = (g: number): number =>
        biased.slice(g * 32, g * 32 + 32).toSorted((a, b) => b - a).slice(0, 2).reduce((a, b) => a + b);
      const groups = [0, 1, 2, 3, 4, 5, 6, 7].toSorted((a, b) => strength(b) - strength(a)).slice(0, 4);
      const open = biased.flatMap((s, e) => groups.includes(e >> 5) ? [{ s, e }] : []);
      assertEquals(experts, open.toSorted((a, b) => b.s - a.s).slice(0, 8).map(({ e }) => e));
      const total = experts.reduce((sum, e) => sum + score(e), 0);
      experts.forEach((e, k) => assert(near(topkWeights[token * 8 + k]!, 2.5 * score(e) / total)));
    }
  });

  test("sigmoids at the ends", () => {
    const { topkWeights } = gateDeepSeekV3(f32(1000, -1000, Infinity, -Infinity, 0, 0), 1, { ...small, numTopk: 4 });
    assertEquals([...topkWeights].every((w) => w >= 0 && w <= 1), true);
  });

  test("refuses what is not possible", () => {
    assertThrows(() => gateDeepSeekV3(new Float32Array(255), 1), RangeError, "255 logits are not 1 tokens of 256");
    assertThrows(() => gateDeepSeekV3(new Float32Array(6), 1, { ...small, numTopk: 5 }), RangeError, "2 of 3 groups");
    assertThrows(() => gateDeepSeekV3(new Float32Array(6), 1, { ...small, numGroups: 4 }), RangeError, "not possible");
  });
});

describe("softmax gate", () => {
  test("probabilities of the best, best first", () => {
    const logits = f32(0, Math.log(2), Math.log(5), -Infinity);
    const plain = gateSoftmax(logits, 1, { numExperts: 4, numTopk: 2 });
    assertEquals([...plain.topkIdx], [2, 1]);
    assert(near(plain.topkWeights[0]!, 5 / 8) && near(plain.topkWeights[1]!, 2 / 8));
    const normalized = gateSoftmax(logits, 1, { numExperts: 4, numTopk: 2, normalize: true });
    assert(near(normalized.topkWeights[0]!, 5 / 7) && near(normalized.topkWeights[1]!, 2 / 7));
  });

  test("ties go to the lower index, NaN comes last", () => {
    assertEquals([...gateSoftmax(f32(1, 3, 3, 1), 1, { numExperts: 4, numTopk: 3 }).topkIdx], [1, 2, 0]);
    assertEquals([...gateSoftmax(f32(NaN, -5, 0), 1, { numExperts: 3, numTopk: 2 }).topkIdx], [2, 1]);
  });

  test("tokens do not mix", () => {
    const { topkIdx } = gateSoftmax(f32(1, 2, 2, 1), 2, { numExperts: 2, numTopk: 1 });
    assertEquals([...topkIdx], [1, 0]);
    assertThrows(
      () => gateSoftmax(f32(1), 1, { numExperts: 1, numTopk: 2 }),
      RangeError,
      "numTopk is 2, there are 1 experts",
    );
  });
});

test("every engine gives the same bits", () => {
  const random = new Random(12);
  const logits = Float32Array.from({ length: 64 * 256 }, () => random.float() * 20 - 10);
  const hash = (weights: Float32Array): number =>
    new Uint32Array(weights.buffer).reduce((h, word) => Math.imul(h ^ word, 0x01000193) >>> 0, 0x811c9dc5);
  const softmax = gateSoftmax(logits, 64, { numExperts: 256, numTopk: 8 }).topkWeights;
  assertEquals([hash(gateDeepSeekV3(logits, 64).topkWeights), hash(softmax)], [3540707460, 4089749930]);
});
