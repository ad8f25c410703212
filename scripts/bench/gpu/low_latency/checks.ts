/**
 * The verification of low-latency calls before the clock.
 *
 * In: results, and the routes that routes.ts computed. Out: nothing, or a {@linkcode VerificationError}. Called by world.ts. Counts,
 * ranges and source indices are compared whole, rows at random against the host's cast: all of them where they are few.
 */
import type { LowLatencyResult, Tensor } from "../../../../mod.ts";
import { castToFp8, type Fp8Options } from "../../../../lib/dtype.ts";
import { expertRows, type Verifier } from "../../verify.ts";
import { sampled } from "../checks.ts";
import type { Routing } from "../routes.ts";
import type { Stage } from "../stage.ts";

/** What each rank must receive. */
export interface Places {
  /** i32 `[numLocalExperts]`. */
  readonly count: Int32Array;
  /** i64 `[numLocalExperts, numRanks]`: `begin << 32 | count`. */
  readonly layoutRange: BigInt64Array;
  /** Where the rows of each expert begin when they stand one expert after another, as `routing.expert` has them. */
  readonly begins: readonly number[];
}

/** Of each rank, from the route of the expert layout: rows of an expert come in the order of their sources and tokens there, too. */
export function placesOf({ expert, perExpert, ranks, tokens }: Routing): Places[] {
  return perExpert.map((counts, r) => {
    const layoutRange = new BigInt64Array(counts.length * ranks), begins: number[] = [];
    let at = 0;
    counts.forEach((count, e) => {
      begins.push(at);
      const ofSource = new Int32Array(ranks);
      for (const source of expert.sources[r]!.subarray(at, at + count)) ofSource[Math.floor(source / tokens)]! += 1;
      let begin = 0;
      ofSource.forEach((n, source) => {
        layoutRange[e * ranks + source] = BigInt(begin) << 32n | BigInt(n);
        begin += n;
      });
      at += count;
    });
    return { count: Int32Array.from(counts), layoutRange, begins };
  });
}

/** A dispatch of bf16 rows: cast as `fp8` says, or as they are. */
export async function checkLowLatency(
  what: string,
  { stage, routing, verifier, fp8 }: {
    stage: Stage;
    routing: Routing;
    verifier: Verifier;
    /** Null: not cast. */
    fp8: Fp8Options | null;
  },
  results: readonly LowLatencyResult[],
): Promise<void> {
  const places = placesOf(routing), { tokens } = routing;
  for (const [r, result] of results.entries()) {
    const { count, layoutRange, begins } = places[r]!,
      sources = routing.expert.sources[r]!,
      name = `${what}, rank ${r}`;
    verifier.same(`${name}: count`, await result.count.read(), count);
    verifier.same(`${name}: layoutRange`, await result.layoutRange.read(), layoutRange);
    const srcInfo = await result.srcInfo.read(), maxRows = result.srcInfo.shape[1]!;
    count.forEach((rows, e) => {
      const want = sources.slice(begins[e], begins[e]! + rows).map((source) => source % tokens);
      verifier.same(`${name}: srcInfo of expert ${e}`, srcInfo.slice(e * maxRows, e * maxRows + rows), want);
    });
    const { data, scales } = "data" in result.x ? result.x : { data: result.x, scales: undefined };
    const rows = sampled(sources.length, []);
    await Promise.all(rows.map(async (row) => {
      const e = begins.findLastIndex((begin) => begin <= row), source = sources[row]!;
      const at = (tensor: Tensor): Tensor =>
        expertRows(tensor, e, count[e]!).slice(row - begins[e]!, row - begins[e]! + 1);
      const values = stage.value(Math.floor(source / tokens), source % tokens);
      const cast = fp8 && castToFp8(values, 1, stage.hidden, fp8);
      verifier.same(`${name}: row ${row}`, await stage.ranks.buffers[r]!.read(at(data)), cast?.data ?? values);
      if (!cast || !scales) return;
      verifier.same(`${name}: scales of row ${row}`, await stage.ranks.buffers[r]!.read(at(scales)), cast.scales);
    }));
  }
}
