/**
 * The naive combine: unpermute into send buffers, one copy per peer, reduce.
 *
 * In: a world and where every rank's expert outputs lie. Out: a chain that brings rows back and reduces them with the combine of
 * a buffer of one rank (see naive.ts), from memory where each peer's rows were copied to first. In rank layout rows lie in the
 * order of their sources already and need no permute; in low-latency mode a copy per (source, expert) makes that order. Called
 * by the ops.
 */
import type { Payload, Tensor } from "../../mod.ts";
import { Permuter } from "./naive.ts";
import type { BenchOptions } from "./options.ts";
import type { Ranks } from "./ranks.ts";
import type { Chain } from "./timing.ts";
import { begins, type BenchWorld, sourceBegins, sum } from "./world.ts";
import { localExperts } from "../../lib/layout.ts";

/** Pieces that rank d's rows for rank s consist of: rows from a place in its expert outputs. */
type Pieces = readonly { readonly begin: number; readonly count: number }[];

/** The naive combine. */
export class NaiveCombine implements AsyncDisposable {
  readonly #ranks: Ranks;
  readonly #world: BenchWorld;
  readonly #y: readonly Tensor[];
  readonly #reducers: readonly Permuter[];
  readonly #weights: readonly (Tensor | undefined)[];
  readonly #out: readonly Tensor<"bf16">[];
  /** `[d][s]`, when rows must be permuted before they are sent. */
  readonly #pieces: readonly (readonly Pieces[])[] | undefined;
  /** Send buffers [turn][rank]. */
  readonly #send: readonly (readonly Tensor[])[];

  private constructor(
    ranks: Ranks,
    world: BenchWorld,
    y: readonly Tensor[],
    reducers: readonly Permuter[],
    pieces: readonly (readonly Pieces[])[] | undefined,
  ) {
    this.#ranks = ranks;
    this.#world = world;
    this.#y = y;
    this.#reducers = reducers;
    this.#pieces = pieces;
    this.#out = reducers.map(({ buffer }) => buffer.tensor("bf16", [world.tokens, world.hidden]));
    this.#weights = reducers.map(({ buffer, lane: { stream } }, r) =>
      pieces && buffer.tensor("f32", [world.tokens, world.topk], world.inputs[r]!.topkWeights, { stream })
    );
    this.#send = pieces
      ? [0, 1].map(() => ranks.buffers.map((b, d) => b.tensor("bf16", [world.expertRows[d]!, world.hidden])))
      : [];
  }

  /** In rank layout. `y`: bf16 expert outputs of each rank, as a dispatch laid the rows out. `x`: rows, for a routing to be made. */
  static async rankLayout(
    o: BenchOptions,
    ranks: Ranks,
    world: BenchWorld,
    { x, y }: { x: readonly Payload[]; y: readonly Tensor[] },
  ): Promise<NaiveCombine> {
    const { hidden, destinations, destinationsPerToken: width } = world;
    const reducers = await Promise.all(
      x.map((rows, s) => Permuter.create(o, { bins: destinations[s]!, width, numBins: world.ranks, hidden, rows })),
    );
    await ranks.rest(); // what was written to `y` is read on other streams
    return new NaiveCombine(ranks, world, y, reducers, undefined);
  }

  /** In low-latency mode. `y`: bf16 `[numLocalExperts, maxRows, hidden]` of each rank. */
  static async lowLatency(
    o: BenchOptions,
    ranks: Ranks,
    world: BenchWorld,
    { x, y }: { x: readonly Payload[]; y: readonly Tensor[] },
  ): Promise<NaiveCombine> {
    const { hidden, experts, topk, inputs } = world;
    const reducers = await Promise.all(
      x.map((rows, s) => Permuter.create(o, { bins: inputs[s]!.topkIdx, width: topk, numBins: experts, hidden, rows })),
    );
    const perExpert = inputs.map(({ topkIdx }) => {
      const counts = new Array<number>(experts).fill(0);
      for (const expert of topkIdx) counts[expert]! += 1;
      return counts;
    });
    const pieces = ranks.buffers.map((_, d) => {
      const { first, count } = localExperts(experts, world.ranks, d), maxRows = y[d]!.shape[1]!;
      const at = Array.from({ length: count }, (_, e) => e * maxRows);
      return perExpert.map((ofSource) =>
        at.map((begin, e) => {
          const rows = ofSource[first + e]!;
          at[e]! += rows;
          return { begin, count: rows };
        }).filter((piece) => piece.count > 0)
      );
    });
    await ranks.rest();
    return new NaiveCombine(ranks, world, y, reducers, pieces);
  }

  /** What the last step gave to each rank. */
  get result(): readonly Tensor<"bf16">[] {
    return this.#out;
  }

  /** The chain. */
  get chain(): Chain {
    const world = this.#world, rowBytes = 2 * world.hidden;
    const regions = this.#reducers.map(({ handle, lane }) => handle.expertOutput({ stream: lane.stream }));
    const rows = this.#pieces?.map((ofRank) => ofRank.map((pieces) => sum(pieces.map(({ count }) => count))));
    const counts = rows ? world.counts.map((_, s) => rows.map((ofRank) => ofRank[s]!)) : world.counts;
    const fromBegins = rows ? rows.map(begins) : sourceBegins(world), toBegins = counts.map(begins);
    let turn = 0;
    return {
      lanes: this.#reducers.map(({ lane }) => lane),
      callsPerStep: sum(this.#pieces?.flat().map((pieces) => pieces.length) ?? []) +
        counts.length * (4 + counts.length),
      step: async () => {
        turn ^= 1;
        this.#permute(turn);
        this.#reducers.forEach(({ lane }, r) => this.#ranks.buffers[r]!.barrier({ stream: lane.stream }));
        await Promise.all(this.#reducers.map(({ buffer, handle, lane: { stream } }, s) => {
          for (let i = 0; i < counts.length; i++) {
            const d = (s + i) % counts.length, count = counts[s]![d]!;
            if (count === 0) continue;
            const from = (this.#send[turn] ?? this.#y)[d]!.address + BigInt(fromBegins[d]![s]! * rowBytes);
            buffer.core.copy(regions[s]!.address + BigInt(toBegins[s]![d]! * rowBytes), from, count * rowBytes, stream);
          }
          const weights = this.#weights[s];
          return buffer.combine(regions[s]!, handle, { out: this.#out[s]!, stream, ...(weights ? { weights } : {}) });
        }));
      },
    };
  }

  #permute(turn: number): void {
    const rowBytes = 2 * this.#world.hidden;
    this.#pieces?.forEach((ofRank, d) => {
      const { core, commStream } = this.#reducers[d]!.buffer;
      let to = this.#send[turn]![d]!.address;
      for (const { begin, count } of ofRank.flat()) {
        core.copy(to, this.#y[d]!.address + BigInt(begin * rowBytes), count * rowBytes, commStream);
        to += BigInt(count * rowBytes);
      }
    });
  }

  /** Releases everything. */
  async [Symbol.asyncDispose](): Promise<void> {
    for (const tensor of [...this.#out, ...this.#weights, ...this.#send.flat()]) tensor?.release();
    await Promise.all(this.#reducers.map((reducer) => reducer[Symbol.asyncDispose]()));
  }
}
