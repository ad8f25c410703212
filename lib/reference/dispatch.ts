/**
 * Dispatch in normal mode: the meaning of `deepep_dispatch`.
 *
 * In: what every rank sends. Out: what every rank receives, and a handle that knows where each row came from. Called by tests
 * as the oracle of every backend, and by the demo. Slow and obvious on purpose: rows are listed, then bytes are copied.
 */
import { alignUp, expertRank, localExperts } from "../layout.ts";
import { allEntries, checkInputs, expertOf, isMasked, type RankInput, type RowLayout } from "./world.ts";
import type { TopkIdx, World } from "./world.ts";

/** How to dispatch; every rank passes the same. */
export interface DispatchOptions extends World {
  /**
   * `rank`: a token once per destination rank, rows ordered by (source rank, token). `expert`: one row per entry of a local
   * expert, grouped by expert, ordered inside by (source rank, token, k), groups padded to `expertAlignment`. Default `rank`.
   */
  readonly layout?: RowLayout;
  /** Per-expert counts are rounded up to it, and in expert layout the groups are. Default 1. */
  readonly expertAlignment?: number;
  /** Rows that a rank can hold, in either layout. Default maxTokensPerRank * ranks. */
  readonly maxRecvTokens?: number;
  /** Rank layout: `topkIdx` gets -1 rows up to `maxRecvTokens`, because the host will not know where to stop. */
  readonly noCpuSync?: boolean;
  /** Take the routing from an earlier dispatch; inputs have none of their own. Layout and alignment must be its. */
  readonly cached?: ReferenceHandle;
}

/** Where a received row came from. */
export interface Row {
  readonly source: number;
  readonly token: number;
  /** The top-k entry; -1 in rank layout, where a row stands for all entries of the token on the rank. */
  readonly k: number;
}

/** Where every token of a dispatch went. */
export interface ReferenceHandle {
  readonly options: DispatchOptions;
  /** The inputs, for their routing. */
  readonly inputs: readonly RankInput[];
  /** Rows of each destination rank, in place; `undefined` is padding. */
  readonly rows: readonly (readonly (Row | undefined)[])[];
}

/** What one rank receives. A masked rank receives nothing. */
export interface RankOutput {
  /** Tokens that came, counted once each, in either layout. */
  readonly numTokens: number;
  /** Rows in use in this layout, padding included. */
  readonly numRows: number;
  /** u8 [numRows, rowBytes]; padding is zero. */
  readonly x: Uint8Array;
  /** u8 [numRows, numScales, scaleElemBytes]; padding is zero. */
  readonly scales?: Uint8Array;
  /** Rank layout: [numRows, numTopk], the index among the rank's own experts, -1 where the entry is another rank's. */
  readonly topkIdx?: TopkIdx;
  /** f32: rank layout [numRows, numTopk], 0 where the entry is another rank's; expert layout [numRows], 0 in padding. */
  readonly topkWeights?: Float32Array;
  /** i32 [numRows]: source rank * maxTokensPerRank + token; -1 in padding. */
  readonly srcIdx: Int32Array;
  /** i32 [numLocalExperts]: entries received, rounded up to `expertAlignment`. */
  readonly numTokensPerExpert: Int32Array;
  /** i32 [numRanks]: tokens from each source rank, counted once each. */
  readonly numTokensPerRank: Int32Array;
  /** i32 [numLocalExperts]: the input's `expertStats` (or 0) plus entries received, not rounded. */
  readonly expertStats: Int32Array;
}

/**
 * Dispatches a world.
 *
 * @throws {TypeError} When an array has not the length of its shape.
 * @throws {RangeError} When a value is outside its range, or a rank would receive more rows than it holds.
 */
export function referenceDispatch(
  ranks: readonly RankInput[],
  options: DispatchOptions,
): { ranks: RankOutput[]; handle: ReferenceHandle } {
  const { layout = "rank", expertAlignment = 1, cached } = options;
  const maxRows = options.maxRecvTokens ?? options.maxTokensPerRank * ranks.length;
  const inputs = cached === undefined ? ranks : withRouting(ranks, options, cached);
  checkInputs("dispatch", inputs, options);
  if (!Number.isInteger(expertAlignment) || expertAlignment < 1) {
    throw new RangeError(`Cannot dispatch: expertAlignment is ${expertAlignment}`);
  }
  if (layout === "expert" && inputs.some((input) => input.topkIdx === undefined)) {
    throw new TypeError("Cannot dispatch: expert layout needs topkIdx");
  }
  const tokens = ranks.map((_, destination) => tokensFor(destination, inputs, options));
  const rows = layout === "rank" ? tokens : ranks.map((_, destination) => expertRows(destination, inputs, options));
  rows.forEach((ofRank, rank) => {
    if (ofRank.length > maxRows) {
      throw new RangeError(
        `Cannot dispatch: rank ${rank} would receive ${ofRank.length} rows, its buffer holds ${maxRows}`,
      );
    }
  });
  return {
    ranks: ranks.map((_, rank) =>
      receive(rank, inputs, { ...options, layout, expertAlignment }, tokens[rank]!, rows[rank]!)
    ),
    handle: { options: { ...options, layout, expertAlignment }, inputs, rows },
  };
}

/** Inputs of a cached dispatch: new rows and weights, the old routing. */
function withRouting(ranks: readonly RankInput[], options: DispatchOptions, cached: ReferenceHandle): RankInput[] {
  const { layout = "rank", expertAlignment = 1 } = options;
  if (layout !== cached.options.layout || expertAlignment !== cached.options.expertAlignment) {
    throw new RangeError(
      `Cannot dispatch: layout ${layout}, alignment ${expertAlignment}, but the handle has ` +
        `layout ${cached.options.layout}, alignment ${cached.options.expertAlignment}`,
    );
  }
  return ranks.map((input, rank) => {
    const old = cached.inputs[rank]!;
    if (input.topkIdx !== undefined || input.isTokenInRank !== undefined) {
      throw new TypeError(`Cannot dispatch: rank ${rank} has a routing and a handle with one`);
    }
    if (input.numTokens !== old.numTokens) {
      throw new RangeError(`Cannot dispatch: rank ${rank} has ${input.numTokens} tokens, its handle ${old.numTokens}`);
    }
    const { topkIdx, isTokenInRank, numTokensPerExpert } = old;
    return { ...input, topkIdx, isTokenInRank, numTokensPerExpert } as RankInput;
  });
}

/** The tokens that go to a rank, once each, ordered by (source rank, token): the rows of rank layout. */
function tokensFor(destination: number, ranks: readonly RankInput[], world: World): Row[] {
  const rows: Row[] = [];
  if (isMasked(world, destination)) return rows;
  for (let source = 0; source < ranks.length; source++) {
    if (isMasked(world, source)) continue;
    for (let token = 0; token < ranks[source]!.numTokens; token++) {
      if (goesTo(ranks[source]!, token, destination, ranks.length, world)) rows.push({ source, token, k: -1 });
    }
  }
  return rows;
}

function goesTo(input: RankInput, token: number, rank: number, numRanks: number, world: World): boolean {
  if (input.topkIdx === undefined) return input.isTokenInRank?.[token * numRanks + rank] ? true : false;
  for (let k = 0; k < world.numTopk; k++) {
    const expert = expertOf(input, world.numTopk, token, k);
    if (expert >= 0 && expertRank(expert, world.numExperts, numRanks) === rank) return true;
  }
  return false;
}

/** The rows of expert layout: the entries of each local expert, each group followed by its padding. */
function expertRows(rank: number, ranks: readonly RankInput[], options: DispatchOptions): (Row | undefined)[] {
  if (isMasked(options, rank)) return [];
  const { first, count } = localExperts(options.numExperts, ranks.length, rank);
  const groups: (Row | undefined)[][] = Array.from({ length: count }, () => []);
  for (const { source, token, k, expert } of allEntries(ranks, options)) {
    groups[expert - first]?.push({ source, token, k });
  }
  for (const group of groups) {
    while (group.length % (options.expertAlignment ?? 1) !== 0) group.push(undefined);
  }
  return groups.flat();
}

/** Copies the rows of a rank, and counts. */
function receive(
  rank: number,
  ranks: readonly RankInput[],
  options: DispatchOptions,
  tokens: readonly (Row | undefined)[],
  rows: readonly (Row | undefined)[],
): RankOutput {
  const { numTopk, layout, expertAlignment = 1 } = options;
  const { first, count } = localExperts(options.numExperts, ranks.length, rank);
  const { rowBytes, numScales = 0, scaleElemBytes = 0 } = ranks[rank]!;
  const scaleBytes = numScales * scaleElemBytes;
  const x = new Uint8Array(rows.length * rowBytes);
  const scales = new Uint8Array(rows.length * scaleBytes);
  const srcIdx = new Int32Array(rows.length).fill(-1);
  rows.forEach((row, r) => {
    if (row === undefined) return;
    const { source, token } = row;
    x.set(ranks[source]!.x.subarray(token * rowBytes, (token + 1) * rowBytes), r * rowBytes);
    if (scaleBytes > 0) {
      scales.set(ranks[source]!.scales!.subarray(token * scaleBytes, (token + 1) * scaleBytes), r * scaleBytes);
    }
    srcIdx[r] = source * options.maxTokensPerRank + token;
  });

  const perExpert = isMasked(options, rank) ? new Int32Array(count) : countEntries(first, count, ranks, options);
  const numTokensPerRank = new Int32Array(ranks.length);
  for (const row of tokens) numTokensPerRank[row!.source]! += 1;
  const hasTopk = ranks[rank]!.topkIdx !== undefined;
  const hasWeights = hasTopk && ranks[rank]!.topkWeights !== undefined;
  return {
    numTokens: tokens.length,
    numRows: rows.length,
    x,
    ...(scaleBytes > 0 ? { scales } : {}),
    ...(hasTopk && layout === "rank" ? { topkIdx: receivedTopkIdx(rows, { first, count }, ranks, options) } : {}),
    ...(hasWeights ? { topkWeights: receivedWeights(rows, { first, count }, ranks, numTopk) } : {}),
    srcIdx,
    numTokensPerExpert: perExpert.map((n) => alignUp(n, expertAlignment)),
    numTokensPerRank,
    expertStats: perExpert.map((n, e) => n + (ranks[rank]!.expertStats?.[e] ?? 0)),
  };
}

/** Entries for each local expert, from the routing or, without one, from the counts that the sources gave. */
function countEntries(first: number, count: number, ranks: readonly RankInput[], world: World): Int32Array {
  const counts = new Int32Array(count);
  for (const { expert } of allEntries(ranks, world)) {
    if (expert >= first && expert < first + count) counts[expert - first]! += 1;
  }
  ranks.forEach((input, source) => {
    if (input.topkIdx !== undefined || isMasked(world, source)) return;
    for (let e = 0; e < count; e++) counts[e]! += input.numTokensPerExpert?.[first + e] ?? 0;
  });
  return counts;
}

type Local = { readonly first: number; readonly count: number };

function receivedTopkIdx(
  rows: readonly (Row | undefined)[],
  { first, count }: Local,
  ranks: readonly RankInput[],
  options: DispatchOptions,
): TopkIdx {
  const { numTopk } = options;
  const numRows = options.noCpuSync ? options.maxRecvTokens ?? options.maxTokensPerRank * ranks.length : rows.length;
  const wide = ranks.some((input) => input.topkIdx instanceof BigInt64Array);
  const local = new Int32Array(numRows * numTopk).fill(-1);
  rows.forEach((row, r) => {
    for (let k = 0; k < numTopk; k++) {
      const expert = expertOf(ranks[row!.source]!, numTopk, row!.token, k);
      if (expert >= first && expert < first + count) local[r * numTopk + k] = expert - first;
    }
  });
  return wide ? BigInt64Array.from(local, (v) => BigInt(v)) : local;
}

function receivedWeights(
  rows: readonly (Row | undefined)[],
  { first, count }: Local,
  ranks: readonly RankInput[],
  numTopk: number,
): Float32Array {
  const weight = (row: Row, k: number): number => {
    const expert = expertOf(ranks[row.source]!, numTopk, row.token, k);
    return expert >= first && expert < first + count ? ranks[row.source]!.topkWeights![row.token * numTopk + k]! : 0;
  };
  return Float32Array.from(rows.flatMap((row) => {
    if (row === undefined) return [0];
    return row.k >= 0 ? [weight(row, row.k)] : Array.from({ length: numTopk }, (_, k) => weight(row, k));
  }));
}
