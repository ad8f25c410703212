/**
 * Low-latency dispatch and combine: the meaning of `deepep_low_latency_dispatch` and `deepep_low_latency_combine`.
 *
 * In: what every rank sends; later every rank's expert outputs. Out: rows grouped by local expert, packed from 0; later each token's
 * weighted sum. Called by tests as the oracle of every backend. A backend's tensors are [numLocalExperts, maxRows, …]; here an
 * expert has an array of its own that ends where its rows end, because what follows them is not defined.
 */
import { bf16FromF32, bytesOf, castToFp8, f32FromBf16, f32FromE4m3, FP8_BLOCK, viewAs } from "../dtype.ts";
import { expertRank, localExperts } from "../layout.ts";
import { allEntries, checkInputs, type Entry, isMasked, type RankInput, type TopkIdx, type World } from "./world.ts";

/** How to dispatch; every rank passes the same. */
export interface LowLatencyOptions extends World {
  /** Rows are bf16 and arrive as e4m3 with a scale per 128 channels; otherwise bytes and scales arrive as they were sent. */
  readonly fp8?: boolean;
  /** FP8: scales are rounded up to powers of two. */
  readonly round?: boolean;
  /** FP8, with `round`: scales are 8-bit exponents, four to an i32. */
  readonly ue8m0?: boolean;
}

/** What a local expert receives. */
export interface ExpertRows {
  /** u8 [rows, row bytes]. */
  readonly x: Uint8Array;
  /** u8 [rows, scale bytes]: f32, with `ue8m0` i32, or what was sent. */
  readonly scales?: Uint8Array;
  /** i32 [rows]: the token's index at its source rank. */
  readonly srcInfo: Int32Array;
}

/** What one rank receives. */
export interface LowLatencyOutput {
  /** Rows of each local expert, ordered by (source rank, token, k). */
  readonly experts: readonly ExpertRows[];
  /** i32 [numLocalExperts]. */
  readonly numTokensPerExpert: Int32Array;
  /** i64 [numLocalExperts, numRanks]: begin << 32 | count of the rows from each source rank. */
  readonly layoutRange: BigInt64Array;
  /** i32 [numLocalExperts]: the input's `expertStats` (or 0) plus rows received. */
  readonly expertStats: Int32Array;
}

/** What one rank brings to a low-latency combine. The routing is the dispatch's. */
export interface LowLatencyCombineInput {
  /** Expert outputs of each local expert: bf16 [rows, hidden], row for row what the expert received. */
  readonly x: readonly Uint16Array[];
  readonly numTokens: number;
  readonly topkIdx: TopkIdx;
  /** f32 [numTokens, numTopk]; all ones when absent. */
  readonly topkWeights?: Float32Array;
}

/** The rows of every expert of the world, ordered by (source rank, token, k). */
function rowsOfExperts(ranks: readonly Pick<RankInput, "numTokens" | "topkIdx">[], world: World): Entry[][] {
  const rows: Entry[][] = Array.from({ length: world.numExperts }, () => []);
  for (const entry of allEntries(ranks as readonly RankInput[], world)) {
    if (!isMasked(world, expertRank(entry.expert, world.numExperts, ranks.length))) rows[entry.expert]!.push(entry);
  }
  return rows;
}

/**
 * Dispatches a world in low-latency mode.
 *
 * @throws {TypeError} When an array has not the length of its shape.
 * @throws {RangeError} When a value is outside its range, or an expert would receive more than maxTokensPerRank * ranks rows,
 * which needs tokens that list an expert twice.
 */
export function referenceLowLatencyDispatch(
  ranks: readonly RankInput[],
  options: LowLatencyOptions,
): LowLatencyOutput[] {
  checkInputs("dispatch", ranks, options);
  const rows = rowsOfExperts(ranks, options);
  const maxRows = options.maxTokensPerRank * ranks.length;
  rows.forEach(({ length }, expert) => {
    if (length > maxRows) {
      const rank = expertRank(expert, options.numExperts, ranks.length);
      throw new RangeError(
        `Cannot dispatch: rank ${rank} would receive ${length} rows for expert ${expert}, its buffer holds ${maxRows}`,
      );
    }
  });
  const sent = ranks.map((input) => options.fp8 ? toFp8(input, options) : input);
  return ranks.map((input, rank) => {
    const { first, count } = localExperts(options.numExperts, ranks.length, rank);
    const local = rows.slice(first, first + count);
    const layoutRange = new BigInt64Array(count * ranks.length);
    local.forEach((entries, e) => {
      for (let source = 0; source < ranks.length; source++) {
        // Rows are ordered by source, so those of lower sources come before.
        const begin = entries.filter((entry) => entry.source < source).length;
        const numRows = entries.filter((entry) => entry.source === source).length;
        layoutRange[e * ranks.length + source] = (BigInt(begin) << 32n) | BigInt(numRows);
      }
    });
    return {
      experts: local.map((entries) => receive(entries, sent)),
      numTokensPerExpert: Int32Array.from(local, (entries) => entries.length),
      layoutRange,
      expertStats: Int32Array.from(local, (entries, e) => entries.length + (input.expertStats?.[e] ?? 0)),
    };
  });
}

function toFp8(input: RankInput, options: LowLatencyOptions): RankInput {
  const hidden = input.rowBytes / 2;
  const { data, scales, numScales } = castToFp8(viewAs("bf16", input.x), input.numTokens, hidden, options);
  return { ...input, x: data, rowBytes: hidden, scales: bytesOf(scales), numScales, scaleElemBytes: 4 };
}

function receive(entries: readonly Entry[], sent: readonly RankInput[]): ExpertRows {
  const { rowBytes, numScales = 0, scaleElemBytes = 0 } = sent[0]!;
  const scaleBytes = numScales * scaleElemBytes;
  const x = new Uint8Array(entries.length * rowBytes);
  const scales = new Uint8Array(entries.length * scaleBytes);
  entries.forEach(({ source, token }, row) => {
    x.set(sent[source]!.x.subarray(token * rowBytes, (token + 1) * rowBytes), row * rowBytes);
    if (scaleBytes === 0) return;
    scales.set(sent[source]!.scales!.subarray(token * scaleBytes, (token + 1) * scaleBytes), row * scaleBytes);
  });
  return { x, ...(scaleBytes > 0 ? { scales } : {}), srcInfo: Int32Array.from(entries, (entry) => entry.token) };
}

/**
 * Combines a world in low-latency mode: the sum, from 0 and in ascending k, of weight * row, every product and every sum rounded
 * to f32, the end to bf16. Entries of -1 and of experts on masked ranks are left out. With `fp8` rows travel as e4m3: a value is
 * then what was cast times its scale, rounded to f32. Gives bf16 [numTokens, hidden] for each rank.
 *
 * @throws {TypeError} When an array has not the length of its shape.
 */
export function referenceLowLatencyCombine(
  ranks: readonly LowLatencyCombineInput[],
  options: World & { readonly hidden: number; readonly fp8?: boolean },
): Uint16Array[] {
  const { hidden, numTopk } = options;
  const values = ranks.map((input) => input.x.map((x) => options.fp8 ? throughFp8(x, hidden) : f32FromBf16(x)));
  const sums = ranks.map((input, r) => new Float32Array(isMasked(options, r) ? 0 : input.numTokens * hidden));
  rowsOfExperts(ranks, options).forEach((entries, expert) => {
    const rank = expertRank(expert, options.numExperts, ranks.length);
    if (isMasked(options, rank)) return;
    const length = values[rank]![expert - localExperts(options.numExperts, ranks.length, rank).first]!.length;
    if (length !== entries.length * hidden) {
      throw new TypeError(
        `Cannot combine: x of expert ${expert} has ${length} elements, not ${entries.length * hidden}`,
      );
    }
  });
  const places = placesOf(ranks, options);
  ranks.forEach((input, source) => {
    if (isMasked(options, source)) return;
    for (const { token, k, rank, local, row } of places[source]!) {
      const weight = input.topkWeights?.[token * numTopk + k] ?? 1;
      for (let i = 0; i < hidden; i++) {
        const product = Math.fround(weight * values[rank]![local]![row * hidden + i]!);
        sums[source]![token * hidden + i]! += product; // the array rounds the sum to f32
      }
    }
  });
  return sums.map(bf16FromF32);
}

/** bf16 rows as a combine with `fp8` reads them: values of e4m3 times their scales. */
export function throughFp8(x: Uint16Array, hidden: number): Float32Array {
  const rows = x.length / hidden;
  const { data, scales, numScales } = castToFp8(x, rows, hidden);
  return f32FromE4m3(data).map((value, i) => value * scales[Math.floor(i / hidden) * numScales + blockOf(i % hidden)]!);
}
const blockOf = (channel: number): number => Math.floor(channel / FP8_BLOCK);

/** For each rank the rows that its entries became, ordered by (token, k). */
function placesOf(ranks: readonly LowLatencyCombineInput[], options: World): Place[][] {
  const places: Place[][] = ranks.map(() => []);
  rowsOfExperts(ranks, options).forEach((entries, expert) => {
    const rank = expertRank(expert, options.numExperts, ranks.length);
    const local = expert - localExperts(options.numExperts, ranks.length, rank).first;
    entries.forEach(({ source, token, k }, row) => places[source]!.push({ token, k, rank, local, row }));
  });
  for (const ofRank of places) ofRank.sort((a, b) => a.token - b.token || a.k - b.k);
  return places;
}

interface Place {
  readonly token: number;
  readonly k: number;
  readonly rank: number;
  readonly local: number;
  readonly row: number;
}
