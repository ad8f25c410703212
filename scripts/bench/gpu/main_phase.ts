/**
 * The figures that goals are about: every call at the main size, with some numbers of multiprocessors a rank.
 *
 * In: a stage. Out: figures; each result is checked before its call is timed, for every number of multiprocessors. Called by
 * bench.ts.
 */
import { type DispatchHandle, type DispatchResult, formatLaunchPlan, type Payload, type Tensor } from "../../../mod.ts";
import { trafficPlan } from "../../../lib/plan.ts";
import { partsOf } from "../naive.ts";
import { nowUs } from "../ranks.ts";
import { type Chain, runOnce, spreadOf } from "../timing.ts";
import type { Verifier } from "../verify.ts";
import { checkRouting, checkRows, checkSums, poison } from "./checks.ts";
import { DeviceClock, type Form, within } from "./clock.ts";
import { NaiveCombine, NaiveDispatch } from "./naive.ts";
import type { NaiveLibrary } from "./naive_library.ts";
import type { GpuFigure, Report, Traffic } from "./report.ts";
import { busiestLink, type Route, type Routing } from "./routes.ts";
import { type Loaded, type Rows, type Stage, unload } from "./stage.ts";

/** What a phase works with. */
export interface PhaseContext {
  readonly report: Report;
  readonly verifier: Verifier;
  readonly stage: Stage;
  /** Or why there is none. */
  readonly naive: NaiveLibrary | string;
  readonly repetitions: number;
  /** What did not work before, and is left out. */
  readonly broken: Set<string>;
  /** Whether there is time for one more figure of this size. */
  left(): boolean;
  /** Notes a failure; goes on. */
  failed(what: string, error: unknown): void;
}

/** Makes the context of a piece of a phase: on the same stage, or on a new one when that is broken. */
export type NewContext = () => Promise<PhaseContext>;

/** A world on a stage, with what its calls have in common. */
export class World {
  readonly context: PhaseContext;
  readonly stage: Stage;
  readonly loaded: Loaded;
  readonly routing: Routing;
  readonly clock: DeviceClock;
  readonly phase: string;

  constructor(context: PhaseContext, routing: Routing, phase: string) {
    this.context = context;
    this.stage = context.stage;
    this.routing = routing;
    this.loaded = context.stage.load(routing);
    this.clock = new DeviceClock(context.stage.ranks, context.repetitions);
    this.phase = phase;
  }

  /** Least traffic of moving a route's rows one way. */
  traffic(route: Route, rowBytes: number): Traffic {
    const { ranks, tokens } = this.routing, { bytes } = trafficPlan(ranks * tokens, route.rows, rowBytes);
    const linkRows = busiestLink(route, this.stage.ranks.buffers.map(({ deviceIndex }) => deviceIndex));
    return linkRows === 0
      ? { bytes }
      : { bytes, linkBytes: linkRows * rowBytes, rankBytes: route.rows / ranks * rowBytes };
  }

  /** Cached dispatches. */
  cached(rows: Rows, handles: readonly DispatchHandle[], numSms: number): Chain {
    const { stage, routing } = this, { lanes } = stage;
    return {
      lanes,
      callsPerStep: 4,
      step: async () => {
        const results = await stage.dispatchAll(
          rows,
          routing.tokens,
          (r) => ({ handle: handles[r]!, numSms, stream: lanes[r]!.stream }),
        );
        results.forEach((result, r) => result.release({ stream: lanes[r]!.stream }));
      },
    };
  }

  /** Dispatches that route anew. `awaited`: the host waits for the counts of one before it makes the next. */
  full(rows: Rows, numSms: number, awaited: boolean): Chain {
    const { stage, routing } = this, { topkIdx, topkWeights } = this.loaded, { lanes } = stage;
    return {
      lanes,
      hostPaced: awaited,
      callsPerStep: 4,
      step: async () => {
        const results = await stage.dispatchAll(rows, routing.tokens, (r) => ({
          topkIdx: topkIdx[r]!,
          topkWeights: topkWeights[r]!,
          cpuSync: awaited,
          numSms,
          stream: lanes[r]!.stream,
        }));
        results.forEach((result, r) => result.release({ stream: lanes[r]!.stream }));
      },
    };
  }

  /** Combines of results that are held. */
  combine(
    y: readonly Tensor[],
    results: readonly DispatchResult<Payload>[],
    numSms: number,
    weights?: readonly Tensor[],
  ): Chain {
    const { stage } = this, { lanes } = stage, out = this.out;
    return {
      lanes,
      callsPerStep: 3,
      step: async () => {
        await Promise.all(stage.ranks.buffers.map((b, r) =>
          b.combine(y[r]!, results[r]!.handle, {
            out: out[r]!,
            numSms,
            stream: lanes[r]!.stream,
            ...(weights ? { weights: weights[r]! } : {}),
          })
        ));
      },
    };
  }

  /** bf16 `[tokens, hidden]` of each rank. */
  get out(): Tensor<"bf16">[] {
    return this.stage.out.map((out) => out.slice(0, this.routing.tokens));
  }

  /** Overwrites what an earlier combine left. */
  poisonOut(): void {
    this.stage.out.forEach((out, r) => this.stage.ranks.buffers[r]!.fill(out, 0xff));
  }

  /** Expert-output regions of results that are held, filled. */
  async outputs(results: readonly DispatchResult<Payload>[], route: Route, shift: number): Promise<Tensor[]> {
    const y = results.map((result, r) => {
      const region = result.handle.expertOutput().slice(0, route.sources[r]!.length);
      this.stage.fillOutput(r, region, route.sources[r]!.length, shift);
      return region;
    });
    await this.stage.ranks.rest();
    return y;
  }

  /** Times a chain and reports it, unless this size has had its time. */
  async time(
    chain: Chain,
    figure: Omit<GpuFigure, "phase" | "form" | "ranks" | "tokens" | "us" | "measured">,
    form: Form = "chain",
  ): Promise<void> {
    const { report } = this.context;
    if (!this.context.left()) {
      return report.trouble(`${this.phase}: no time for ${figure.op} ${form} of ${this.routing.tokens} tokens`);
    }
    const measured = await this.clock.measure(chain, form);
    const { ranks, tokens } = this.routing;
    const more = {
      ...figure.more,
      ...(chain.hostPaced || form === "launched" ? { enqueueUs: measured.enqueueUs } : {}),
    };
    report.add({ phase: this.phase, form, ranks, tokens, us: measured.us, measured, ...figure, more });
  }

  /** Runs the naive way for comparison, if it is there. */
  async naiveDispatch(rows: Rows, route: Route): Promise<NaiveDispatch | undefined> {
    const { naive: library } = this.context;
    if (typeof library === "string") return undefined;
    const naive = new NaiveDispatch({ library, stage: this.stage, loaded: this.loaded, route }, rows);
    await naive.once();
    return naive;
  }

  async naiveCombine(
    y: readonly Tensor[],
    route: Route,
    weights?: readonly Tensor[],
  ): Promise<NaiveCombine | undefined> {
    const { naive: library } = this.context;
    if (typeof library === "string") return undefined;
    const work = { library, stage: this.stage, loaded: this.loaded, route };
    const naive = new NaiveCombine(work, y.map(({ address }) => address), weights);
    await naive.once();
    return naive;
  }

  /** Dispatches once over poisoned memory and checks everything; answers kept handles. */
  async checkedHandles(
    what: string,
    rows: Rows,
    route: Route,
    naive: NaiveDispatch | undefined,
  ): Promise<DispatchHandle[]> {
    const { stage, loaded, context: { verifier } } = this;
    await poison(stage, loaded, rows, route.layout);
    const results = await stage.route(loaded, rows, route.layout);
    await checkRouting(what, { loaded, verifier, route }, results);
    await checkRows(what, { stage, loaded, verifier, rows, route }, results);
    await naive?.compare(what, verifier, results.map((result) => partsOf(result.x)));
    return results.map((result) => {
      const handle = result.handle.keep();
      result.release();
      return handle;
    });
  }

  /** Checks a cached dispatch. */
  async checkCached(
    what: string,
    { rows, route, handles, numSms, naive }: {
      rows: Rows;
      route: Route;
      handles: readonly DispatchHandle[];
      numSms: number;
      naive: NaiveDispatch | undefined;
    },
  ): Promise<void> {
    const { stage, loaded, context: { verifier } } = this;
    await poison(stage, loaded, rows, route.layout);
    const results = await stage.dispatchAll(rows, this.routing.tokens, (r) => ({ handle: handles[r]!, numSms }));
    stage.noted(results);
    await checkRows(what, { stage, loaded, verifier, rows, route }, results);
    await naive?.compare(what, verifier, results.map((result) => partsOf(result.x)));
    for (const result of results) result.release();
  }

  /** Runs a combine once over poisoned memory and checks its tokens. */
  async checkCombine(
    what: string,
    chain: Chain,
    { route, shift, weighted, naive }: {
      route: Route;
      shift: number;
      weighted: boolean;
      naive: NaiveCombine | undefined;
    },
  ): Promise<void> {
    const { stage, loaded, context: { verifier } } = this;
    this.poisonOut();
    await stage.ranks.rest();
    await within(30_000, what, runOnce(chain));
    await checkSums(what, { stage, loaded, verifier, route, shift, weighted }, this.out);
    await naive?.compare(what, verifier, this.out);
  }

  release(): void {
    unload(this.loaded);
  }
}

/** Everything at the main size. */
export async function mainPhase(newContext: NewContext, routing: Routing, numSms: readonly number[]): Promise<void> {
  plans(await newContext(), numSms);
  const pieces = {
    "dispatch": dispatches,
    "FP8 dispatch": fp8Dispatches,
    "combine": combines,
    "combine with copy": copyCombines,
    "expert dispatch": expertDispatches,
    "expert combine": expertCombines,
  };
  for (const [what, piece] of Object.entries(pieces)) {
    const context = await newContext(), world = new World(context, routing, "main");
    try {
      await piece(world, numSms);
      world.release();
    } catch (error) {
      context.failed(`main: ${what}`, error);
    }
  }
}

/** The launch plans, where the backend has them. */
function plans({ report, stage }: PhaseContext, numSms: readonly number[]): void {
  try {
    const [buffer] = stage.ranks.buffers;
    for (const sms of numSms) {
      for (const op of ["dispatch", "combine"] as const) {
        const plan = buffer!.plan({ op, numSms: sms });
        report.say(`  plan of ${formatLaunchPlan(plan)}`);
        report.line({ ...plan, op: "plan", planOf: op });
      }
    }
  } catch (error) {
    report.say(`  no launch plans: ${(error as Error).message}`);
  }
}

async function dispatches(world: World, numSms: readonly number[]): Promise<void> {
  const { stage, routing: { rank: route } } = world, rows = stage.rows("bf16");
  const facts = { dtype: "bf16", layout: "rank", ...world.traffic(route, 2 * stage.hidden) } as const;
  using naive = await world.naiveDispatch(rows, route);
  const handles = await world.checkedHandles("dispatch", rows, route, naive);
  for (const sms of numSms) {
    await world.checkCached(`dispatch_cached, ${sms} SMs`, { rows, route, handles, numSms: sms, naive });
    const chain = world.cached(rows, handles, sms);
    await world.time(chain, { op: "dispatch_cached", numSms: sms, ...facts });
    await world.time(chain, { op: "dispatch_cached", numSms: sms, ...facts }, "launched");
    await world.time(world.full(rows, sms, false), { op: "dispatch_full", numSms: sms, ...facts });
    await world.time(world.full(rows, sms, true), { op: "dispatch_awaited", numSms: sms, ...facts }, "launched");
  }
  await ownStream(world, rows, handles, numSms[0]!);
  await latencies(world, rows, handles, numSms[0]!);
  if (naive) await world.time(naive.chain, { op: "naive_dispatch", numSms: 0, ...facts });
  for (const handle of handles) handle.release();
}

/** The same call from the buffers' own streams, as most programs make it: the streams wait for each other. */
async function ownStream(world: World, rows: Rows, handles: readonly DispatchHandle[], numSms: number): Promise<void> {
  const { stage, routing } = world;
  const chain: Chain = {
    lanes: stage.ownLanes,
    callsPerStep: 6,
    step: async () => {
      const results = await stage.dispatchAll(rows, routing.tokens, (r) => ({ handle: handles[r]!, numSms }));
      for (const result of results) result.release();
    },
  };
  const facts = { dtype: "bf16", layout: "rank", ...world.traffic(routing.rank, 2 * stage.hidden) } as const;
  await world.time(chain, { op: "dispatch_own_stream", numSms, ...facts });
}

/** One call on a device at rest, by the host's clock: until the promises, and until the end is seen. */
async function latencies(world: World, rows: Rows, handles: readonly DispatchHandle[], numSms: number): Promise<void> {
  const { stage, routing } = world, { topkIdx, topkWeights } = world.loaded;
  const once = async (full: boolean): Promise<{ promised: number; ended: number }> => {
    await stage.ranks.rest();
    const begin = nowUs();
    const results = await stage.dispatchAll(
      rows,
      routing.tokens,
      (r) => full ? { topkIdx: topkIdx[r]!, topkWeights: topkWeights[r]!, numSms } : { handle: handles[r]!, numSms },
    );
    const promised = nowUs() - begin;
    await Promise.all(results.map(({ event }) => event));
    const ended = nowUs() - begin;
    for (const result of results) result.release();
    return { promised, ended };
  };
  for (const full of [true, false]) {
    const samples: { promised: number; ended: number }[] = [];
    for (let i = 0; i < 30; i++) samples.push(await once(full));
    const warm = samples.slice(5), what = full ? "dispatch_full" : "dispatch_cached";
    const facts = { phase: "main", form: "host", ranks: routing.ranks, numSms, tokens: routing.tokens } as const;
    const kind = { dtype: "bf16", layout: "rank" } as const;
    const { report } = world.context;
    report.add({ ...facts, ...kind, op: `${what}_until_promise`, us: spreadOf(warm.map(({ promised }) => promised)) });
    report.add({ ...facts, ...kind, op: `${what}_until_end`, us: spreadOf(warm.map(({ ended }) => ended)) });
  }
}

async function fp8Dispatches(world: World, numSms: readonly number[]): Promise<void> {
  const { stage, routing: { rank: route } } = world, rows = stage.rows("fp8");
  const traffic = world.traffic(route, rows.partBytes.reduce((a, b) => a + b, 0));
  const facts = { dtype: rows.dtype, layout: "rank", ...traffic } as const;
  using naive = await world.naiveDispatch(rows, route);
  const handles = await world.checkedHandles("dispatch_fp8", rows, route, naive);
  for (const sms of numSms) {
    await world.checkCached(`dispatch_fp8, ${sms} SMs`, { rows, route, handles, numSms: sms, naive });
    await world.time(world.cached(rows, handles, sms), { op: "dispatch_fp8", numSms: sms, ...facts });
  }
  if (naive) await world.time(naive.chain, { op: "naive_dispatch_fp8", numSms: 0, ...facts });
  for (const handle of handles) handle.release();
}

async function combines(world: World, numSms: readonly number[]): Promise<void> {
  const { stage, routing: { rank: route } } = world, rowBytes = 2 * stage.hidden;
  const results = await stage.route(world.loaded, stage.rows("bf16"));
  const y = await world.outputs(results, route, 1);
  const facts = { dtype: "bf16", layout: "rank", ...world.traffic(route, rowBytes) } as const;
  using naive = await world.naiveCombine(y, route);
  for (const sms of numSms) {
    const chain = world.combine(y, results, sms);
    await world.checkCombine(`combine, ${sms} SMs`, chain, { route, shift: 1, weighted: false, naive });
    await world.time(chain, { op: "combine", numSms: sms, ...facts });
  }
  if (naive) await world.time(naive.chain, { op: "naive_combine", numSms: 0, ...facts });
  for (const result of results) result.release();
}

/** From a tensor of the user's: rows that other ranks pull are first put where they do. */
async function copyCombines(world: World, numSms: readonly number[]): Promise<void> {
  const { stage, routing: { rank: route } } = world, rowBytes = 2 * stage.hidden;
  const results = await stage.route(world.loaded, stage.rows("bf16"));
  const facts = { dtype: "bf16", layout: "rank", ...world.traffic(route, rowBytes) } as const;
  const own = stage.ranks.buffers.map((b, r) => {
    const tensor = b.tensor("bf16", [route.sources[r]!.length, stage.hidden]);
    stage.fillOutput(r, tensor, route.sources[r]!.length, 2);
    return tensor;
  });
  await stage.ranks.rest();
  const moved = route.sources.reduce(
    (sum, sources, r) =>
      sum + sources.reduce((n, source) => n + Number(Math.floor(source / world.routing.tokens) !== r), 0),
    0,
  );
  const more = { note: "bytes: of the combine, and remote rows read and written once more" };
  for (const sms of numSms) {
    const chain = world.combine(own, results, sms);
    await world.checkCombine(`combine_copy, ${sms} SMs`, chain, { route, shift: 2, weighted: false, naive: undefined });
    await world.time(chain, {
      op: "combine_copy",
      numSms: sms,
      ...facts,
      bytes: facts.bytes + 2 * moved * rowBytes,
      more,
    });
  }
  for (const tensor of own) tensor.release();
  for (const result of results) result.release();
}

async function expertDispatches(world: World, numSms: readonly number[]): Promise<void> {
  const { stage, routing: { expert: route } } = world, rows = stage.rows("bf16");
  const facts = { dtype: "bf16", layout: "expert", ...world.traffic(route, 2 * stage.hidden) } as const;
  using naive = await world.naiveDispatch(rows, route);
  const handles = await world.checkedHandles("dispatch_expert", rows, route, naive);
  for (const sms of numSms) {
    await world.checkCached(`dispatch_expert, ${sms} SMs`, { rows, route, handles, numSms: sms, naive });
    await world.time(world.cached(rows, handles, sms), { op: "dispatch_expert", numSms: sms, ...facts });
  }
  if (naive) await world.time(naive.chain, { op: "naive_dispatch_expert", numSms: 0, ...facts });
  for (const handle of handles) handle.release();
}

async function expertCombines(world: World, numSms: readonly number[]): Promise<void> {
  const { stage, routing: { expert: route } } = world;
  const facts = { dtype: "bf16", layout: "expert", ...world.traffic(route, 2 * stage.hidden) } as const;
  const results = await stage.route(world.loaded, stage.rows("bf16"), "expert");
  const y = await world.outputs(results, route, 1), weights = world.loaded.topkWeights;
  using naive = await world.naiveCombine(y, route, weights);
  for (const sms of numSms) {
    const chain = world.combine(y, results, sms, weights);
    await world.checkCombine(`combine_expert, ${sms} SMs`, chain, { route, shift: 1, weighted: true, naive });
    await world.time(chain, { op: "combine_expert", numSms: sms, ...facts });
  }
  if (naive) await world.time(naive.chain, { op: "naive_combine_expert", numSms: 0, ...facts });
  for (const result of results) result.release();
}
