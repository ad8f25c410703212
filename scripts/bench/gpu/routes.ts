/**
 * Where every row of a world goes, computed on the host without the library: what results are checked against, and what the
 * naive way knows beforehand.
 *
 * In: a shape. Out: a routing as published figures have it (different experts, uniformly), and for both layouts the place of
 * each row. Called by the phases. It does what lib/reference does, for sizes that the reference takes minutes for; a test
 * holds one against the other.
 */
import { expertRank, localExperts } from "../../../lib/layout.ts";
import { Random } from "../../../tests/support/random.ts";

/** The shape of a world. */
export interface Shape {
  readonly ranks: number;
  /** Tokens of each rank. */
  readonly tokens: number;
  readonly topk: number;
  readonly experts: number;
}

/** Where the rows of one layout go. */
export interface Route {
  readonly layout: "rank" | "expert";
  /** Hops a token has at most. */
  readonly width: number;
  /** For each source rank i32 [tokens, width]: the rank that a hop goes to, -1 = none; ascending, or in top-k order. */
  readonly rankOf: readonly Int32Array[];
  /** Beside it, the row there. */
  readonly rowOf: readonly Int32Array[];
  /** For each rank, row by row: source rank * tokens + token. */
  readonly sources: readonly Int32Array[];
  /** Rows of all ranks. */
  readonly rows: number;
}

/** A routing and its places. */
export interface Routing extends Shape {
  readonly topkIdx: readonly Int32Array[];
  readonly topkWeights: readonly Float32Array[];
  readonly rank: Route;
  readonly expert: Route;
  /** For each rank, entries of each of its experts. */
  readonly perExpert: readonly (readonly number[])[];
}

/** Makes a routing; the same shape and seed give the same. */
export function makeRouting(shape: Shape, seed = 1): Routing {
  const { ranks, tokens, topk, experts } = shape;
  const random = new Random(seed);
  const taken = new Int32Array(experts).fill(-1);
  let draw = 0;
  const topkIdx = Array.from({ length: ranks }, () => {
    const out = new Int32Array(tokens * topk);
    for (let i = 0; i < out.length; i++) {
      if (i % topk === 0) draw++;
      let expert = random.uint32() % experts;
      while (taken[expert] === draw) expert = random.uint32() % experts;
      taken[expert] = draw;
      out[i] = expert;
    }
    return out;
  });
  const topkWeights = topkIdx.map((idx) => Float32Array.from(idx, () => 0.125 + random.float()));
  return { ...shape, topkIdx, topkWeights, ...routesOf(shape, topkIdx) };
}

/** The places of the rows of a routing without -1 and without an expert listed twice. */
export function routesOf(
  { ranks, tokens, topk, experts }: Shape,
  topkIdx: readonly Int32Array[],
): Pick<Routing, "rank" | "expert" | "perExpert"> {
  const owner = Int32Array.from({ length: experts }, (_, e) => expertRank(e, experts, ranks));
  const counts = new Int32Array(experts);
  for (const idx of topkIdx) for (const e of idx) counts[e]!++;
  const perExpert = Array.from({ length: ranks }, (_, r) => {
    const { first, count } = localExperts(experts, ranks, r);
    return [...counts.subarray(first, first + count)];
  });
  const next = new Int32Array(experts); // the next row of each expert
  for (let e = 1; e < experts; e++) next[e] = owner[e] === owner[e - 1] ? next[e - 1]! + counts[e - 1]! : 0;

  const width = Math.min(topk, ranks);
  const filled = (n: number): Int32Array[] => topkIdx.map(() => new Int32Array(tokens * n).fill(-1));
  const byRank = { rankOf: filled(width), rowOf: filled(width), rows: perExpert.map((): number[] => []) };
  const byExpert = {
    rankOf: filled(topk),
    rowOf: filled(topk),
    rows: perExpert.map((all) => new Int32Array(all.reduce((a, b) => a + b, 0))),
  };
  for (const [s, idx] of topkIdx.entries()) {
    for (let token = 0; token < tokens; token++) {
      const source = s * tokens + token;
      let there = 0n;
      for (let i = token * topk; i < (token + 1) * topk; i++) {
        const rank = owner[idx[i]!]!, row = next[idx[i]!]!++;
        there |= 1n << BigInt(rank);
        byExpert.rankOf[s]![i] = rank;
        byExpert.rowOf[s]![i] = row;
        byExpert.rows[rank]![row] = source;
      }
      for (let rank = 0, hop = token * width; rank < ranks; rank++) {
        if ((there >> BigInt(rank) & 1n) === 0n) continue;
        byRank.rankOf[s]![hop] = rank;
        byRank.rowOf[s]![hop++] = byRank.rows[rank]!.length;
        byRank.rows[rank]!.push(source);
      }
    }
  }
  const total = (rows: readonly { length: number }[]): number => rows.reduce((sum, { length }) => sum + length, 0);
  return {
    perExpert,
    rank: {
      layout: "rank",
      width,
      rankOf: byRank.rankOf,
      rowOf: byRank.rowOf,
      sources: byRank.rows.map((rows) => Int32Array.from(rows)),
      rows: total(byRank.rows),
    },
    expert: {
      layout: "expert",
      width: topk,
      rankOf: byExpert.rankOf,
      rowOf: byExpert.rowOf,
      sources: byExpert.rows,
      rows: total(byExpert.rows),
    },
  };
}

/** The most rows that a rank receives. */
export const mostRows = (route: Route): number => Math.max(1, ...route.sources.map(({ length }) => length));

/** The most rows that one device sends to others, or gets from them. `deviceOf`: of each rank. */
export function busiestLink(route: Route, deviceOf: readonly number[]): number {
  const sent = new Map<number, number>(), got = new Map<number, number>();
  const add = (to: Map<number, number>, device: number): void => void to.set(device, (to.get(device) ?? 0) + 1);
  for (const [source, ranks] of route.rankOf.entries()) {
    const from = deviceOf[source]!;
    for (const rank of ranks) {
      if (rank < 0 || deviceOf[rank] === from) continue;
      add(sent, from);
      add(got, deviceOf[rank]!);
    }
  }
  return Math.max(0, ...sent.values(), ...got.values());
}
