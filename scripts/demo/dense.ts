/**
 * The same layer without any communication: what the modes' results are compared with. In: rows and routing of all tokens
 * that this process has. Out: the output with each rounding where a mode rounds, and without any. Called by
 * `scripts/demo.ts`; it knows the ranks only as the borders between partial sums.
 */
import { bf16FromF32, castFromFp8, castToFp8, f32FromBf16 } from "../../lib/dtype.ts";
import { expertRank } from "../../lib/layout.ts";
import type { Routing } from "../../lib/reference/gate.ts";
import { throughExperts } from "./experts.ts";
import { type Layer, NUM_EXPERTS, NUM_TOPK } from "./layer.ts";
import type { Progress } from "./progress.ts";

/** The dense layer's output. */
export interface DenseResult {
  /** bf16 [tokens, hidden], rounded where modes with these steps round. */
  readonly rounded: Uint16Array;
  /** f32 [tokens, hidden]: the sum of the weighted f32 outputs. */
  readonly unrounded: Float32Array;
}

/** Where to round: as `Mode` says, for `numRanks` ranks. */
export interface Rounding {
  readonly fp8: boolean;
  readonly sumsPerRank: boolean;
  readonly numRanks: number;
}

/** Tokens computed at once: bounds the memory for the outputs of all their experts. */
const CHUNK = 2048;

/** Computes the layer for bf16 [tokens, hidden]. */
export async function denseLayer(
  layer: Layer,
  input: { x: Uint16Array; routing: Routing },
  options: Rounding & { progress: Progress },
): Promise<DenseResult> {
  const { hidden } = layer, numTokens = input.x.length / hidden;
  const result = { rounded: new Uint16Array(numTokens * hidden), unrounded: new Float32Array(numTokens * hidden) };
  options.progress.begin("dense check", NUM_EXPERTS * Math.ceil(numTokens / CHUNK));
  for (let begin = 0; begin < numTokens; begin += CHUNK) {
    const count = Math.min(CHUNK, numTokens - begin);
    const x = input.x.subarray(begin * hidden, (begin + count) * hidden);
    const topkIdx = input.routing.topkIdx.subarray(begin * NUM_TOPK, (begin + count) * NUM_TOPK);
    const weights = input.routing.topkWeights.subarray(begin * NUM_TOPK, (begin + count) * NUM_TOPK);
    const outputs = await allOutputs(layer, { x: options.fp8 ? throughFp8(x, hidden) : x, topkIdx }, options.progress);
    const reduce = options.sumsPerRank ? sumPerRank : sumPerEntry;
    const { sums, unrounded } = reduce({ outputs, topkIdx, weights, hidden, numRanks: options.numRanks });
    result.rounded.set(bf16FromF32(sums), begin * hidden);
    result.unrounded.set(unrounded, begin * hidden);
  }
  options.progress.end();
  return result;
}

/** What is left of bf16 rows that were cast to FP8 and back. */
function throughFp8(x: Uint16Array, hidden: number): Uint16Array {
  const rows = x.length / hidden, { data, scales } = castToFp8(x, rows, hidden);
  return castFromFp8(data, scales, rows, hidden);
}

/** f32 [tokens * numTopk, hidden]: the output of each entry's expert. */
async function allOutputs(
  layer: Layer,
  { x, topkIdx }: { x: Uint16Array; topkIdx: Int32Array },
  progress: Progress,
): Promise<Float32Array> {
  const { hidden } = layer, all = new Float32Array(topkIdx.length * hidden);
  const experts = { first: 0, count: NUM_EXPERTS };
  await throughExperts(layer, { x: f32FromBf16(x), topkIdx, numTopk: NUM_TOPK, experts }, {
    progress,
    visit: (entries, outputs) =>
      entries.forEach((entry, i) => all.set(outputs.subarray(i * hidden, (i + 1) * hidden), entry * hidden)),
  });
  return all;
}

interface Entries {
  readonly outputs: Float32Array;
  readonly topkIdx: Int32Array;
  readonly weights: Float32Array;
  readonly hidden: number;
  readonly numRanks: number;
}

/** Each expert's output is rounded to bf16; the weighted outputs are added in the order of the token's entries. */
function sumPerEntry({ outputs, weights, hidden }: Entries): { sums: Float32Array; unrounded: Float32Array } {
  const rounded = f32FromBf16(bf16FromF32(outputs)), tokens = weights.length / NUM_TOPK;
  const sums = new Float32Array(tokens * hidden), unrounded = new Float32Array(tokens * hidden);
  weights.forEach((weight, entry) => {
    const to = Math.floor(entry / NUM_TOPK) * hidden, from = entry * hidden;
    for (let c = 0; c < hidden; c++) {
      sums[to + c]! += Math.fround(weight * rounded[from + c]!); // the array rounds each sum to f32
      unrounded[to + c]! += weight * outputs[from + c]!;
    }
  });
  return { sums, unrounded };
}

/** A rank's weighted outputs are added in ascending order of its experts and rounded to bf16; ranks are added ascending. */
function sumPerRank(entries: Entries): { sums: Float32Array; unrounded: Float32Array } {
  const { outputs, topkIdx, weights, hidden, numRanks } = entries, tokens = weights.length / NUM_TOPK;
  const sums = new Float32Array(tokens * hidden), unrounded = new Float32Array(tokens * hidden);
  const partial = new Float32Array(hidden);
  for (let token = 0; token < tokens; token++) {
    const own = Array.from({ length: NUM_TOPK }, (_, k) => token * NUM_TOPK + k);
    own.sort((a, b) => topkIdx[a]! - topkIdx[b]!);
    const ranks = own.map((entry) => expertRank(topkIdx[entry]!, NUM_EXPERTS, numRanks));
    own.forEach((entry, i) => {
      if (ranks[i] !== ranks[i - 1]) partial.fill(0);
      for (let c = 0; c < hidden; c++) {
        partial[c]! += Math.fround(weights[entry]! * outputs[entry * hidden + c]!);
        unrounded[token * hidden + c]! += weights[entry]! * outputs[entry * hidden + c]!;
      }
      if (ranks[i] === ranks[i + 1]) return;
      const rounded = f32FromBf16(bf16FromF32(partial));
      for (let c = 0; c < hidden; c++) sums[token * hidden + c]! += rounded[c]!;
    });
  }
  return { sums, unrounded };
}
