/**
 * Low-latency mode: dispatch with the FP8 cast inside, and weighted combine, at decode sizes.
 *
 * In: options. Out: two figures for each number of tokens, verified before they are timed. Called by scripts/bench.ts. The naive
 * dispatch sends rows that were cast beforehand, so it is a lower bound of the naive way.
 */
import type { LowLatencyResult, ScaledRows, Tensor } from "../../mod.ts";
import { castToFp8 } from "../../lib/dtype.ts";
import { localExperts } from "../../lib/layout.ts";
import { referenceLowLatencyDispatch } from "../../lib/reference/mod.ts";
import { Ceiling } from "./ceiling.ts";
import { fp8RowBytes, lowLatencyBytes, LowLatencyCalls } from "./low_latency_calls.ts";
import { NaiveDispatch, partsOf } from "./naive.ts";
import { NaiveCombine } from "./naive_combine.ts";
import type { BenchOptions } from "./options.ts";
import { foreign, Ranks } from "./ranks.ts";
import type { Figure } from "./report.ts";
import { type Chain, runOnce, Stopwatch } from "./timing.ts";
import { expectedLowLatencyCombine, expertRows, gatherRows, ownerOf, sampledTokens, type Verifier } from "./verify.ts";
import { type BenchWorld, makeBenchWorld, randomRows, sum } from "./world.ts";

/** Runs the ops of low-latency mode that were asked for. */
export async function* benchLowLatency(options: BenchOptions, verifier: Verifier): AsyncGenerator<Figure> {
  const { ranks: numRanks, hidden, topk, experts, ops, lowLatencyTokens } = options;
  if (!ops.has("ll_dispatch") && !ops.has("ll_combine")) return;
  await using ranks = await Ranks.create(numRanks, options, {
    hidden,
    numExperts: experts,
    numTopk: topk,
    maxTokensPerRank: 1,
    maxLowLatencyTokensPerRank: Math.max(...lowLatencyTokens),
  });
  for (const tokens of lowLatencyTokens) {
    const world = makeBenchWorld({ ranks: numRanks, tokens, hidden, topk, experts });
    const bench = new LowLatencyBench(options, verifier, world, ranks);
    if (ops.has("ll_dispatch")) yield await bench.dispatch();
    if (ops.has("ll_combine")) yield await bench.combine();
    bench.release();
  }
}

class LowLatencyBench {
  readonly #options: BenchOptions;
  readonly #verifier: Verifier;
  readonly #world: BenchWorld;
  readonly #ranks: Ranks;
  readonly #stopwatch: Stopwatch;
  readonly #x: readonly Tensor<"bf16">[];
  readonly #topkIdx: readonly Tensor<"i32">[];
  readonly #topkWeights: readonly Tensor<"f32">[];
  readonly #calls: LowLatencyCalls;

  constructor(options: BenchOptions, verifier: Verifier, world: BenchWorld, ranks: Ranks) {
    this.#options = options;
    this.#verifier = verifier;
    this.#world = world;
    this.#ranks = ranks;
    this.#stopwatch = new Stopwatch(ranks, options);
    const { tokens, hidden, topk, inputs } = world;
    this.#x = ranks.buffers.map((b, r) => b.tensor("bf16", [tokens, hidden], inputs[r]!.values));
    this.#topkIdx = ranks.buffers.map((b, r) => b.tensor("i32", [tokens, topk], inputs[r]!.topkIdx));
    this.#topkWeights = ranks.buffers.map((b, r) => b.tensor("f32", [tokens, topk], inputs[r]!.topkWeights));
    this.#calls = new LowLatencyCalls({ topkIdx: this.#topkIdx, topkWeights: this.#topkWeights });
  }

  release(): void {
    for (const tensor of [...this.#x, ...this.#topkIdx, ...this.#topkWeights]) tensor.release();
  }

  #dispatchAll(): LowLatencyResult[] {
    return this.#ranks.buffers.map((b, r) => this.#calls.dispatch(b, r, { x: this.#x[r]! }));
  }

  get #reference() {
    const { experts, topk, tokens, inputs } = this.#world;
    return referenceLowLatencyDispatch(inputs, {
      numExperts: experts,
      numTopk: topk,
      maxTokensPerRank: tokens,
      fp8: true,
    });
  }

  /** What a figure of either op has in common. */
  get #facts() {
    return { tokens: this.#world.tokens, ranks: this.#world.ranks, layout: "low_latency" as const };
  }

  async dispatch(): Promise<Figure> {
    const world = this.#world, ranks = this.#ranks, { tokens, hidden, topk } = world;
    const want = this.#reference, results = this.#dispatchAll();
    for (const [r, result] of results.entries()) {
      await this.#verifier.lowLatencyDispatch(`ll_dispatch, ${tokens} tokens, rank ${r}`, result, want[r]!);
      result.release();
    }
    const rowBytes = fp8RowBytes(hidden), rows = sum(world.expertRows), all = world.ranks * tokens;
    const cast = ranks.buffers.map((b, r): ScaledRows => {
      const { data, scales, numScales } = castToFp8(
        world.inputs[r]!.values,
        tokens,
        hidden,
      );
      return {
        data: b.tensor("f8e4m3", [tokens, hidden], data),
        scales: b.tensor("f32", [tokens, numScales], scales as Float32Array),
      };
    });
    // A row and its scales in one copy, from rows as wide as both.
    const numRows = ranks.buffers.map(() => tokens * topk),
      wide = ranks.buffers.map((b) => b.tensor("u8", [tokens, rowBytes]));
    using ceiling = new Ceiling(
      ranks,
      { numRows, rowBytes },
      (r, i) => wide[r]!.address + BigInt(Math.floor(i / topk) * rowBytes),
    );
    await using naive = await NaiveDispatch.create(this.#options, ranks, world, cast, true);
    await this.#sameAsNaive(naive, want.map(({ experts }) => experts.map(({ x }) => x)));
    const measured: Chain = {
      lanes: ranks.lanes,
      step: () => {
        for (const result of this.#dispatchAll()) result.release();
      },
    };
    const spreads = await ceiling.compare(this.#stopwatch, measured, naive.chain);
    for (const tensor of [...wide, ...cast.flatMap(partsOf)]) tensor.release();
    return {
      op: "ll_dispatch",
      ...this.#facts,
      dtype: "fp8",
      bytes: lowLatencyBytes.dispatch({ tokens: all, rows, hidden }),
      formula:
        `tokens * ${
          2 * hidden
        } B of bf16 read + rows * ${rowBytes} B of FP8 and scales written (rows = tokens * topk); ` +
        "bound and naive way: rows that are cast already",
      ...spreads,
    };
  }

  async #sameAsNaive(naive: NaiveDispatch, want: readonly (readonly Uint8Array[])[]): Promise<void> {
    const { chain } = naive;
    await runOnce(chain);
    for (const [r, x] of naive.result.entries()) {
      const rows = await this.#ranks.buffers[r]!.read(foreign(partsOf(x)[0]!));
      const all = new Uint8Array(rows.length);
      want[r]!.reduce((at, bytes) => (all.set(bytes, at), at + bytes.length), 0);
      this.#verifier.same(`ll_dispatch: the naive way on rank ${r}`, rows, all);
    }
  }

  async combine(): Promise<Figure> {
    const world = this.#world, ranks = this.#ranks, { tokens, hidden, topk, experts } = world;
    const counts = this.#reference.map(({ numTokensPerExpert }) => [...numTokensPerExpert]);
    const values = counts.map((ofRank, r) =>
      ofRank.map((rows, e) => randomRows(rows * hidden, 8000 + r * experts + e))
    );
    const results = this.#dispatchAll();
    const y = results.map((result, r) => {
      const region = result.handle.expertOutput();
      values[r]!.forEach((rows, e) =>
        rows.length > 0 && this.#ranks.buffers[r]!.write(expertRows(region, e, counts[r]![e]!), rows)
      );
      return region;
    });
    const out = ranks.buffers.map((b) => b.tensor("bf16", [tokens, hidden]));
    const measured: Chain = {
      lanes: ranks.lanes,
      step: () => {
        ranks.buffers.forEach((b, r) => this.#calls.combine(b, r, { y: y[r]!, of: results[r]!, out: out[r]! }));
      },
    };
    const sampled = sampledTokens(tokens), want = expectedLowLatencyCombine(world, values, sampled);
    const check = async (name: string, got: readonly Tensor<"bf16">[]): Promise<void> => {
      for (const [r, tensor] of got.entries()) {
        this.#verifier.same(
          `${name}, ${tokens} tokens, rank ${r}`,
          gatherRows(await tensor.read(), sampled, hidden),
          want[r]!,
        );
      }
    };
    await runOnce(measured);
    await check("ll_combine", out);
    await using naive = await NaiveCombine.lowLatency(this.#options, ranks, world, {
      x: this.#x.map((t) => foreign(t)),
      y,
    });
    const naiveChain = naive.chain;
    await runOnce(naiveChain);
    await check("ll_combine: the naive way", naive.result);
    const pulled = pulledRows(world, y), rows = sum(world.expertRows);
    const numRows = pulled.map((ofRank) => ofRank.length);
    using ceiling = new Ceiling(ranks, { numRows, rowBytes: 2 * hidden }, (r, i) => pulled[r]![i]!);
    const spreads = await ceiling.compare(this.#stopwatch, measured, naiveChain);
    for (const tensor of out) tensor.release();
    for (const result of results) result.release();
    return {
      op: "ll_combine",
      ...this.#facts,
      dtype: "bf16",
      bytes: lowLatencyBytes.combine({ tokens: world.ranks * tokens, rows, hidden }),
      formula: `(rows + tokens) * ${2 * hidden} B, rows = tokens * ${topk}`,
      ...spreads,
    };
  }
}

/** Addresses of the rows that each rank pulls: token by token, k by k. */
function pulledRows(world: BenchWorld, y: readonly Tensor[]): bigint[][] {
  const next = Array.from(
    { length: world.ranks },
    (_, r) => new Array<number>(localExperts(world.experts, world.ranks, r).count).fill(0),
  );
  return world.inputs.map(({ topkIdx }) =>
    Array.from(topkIdx, (expert) => {
      const { rank, local } = ownerOf(world, expert);
      const row = local * y[rank]!.shape[1]! + next[rank]![local]!++;
      return y[rank]!.address + BigInt(row * 2 * world.hidden);
    })
  );
}
