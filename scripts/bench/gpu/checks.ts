/**
 * The verification before the clock.
 *
 * In: results and the routes that routes.ts computed. Out: nothing, or a {@linkcode VerificationError} that names the first
 * difference. Called by the phases. Places, counts and routing are compared whole; rows at the seams between sources and at
 * random, against the host's. Where the naive way was compiled, naive.ts compares every byte on the device besides.
 */
import type { DispatchResult, Payload, Tensor } from "../../../mod.ts";
import { bf16FromF32, f32FromBf16 } from "../../../lib/dtype.ts";
import { Random } from "../../../tests/support/random.ts";
import { partsOf } from "../naive.ts";
import type { Verifier } from "../verify.ts";
import type { Route } from "./routes.ts";
import type { Loaded, Rows, Stage } from "./stage.ts";

/** Rows or tokens of a rank that are compared with the host's. */
const SAMPLES = 24;

/** Overwrites what the free slots hold of earlier results, so that a stale row is seen. Needs all slots free. */
export async function poison(stage: Stage, loaded: Loaded, rows: Rows, layout: "rank" | "expert"): Promise<void> {
  const { numSlots } = stage.ranks.buffers[0]!.options;
  const held: DispatchResult<Payload>[][] = [];
  for (let i = 0; i < numSlots; i++) held.push(await stage.route(loaded, rows, layout));
  for (const results of held) {
    results.forEach((result, r) => {
      for (const part of partsOf(result.x)) if (part.byteLength > 0) stage.ranks.buffers[r]!.fill(part, 0xa5);
      result.release();
    });
  }
}

/** First and last rows of each source, and some between. */
export function sampled(length: number, seams: readonly number[]): number[] {
  if (length <= SAMPLES) return Array.from({ length }, (_, i) => i);
  const random = new Random(length);
  const rows = new Set([0, length - 1, ...seams.flatMap((at) => [at - 1, at])].filter((i) => i >= 0 && i < length));
  while (rows.size < SAMPLES) rows.add(random.int(0, length - 1));
  return [...rows].sort((a, b) => a - b);
}

/** A dispatch's rows, and where they came from. */
export async function checkRows(
  what: string,
  { stage, loaded, verifier, rows, route }: {
    stage: Stage;
    loaded: Loaded;
    verifier: Verifier;
    rows: Rows;
    route: Route;
  },
  results: readonly DispatchResult<Payload>[],
): Promise<void> {
  const { tokens } = loaded.routing;
  for (const [r, result] of results.entries()) {
    const sources = route.sources[r]!, name = `${what}, rank ${r}`;
    const places = await result.srcIdx.slice(0, sources.length).read();
    const want = sources.map((source) => Math.floor(source / tokens) * stage.tokens + source % tokens);
    verifier.same(`${name}: srcIdx`, places, want);
    const seams: number[] = [];
    for (let i = 1; i < sources.length && route.layout === "rank"; i++) {
      if (Math.floor(sources[i]! / tokens) !== Math.floor(sources[i - 1]! / tokens)) seams.push(i);
    }
    const samples = sampled(sources.length, seams);
    await Promise.all(
      partsOf(result.x).map(async (part, p) => {
        const got = await Promise.all(samples.map((row) => part.slice(row, row + 1).read()));
        got.forEach((bytes, i) => {
          const source = sources[samples[i]!]!;
          const host = rows.bytes(Math.floor(source / tokens), p, source % tokens);
          verifier.same(`${name}: part ${p} of row ${samples[i]}`, bytes, host);
        });
      }),
    );
  }
}

/** Counts and top-k of a dispatch with routing. */
export async function checkRouting(
  what: string,
  { loaded, verifier, route }: { loaded: Loaded; verifier: Verifier; route: Route },
  results: readonly DispatchResult<Payload>[],
): Promise<void> {
  const { routing } = loaded, { topk, tokens, experts, ranks } = routing;
  for (const [r, result] of results.entries()) {
    const name = `${what}, rank ${r}`, sources = route.sources[r]!;
    verifier.same(`${name}: rows`, Int32Array.of(result.x && result.numRows), Int32Array.of(sources.length));
    verifier.same(
      `${name}: counts`,
      Int32Array.from(result.numTokensPerExpert),
      Int32Array.from(routing.perExpert[r]!),
    );
    if (!result.topkIdx || !result.topkWeights || route.layout !== "rank") continue;
    const first = Math.floor(experts / ranks) * r + Math.min(r, experts % ranks),
      end = first + routing.perExpert[r]!.length;
    const idx = new Int32Array(sources.length * topk), weights = new Float32Array(idx.length);
    for (let i = 0; i < idx.length; i++) {
      const source = sources[Math.floor(i / topk)]!, s = Math.floor(source / tokens);
      const entry = source % tokens * topk + i % topk, expert = routing.topkIdx[s]![entry]!;
      const here = expert >= first && expert < end;
      idx[i] = here ? expert - first : -1;
      weights[i] = here ? routing.topkWeights[s]![entry]! : 0;
    }
    verifier.same(`${name}: topkIdx`, await result.topkIdx.read() as Int32Array, idx);
    verifier.same(`${name}: topkWeights`, await result.topkWeights.read(), weights);
  }
}

/** Reduced tokens, against sums of the host's in the order that the header of the ABI gives. */
export async function checkSums(
  what: string,
  { stage, loaded, verifier, route, shift, weighted, valuesOf = f32FromBf16 }: {
    stage: Stage;
    loaded: Loaded;
    verifier: Verifier;
    route: Route;
    /** Of the expert outputs, see `Stage.fillOutput`. */
    shift: number;
    weighted: boolean;
    /** What is summed of a row. */
    valuesOf?: (row: Uint16Array) => Float32Array;
  },
  out: readonly Tensor<"bf16">[],
): Promise<void> {
  const { tokens } = loaded.routing;
  for (const [s, tensor] of out.entries()) {
    const samples = sampled(tokens, []);
    const got = await Promise.all(samples.map((token) => tensor.slice(token, token + 1).read()));
    samples.forEach((token, i) => {
      const sums = new Float32Array(stage.hidden);
      for (let hop = token * route.width; hop < (token + 1) * route.width; hop++) {
        const rank = route.rankOf[s]![hop]!;
        if (rank < 0) continue;
        const source = stage.outputSource(rank, route.rowOf[s]![hop]!, shift);
        const row = valuesOf(stage.value(source.rank, source.token));
        const weight = weighted ? loaded.routing.topkWeights[s]![hop]! : 1;
        for (let c = 0; c < row.length; c++) sums[c] = sums[c]! + Math.fround(row[c]! * weight);
      }
      verifier.same(`${what}, rank ${s}: token ${token}`, got[i]!, bf16FromF32(sums));
    });
  }
}
