/**
 * What the bench sends: a routing like those of published figures, and rows to carry.
 *
 * In: a shape. Out: the inputs of every rank as the reference takes them, and the counts that the copies of the ceiling and
 * of the naive way are made from. Called by the ops. Tokens choose different experts uniformly, so top-8 of 256 on 8 ranks
 * go to 5.3 ranks each. The routing comes from the worlds of the tests; rows are made here, because there are hundreds of MB.
 */
import { bytesOf } from "../../lib/dtype.ts";
import { expertRank, localExperts } from "../../lib/layout.ts";
import type { RankInput } from "../../lib/reference/mod.ts";
import { Random } from "../../tests/support/random.ts";
import { makeWorld } from "../../tests/support/worlds.ts";

/** The shape of a world. */
export interface Shape {
  readonly ranks: number;
  /** Tokens of each rank. */
  readonly tokens: number;
  readonly hidden: number;
  readonly topk: number;
  readonly experts: number;
}

/** What a rank sends. */
export interface BenchInput extends RankInput {
  readonly topkIdx: Int32Array;
  readonly topkWeights: Float32Array;
  /** `x` as bf16. */
  readonly values: Uint16Array;
}

/** A world of the bench. */
export interface BenchWorld extends Shape {
  /** bf16 rows, routing (i32) and weights of each rank. */
  readonly inputs: readonly BenchInput[];
  /** For each rank i32 [tokens, destinationsPerToken]: the ranks that a token goes to, ascending, then -1. */
  readonly destinations: readonly Int32Array[];
  readonly destinationsPerToken: number;
  /** `counts[s][d]`: tokens of rank s that go to rank d. */
  readonly counts: readonly (readonly number[])[];
  /** Rows that each rank receives in rank layout. */
  readonly rankRows: readonly number[];
  /** Rows that each rank receives in expert layout, and in low-latency mode. */
  readonly expertRows: readonly number[];
}

/** bf16 of either sign and of magnitudes 2 ** -7 to 2: cheap enough to fill hundreds of MB. */
export function randomRows(count: number, seed: number): Uint16Array {
  const words = new Uint32Array(Math.ceil(count / 2));
  let state = new Random(seed).uint32() | 1;
  for (let i = 0; i < words.length; i++) { // xorshift32, two elements a step; then the exponents' upper bits
    state ^= state << 13;
    state ^= state >>> 17;
    state ^= state << 5;
    words[i] = (state & 0x83ff83ff) | 0x3c003c00;
  }
  return new Uint16Array(words.buffer, 0, count);
}

/** Makes a world; the same shape gives the same. */
export function makeBenchWorld(shape: Shape, seed = 1): BenchWorld {
  const { ranks, tokens, hidden, topk, experts } = shape;
  const routed = makeWorld({
    name: "bench",
    numRanks: ranks,
    numExperts: experts,
    numTopk: topk,
    hidden: 16, // its rows are not used
    tokens: Array.from({ length: ranks }, () => tokens),
    routing: "distinct",
  }, seed);
  const inputs = routed.inputs.map(({ topkIdx, topkWeights }, rank): BenchInput => {
    const values = randomRows(tokens * hidden, seed * 1000 + rank);
    return {
      numTokens: tokens,
      x: bytesOf(values),
      values,
      rowBytes: 2 * hidden,
      topkIdx: topkIdx as Int32Array,
      topkWeights: topkWeights!,
    };
  });
  const destinationsPerToken = Math.min(topk, ranks);
  const counts = inputs.map(() => new Array<number>(ranks).fill(0));
  const expertRows = new Array<number>(ranks).fill(0);
  const destinations = inputs.map(({ topkIdx }, source) => {
    const out = new Int32Array(tokens * destinationsPerToken).fill(-1);
    for (let token = 0; token < tokens; token++) {
      const owners = Array.from(
        topkIdx.subarray(token * topk, (token + 1) * topk),
        (expert) => expertRank(expert, experts, ranks),
      );
      for (const rank of owners) expertRows[rank]! += 1;
      const distinct = [...new Set(owners)].sort((a, b) => a - b);
      distinct.forEach((rank, i) => {
        out[token * destinationsPerToken + i] = rank;
        counts[source]![rank]! += 1;
      });
    }
    return out;
  });
  const rankRows = counts.map((_, d) => counts.reduce((sum, ofSource) => sum + ofSource[d]!, 0));
  return { ...shape, inputs, destinations, destinationsPerToken, counts, rankRows, expertRows };
}

/** Sum of numbers. */
export const sum = (numbers: readonly number[]): number => numbers.reduce((a, b) => a + b, 0);

/** Sums of what comes before each: where consecutive pieces begin. */
export function begins(counts: readonly number[]): number[] {
  let at = 0;
  return counts.map((count) => (at += count) - count);
}

/** Where the rows of source s begin among those that rank d received: `[d][s]`, in rank layout. */
export function sourceBegins(world: BenchWorld): number[][] {
  return world.counts.map((_, d) => begins(world.counts.map((ofSource) => ofSource[d]!)));
}

/** For each received row of rank `d` in rank layout, i32 [rows, topk]: the local experts of its entries, -1 for others'. */
export function receivedTopkIdx(world: BenchWorld, d: number): Int32Array {
  const { topk, experts, ranks, tokens } = world;
  const { first, count } = localExperts(experts, ranks, d);
  const out = new Int32Array(world.rankRows[d]! * topk);
  let row = 0;
  for (const { topkIdx } of world.inputs) {
    for (let token = 0; token < tokens; token++) {
      const entries = topkIdx.subarray(token * topk, (token + 1) * topk);
      if (!entries.some((e) => e >= first && e < first + count)) continue;
      entries.forEach((e, k) => out[row * topk + k] = e >= first && e < first + count ? e - first : -1);
      row++;
    }
  }
  return out;
}
