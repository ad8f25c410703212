/**
 * Normal mode: what dispatch.ts and combine.ts share.
 *
 * In: options. Out: figures, each verified before it is timed. Called by scripts/bench.ts. All ops share the buffers, the
 * world and the tensors that are sent.
 */
import type { DispatchResult, Payload, RowLayout, Tensor } from "../../mod.ts";
import { type RankOutput, referenceDispatch, type ReferenceHandle } from "../../lib/reference/mod.ts";
import { benchCombine } from "./combine.ts";
import { benchDispatch } from "./dispatch.ts";
import type { BenchOptions } from "./options.ts";
import { Ranks } from "./ranks.ts";
import type { Figure } from "./report.ts";
import { Stopwatch } from "./timing.ts";
import type { Verifier } from "./verify.ts";
import { type BenchWorld, makeBenchWorld } from "./world.ts";

/** Ranks with a world to send. */
export class NormalBench {
  readonly options: BenchOptions;
  readonly verifier: Verifier;
  readonly world: BenchWorld;
  readonly ranks: Ranks;
  readonly stopwatch: Stopwatch;
  /** bf16 `[tokens, hidden]` of each rank. */
  readonly x: readonly Tensor<"bf16">[];
  readonly topkIdx: readonly Tensor<"i32">[];
  readonly topkWeights: readonly Tensor<"f32">[];

  constructor(options: BenchOptions, verifier: Verifier, world: BenchWorld, ranks: Ranks) {
    this.options = options;
    this.verifier = verifier;
    this.world = world;
    this.ranks = ranks;
    this.stopwatch = new Stopwatch(ranks, options);
    const { tokens, hidden, topk, inputs } = world;
    this.x = ranks.buffers.map((b, r) => b.tensor("bf16", [tokens, hidden], inputs[r]!.values));
    this.topkIdx = ranks.buffers.map((b, r) => b.tensor("i32", [tokens, topk], inputs[r]!.topkIdx));
    this.topkWeights = ranks.buffers.map((b, r) => b.tensor("f32", [tokens, topk], inputs[r]!.topkWeights));
  }

  /** Dispatches `x` once on every rank, routing it anew. The results hold slots. */
  dispatchAll<X extends Payload>(x: readonly X[], layout: RowLayout): Promise<DispatchResult<X>[]> {
    return Promise.all(
      this.ranks.buffers.map((buffer, r) =>
        buffer.dispatch(x[r]!, { topkIdx: this.topkIdx[r]!, topkWeights: this.topkWeights[r]!, layout })
      ),
    );
  }

  /** What the reference makes of rows, with f32 scales beside them if there are any. */
  reference(
    rows: readonly Uint8Array[],
    layout: RowLayout,
    scales?: readonly Uint8Array[],
  ): { ranks: RankOutput[]; handle: ReferenceHandle } {
    const { tokens, inputs, experts, topk, expertRows, rankRows } = this.world;
    const sent = inputs.map((input, r) => ({
      ...input,
      x: rows[r]!,
      rowBytes: rows[r]!.length / tokens,
      ...(scales ? { scales: scales[r]!, numScales: scales[r]!.length / 4 / tokens, scaleElemBytes: 4 } : {}),
    }));
    return referenceDispatch(sent, {
      numExperts: experts,
      numTopk: topk,
      maxTokensPerRank: tokens,
      maxRecvTokens: Math.max(...expertRows, ...rankRows),
      layout,
    });
  }
}

/** Runs the ops of normal mode that were asked for. */
export async function* benchNormal(options: BenchOptions, verifier: Verifier): AsyncGenerator<Figure> {
  const { ranks: numRanks, tokens, hidden, topk, experts, ops } = options;
  const wanted = (prefix: string): boolean => [...ops].some((op) => op.startsWith(prefix));
  if (!wanted("dispatch") && !wanted("combine")) return;
  const world = makeBenchWorld({ ranks: numRanks, tokens, hidden, topk, experts });
  await using ranks = await Ranks.create(numRanks, options, {
    hidden,
    numExperts: experts,
    numTopk: topk,
    maxTokensPerRank: tokens,
    maxRecvTokens: Math.max(...world.expertRows, ...world.rankRows),
  });
  const bench = new NormalBench(options, verifier, world, ranks);
  yield* benchDispatch(bench);
  if (wanted("combine")) yield* benchCombine(bench);
  for (const tensor of [...bench.x, ...bench.topkIdx, ...bench.topkWeights]) tensor.release();
}
