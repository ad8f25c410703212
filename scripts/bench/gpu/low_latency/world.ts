/**
 * A world in low-latency mode: its calls, verified, and timed as graphs of many where the backend has graphs.
 *
 * In: a stage with low-latency buffers, a routing. Out: figures. Called by phase.ts, choices.ts and overlap.ts. Expert outputs have
 * the rows that the naive way's have, in the same order, so that the sums of both can be compared byte by byte.
 */
import { type EpEvent, LowLatencyResult, type Stream, type Tensor } from "../../../../mod.ts";
import type { Fp8Options } from "../../../../lib/dtype.ts";
import { throughFp8 } from "../../../../lib/reference/mod.ts";
import {
  type CombineChoices,
  type DispatchChoices,
  fp8RowBytes,
  lowLatencyBytes,
  LowLatencyCalls,
  type Operations,
} from "../../low_latency_calls.ts";
import type { Lane } from "../../ranks.ts";
import type { Chain } from "../../timing.ts";
import { checkSums } from "../checks.ts";
import { type Measured, within } from "../clock.ts";
import { hasGraphsOf } from "../features.ts";
import { captured } from "../graphs.ts";
import { type PhaseContext, World } from "../main_phase.ts";
import type { NaiveCombine, NaiveDispatch } from "../naive.ts";
import type { GpuFigure, Traffic } from "../report.ts";
import type { Routing } from "../routes.ts";
import { checkLowLatency, placesOf } from "./checks.ts";

/** Of the expert outputs, see `Stage.fillOutput`. */
const SHIFT = 1;
/** Calls in a graph. Dispatches take turns in the slots, as the layers of a model do; combines share one. */
const CALLS_A_GRAPH = 32;

/** What is known of a figure before it is timed. */
export interface LowLatencyFacts {
  readonly op: string;
  readonly numSms: number;
  readonly more?: GpuFigure["more"];
}

/** A result that goes with the graph or the step that made it. */
type Made = Disposable | EpEvent;

/** A buffer's operations in the order of another stream than its own. */
const onLane = ({ buffer, stream }: Lane): Operations => ({
  lowLatencyDispatch: (x, options) => buffer.lowLatencyDispatch(x, { ...options, stream }),
  lowLatencyCombine: (y, options) => buffer.lowLatencyCombine(y, { ...options, stream }),
  barrier: (options) => buffer.barrier({ ...options, stream }),
});

/** Gives back what a call left. */
function dispose(result: Made, stream?: Stream): void {
  if (result instanceof LowLatencyResult) result.release(stream ? { stream } : {});
  else if (Symbol.dispose in result) result[Symbol.dispose]();
}

/** The world. */
export class LowLatencyWorld {
  readonly world: World;
  readonly calls: LowLatencyCalls;
  readonly phase: string;

  constructor(context: PhaseContext, routing: Routing, phase = "low_latency") {
    this.world = new World(context, routing, phase);
    this.calls = new LowLatencyCalls(this.world.loaded);
    this.phase = phase;
  }

  get stage(): World["stage"] {
    return this.world.stage;
  }

  get hasGraphs(): boolean {
    return hasGraphsOf(this.stage.ranks.buffers[0]!);
  }

  /** Least traffic of a dispatch with FP8 or bf16 rows, or of a combine. */
  traffic(op: "dispatch" | "dispatch_bf16" | "combine"): Traffic {
    const { ranks, tokens, expert } = this.world.routing, { hidden } = this.stage;
    const rowBytes = op === "dispatch" ? fp8RowBytes(hidden) : 2 * hidden;
    const moved = { tokens: ranks * tokens, rows: expert.rows, hidden };
    const bytes = op === "combine" ? lowLatencyBytes.combine(moved) : lowLatencyBytes.dispatch(moved, rowBytes);
    return { ...this.world.traffic(expert, rowBytes), bytes };
  }

  /** Rows that a rank sends. */
  x(rank: number): Tensor<"bf16"> {
    return this.stage.x[rank]!.slice(0, this.world.routing.tokens);
  }

  /** Dispatches on every rank, for what needs results. */
  dispatchAll(choices: DispatchChoices = {}): LowLatencyResult[] {
    return this.stage.ranks.buffers.map((b, r) => this.calls.dispatch(b, r, { ...choices, x: this.x(r) }));
  }

  /** Times a dispatch of bf16 rows, checked before. `fp8`: how it casts, null: not at all. */
  async dispatch(
    facts: LowLatencyFacts,
    choices: (rank: number) => DispatchChoices,
    fp8: Fp8Options | null = {},
    naive?: NaiveDispatch,
  ): Promise<void> {
    const { world, stage } = this, { verifier } = world.context, { routing } = world, { numSms } = facts;
    const what = `${facts.op} of ${routing.tokens} tokens`, slots = stage.ranks.buffers[0]!.options.numSlots;
    const recent: LowLatencyResult[][] = stage.ranks.buffers.map(() => []);
    await this.#time(facts, fp8 ? "fp8" : "bf16", this.traffic(fp8 ? "dispatch" : "dispatch_bf16"), {
      calls: CALLS_A_GRAPH,
      kept: slots,
      record: (operations, r) => {
        const mine = recent[r]!;
        if (mine.length === slots) mine.shift()!.release(); // its slot goes to this call
        const result = this.calls.dispatch(operations, r, { ...choices(r), numSms, x: this.x(r) });
        mine.push(result);
        return result;
      },
      check: async (results) => {
        await checkLowLatency(what, { stage, routing, verifier, fp8 }, results);
        if (!naive || fp8) return;
        const places = placesOf(routing);
        await naive.compareExperts(what, verifier, results.map(({ x }, r) => ({ x: x as Tensor, ...places[r]! })));
      },
      poison: (results) => results.forEach(({ x }, r) => stage.ranks.buffers[r]!.fill("data" in x ? x.data : x, 0xa5)),
    });
  }

  /** Fills expert outputs, as wide as `expertOutput()`, with the rows that the naive way's have. */
  async fill(y: readonly Tensor[]): Promise<void> {
    const { stage, world: { routing } } = this, rowBytes = 2 * stage.hidden;
    placesOf(routing).forEach(({ count, begins }, r) => {
      const { core, stream } = stage.ranks.buffers[r]!;
      count.forEach((rows, e) => {
        const to = y[r]!.slice(e, e + 1).address;
        for (let i = 0; i < rows;) { // in pieces that lie together in x
          const { rank, token } = stage.outputSource(r, begins[e]! + i, SHIFT),
            n = Math.min(rows - i, stage.tokens - token);
          const from = stage.x[rank]!.address + BigInt(token * rowBytes);
          core.copy(to + BigInt(i * rowBytes), from, n * rowBytes, stream);
          i += n;
        }
      });
    });
    await stage.ranks.rest();
  }

  /** Expert outputs as the naive way has them: without room between experts. */
  packed(): Disposable & { readonly y: readonly Tensor[] } {
    const { stage, world: { routing } } = this;
    const y = stage.ranks.buffers.map((b, r) => {
      const rows = routing.expert.sources[r]!.length, tensor = b.tensor("bf16", [Math.max(1, rows), stage.hidden]);
      stage.fillOutput(r, tensor, rows, SHIFT);
      return tensor;
    });
    return { y, [Symbol.dispose]: () => y.forEach((tensor) => tensor.release()) };
  }

  /** Checks what combines made of outputs that {@linkcode fill} filled. `fp8`: rows have travelled as e4m3. */
  async checkSums(what: string, out: readonly Tensor<"bf16">[], fp8 = false): Promise<void> {
    const { stage, world: { loaded, routing, context: { verifier } } } = this;
    const facts = { stage, loaded, verifier, route: routing.expert, shift: SHIFT, weighted: true };
    await checkSums(what, { ...facts, ...(fp8 && { valuesOf: (row) => throughFp8(row, stage.hidden) }) }, out);
  }

  /** Fills the expert outputs of every slot; they stay until they are filled anew. */
  async fillSlots(): Promise<void> {
    const { ranks } = this.stage, held: LowLatencyResult[][] = [];
    for (let slot = 0; slot < ranks.buffers[0]!.options.numSlots; slot++) held.push(this.dispatchAll());
    for (const results of held) await this.fill(results.map(({ handle }) => handle.expertOutput()));
    for (const result of held.flat()) result.release();
    await ranks.rest();
  }

  /** Times a combine of `y` by the routing of `held`, checked before. */
  async combine(
    facts: LowLatencyFacts,
    { held, y, choices = () => ({}), naive }: {
      held: readonly LowLatencyResult[];
      y: readonly Tensor[];
      choices?: (rank: number) => CombineChoices;
      naive?: NaiveCombine | undefined;
    },
  ): Promise<void> {
    const { world } = this, { verifier } = world.context, { routing, out } = world, { numSms } = facts;
    const what = `${facts.op} of ${routing.tokens} tokens`, fp8 = choices(0).fp8 === true;
    await this.#time(facts, fp8 ? "fp8" : "bf16", fp8 ? undefined : this.traffic("combine"), {
      calls: CALLS_A_GRAPH,
      record: (operations, r) =>
        this.calls.combine(operations, r, { ...choices(r), numSms, y: y[r]!, of: held[r]!, out: out[r]! }),
      check: async () => {
        await this.checkSums(what, out, fp8);
        await naive?.compare(what, verifier, out);
      },
      poison: () => world.poisonOut(),
    });
  }

  /** Times barriers: what a launch and a meeting of all ranks cost when nothing is moved. */
  async barrier(facts: LowLatencyFacts): Promise<void> {
    await this.#time(facts, "none", undefined, { calls: CALLS_A_GRAPH, record: (operations) => operations.barrier() });
  }

  /** Times the naive way in the form that the calls are timed in. */
  async naive(
    naive: NaiveDispatch | NaiveCombine,
    op: "naive_ll_dispatch" | "naive_ll_combine",
    facts: Pick<GpuFigure, "dtype"> & Traffic,
  ): Promise<void> {
    const chain = this.hasGraphs ? naive.graph(CALLS_A_GRAPH) : naive.chain; // as many as the call beside it
    const more = { callsAGraph: chain.calls ?? 1 };
    await this.world.time(chain, { op, ...facts, numSms: 0, layout: "low_latency", more }, this.#form);
  }

  get #form(): "graph" | "chain" {
    return this.hasGraphs ? "graph" : "chain";
  }

  /** Checks and times a call of all ranks: in graphs of `calls`, and of one, so that one more call's time is known; else as a chain. */
  async #time<T extends Made>(
    { op, numSms, more = {} }: LowLatencyFacts,
    dtype: GpuFigure["dtype"],
    traffic: Traffic | undefined,
    { calls, kept = calls, record, check, poison }: {
      calls: number;
      /** Of how many of the last calls the results are held. */
      kept?: number;
      record: (operations: Operations, rank: number) => T;
      check?: (results: readonly T[]) => Promise<void>;
      poison?: (results: readonly T[]) => void;
    },
  ): Promise<void> {
    const { world, stage: { ranks } } = this, { context } = world;
    const facts = { op, numSms, dtype, layout: "low_latency", ...traffic } as const;
    if (!context.left()) {
      return context.report.trouble(`${this.phase}: no time for ${op} of ${world.routing.tokens} tokens`);
    }
    if (!this.hasGraphs) {
      await ranks.rest();
      const results = ranks.buffers.map((b, r) => record(b, r));
      await within(30_000, op, Promise.all(ranks.buffers.map((b) => b.record(b.commStream))));
      await check?.(results);
      for (const result of results) dispose(result);
      await world.time(this.#chain(record), { ...facts, more });
      return;
    }
    let one = 0;
    for (const n of calls > 1 ? [1, calls] : [1]) {
      const { graphs, chain, once } = await captured(this.stage, n, record);
      try {
        const call = (i: number): T[] => graphs.map(({ results }) => results[i]!);
        const first = Math.max(0, n - kept);
        for (let i = first; i < n; i++) poison?.(call(i));
        await once();
        if (n === calls) { for (const i of new Set([first, n - 1])) await check?.(call(i)); }
        const measured: Measured = await world.clock.measure(chain, "graph");
        if (n === 1) one = measured.us.median;
        if (n !== calls) continue;
        const marginal = n > 1 ? (n * measured.us.median - one) / (n - 1) : measured.us.median;
        const { ranks: numRanks, tokens } = world.routing;
        const all = { ...more, callsAGraph: n, alone: one, marginal };
        const figure = {
          phase: this.phase,
          form: "graph",
          ranks: numRanks,
          tokens,
          us: measured.us,
          measured,
        } as const;
        context.report.add({ ...figure, ...facts, more: all });
      } finally {
        for (const graph of graphs) {
          graph.release();
          for (const result of graph.results) dispose(result);
        }
      }
    }
  }

  #chain<T extends Made>(record: (operations: Operations, rank: number) => T): Chain {
    const { lanes } = this.stage, operations = lanes.map((lane) => onLane(lane));
    return {
      lanes,
      callsPerStep: 4,
      step: () => {
        const results = operations.map((of, r) => record(of, r));
        results.forEach((result, r) => dispose(result, lanes[r]!.stream));
      },
    };
  }

  release(): void {
    this.world.release();
  }
}
