/**
 * Low-latency mode on a GPU: the sizes that goals are about, the naive way beside them, one rank alone, and sweeps.
 *
 * In: options, stages. Out: figures. Called by bench.ts. Calls are replayed as graphs of many; `us` is the time of a graph over its
 * calls, `marginal` what one more call in it takes, `alone` the time of a graph of one call, launch and end of all ranks' graphs
 * included. A barrier shows what launching and meeting cost when nothing is moved. Where a backend has no graphs, chains are timed.
 */
import { constants } from "../../../../lib/ffi/abi.ts";
import type { BenchOptions } from "../../options.ts";
import { Ranks } from "../../ranks.ts";
import type { Report } from "../report.ts";
import type { PhaseContext } from "../main_phase.ts";
import { makeRouting, mostRows, type Routing } from "../routes.ts";
import type { StageShape } from "../stage.ts";
import { choicesOfCalls } from "./choices.ts";
import { lowLatencyHost } from "./host.ts";
import { overlap } from "./overlap.ts";
import { type LowLatencyFacts, LowLatencyWorld } from "./world.ts";

/** What the phase is run with. */
export interface LowLatencyRun {
  readonly options: BenchOptions;
  readonly report: Report;
  /** A context on a stage of this shape. */
  context(shape: StageShape, swept?: boolean): Promise<PhaseContext>;
  /** Begins a size, if there is time for it. `limited`: it has the time of one size of a sweep. */
  nextSize(limited: boolean): boolean;
  /** Notes a failure. */
  failed(what: string, error: unknown): void;
}

/** A part of the phase at one size: makes the context of each of its pieces on a stage that is in order. */
export interface Size {
  readonly routing: Routing;
  readonly numSms: number;
  newContext(choices?: { maskOnTimeout?: boolean }): Promise<PhaseContext>;
}

/** Of the device's memory, what slots of all ranks may take. */
const SLOTS_SHARE = 0.4;
/** Of a call that makes use of all multiprocessors that it is given. */
const MANY_TOKENS = 1024;
const MOST_SLOTS = 2; // a buffer's default: calls take turns in them

/** Runs everything. */
export async function lowLatencyPhase(run: LowLatencyRun): Promise<void> {
  const { options, report } = run, { ranks, gpu, lowLatencyTokens } = options;
  const { features, totalBytes, numSms: all, alone } = await lookUp(options);
  if ((features & constants.FEATURE.LOW_LATENCY[0]) === 0) return report.say("  the backend has no low-latency mode");
  const share = Math.ceil(ranks / report.machine.numDevices) === 1 ? alone : gpu.numSms[0] ?? alone;
  const numSms = gpu.lowLatencySms ?? share, main = lowLatencyTokens.toSorted((a, b) => b - a), largest = main[0]!;
  const sizeOf = (numRanks: number, tokens: number, sms = numSms): Size => {
    const room = Math.max(largest, tokens),
      shape = { ranks: numRanks, tokens, topk: options.topk, experts: options.experts };
    const slotBytes = options.experts * numRanks * room * 4 * options.hidden; // rows and expert outputs of all ranks
    const numSlots = Math.max(1, Math.min(MOST_SLOTS, Math.floor(SLOTS_SHARE * totalBytes / slotBytes)));
    const routing = makeRouting(shape, 1 + tokens);
    const stage = { numRanks, tokens: room, rows: mostRows(routing.rank), numSlots, lowLatency: true };
    return {
      routing,
      numSms: sms,
      newContext: (choices = {}) =>
        run.context({ ...stage, rows: 0, ...choices }, sms !== numSms || numRanks !== ranks),
    };
  };
  const part = async (what: string, piece: () => Promise<void>, limited = false): Promise<void> => {
    if (!run.nextSize(limited)) return report.trouble(`low_latency: no time for ${what}`);
    report.say(` ${what}`);
    try {
      await piece();
    } catch (error) { // as when the device has no memory for so many tokens
      run.failed(`low_latency: ${what}`, error);
    }
  };
  for (const tokens of main) {
    await part(`${tokens} tokens, the naive way beside`, () => calls(sizeOf(ranks, tokens), { compare: true }));
  }
  await part("a call not captured, on the host's clock", () => lowLatencyHost(report, options));
  for (const tokens of main.filter((tokens) => tokens === largest || tokens === 8)) {
    await part(`options at ${tokens} tokens`, () => choicesOfCalls(sizeOf(ranks, tokens)));
  }
  await part("two micro-batches", () => overlap(sizeOf(ranks, largest, gpu.numSms.at(-1))));
  for (const tokens of main) {
    const alone = { phase: "low_latency_alone" };
    await part(`one rank alone, all multiprocessors, ${tokens} tokens`, () => calls(sizeOf(1, tokens, all), alone));
  }
  for (const sms of gpu.sweepSms) {
    for (const tokens of new Set([largest, main.at(-1)!])) {
      const swept = { phase: "low_latency_sms" };
      await part(
        `${sms} multiprocessors a rank, ${tokens} tokens`,
        () => calls(sizeOf(ranks, tokens, sms), swept),
        true,
      );
    }
  }
  const phase = "low_latency_tokens";
  for (const tokens of gpu.sweepTokens.filter((tokens) => tokens <= 1024 && !main.includes(tokens))) {
    const compare = gpu.compareTokens.includes(tokens);
    await part(`${tokens} tokens`, () => calls(sizeOf(ranks, tokens), { phase, compare }), true);
  }
  for (const numRanks of gpu.sweepRanks.filter((numRanks) => numRanks !== ranks)) {
    for (const tokens of new Set([largest, main.at(-1)!])) {
      const swept = { phase: "low_latency_ranks" };
      await part(`${numRanks} ranks, ${tokens} tokens`, () => calls(sizeOf(numRanks, tokens), swept), true);
    }
  }
}

/**
 * What the device can do, as a small buffer sees it; and how many multiprocessors a call of many tokens takes by default where no
 * other rank has a share of them, 0 where they are no matter.
 */
async function lookUp(
  options: BenchOptions,
): Promise<{ features: number; totalBytes: number; numSms: number; alone: number }> {
  const { hidden, experts, topk } = options;
  await using ranks = await Ranks.create(1, { ...options, numSms: 0 }, {
    hidden,
    numExperts: experts,
    numTopk: topk,
    maxTokensPerRank: 1,
  });
  const buffer = ranks.buffers[0]!, many = { op: "lowLatencyDispatch", numTokens: MANY_TOKENS } as const;
  return { ...buffer.capabilities, alone: buffer.backend === "cpu" ? 0 : buffer.plan(many).numSms };
}

/** Dispatch with the cast, combine in place, and a barrier, at one size. */
async function calls(
  { routing, numSms, newContext }: Size,
  { phase = "low_latency", compare = false }: { phase?: string; compare?: boolean },
): Promise<void> {
  const pieces = { ll_dispatch: dispatch, ll_combine: combine, ll_barrier: barrier };
  for (const [op, piece] of Object.entries(pieces)) {
    const context = await newContext(), low = new LowLatencyWorld(context, routing, phase);
    try {
      await piece(low, { op, numSms }, compare);
      low.release();
    } catch (error) {
      context.failed(`${phase}: ${op} of ${routing.tokens} tokens`, error);
    }
  }
}

/** The naive way sends rows that were cast already, and packs them without room between experts. */
async function dispatch(low: LowLatencyWorld, facts: LowLatencyFacts, compare: boolean): Promise<void> {
  await low.dispatch(facts, () => ({}));
  const { world, stage } = low, { expert } = world.routing;
  using naive = compare ? await world.naiveDispatch(stage.rows("fp8"), expert) : undefined;
  if (naive) await low.naive(naive, "naive_ll_dispatch", { dtype: "fp8", ...low.traffic("dispatch") });
}

async function combine(low: LowLatencyWorld, facts: LowLatencyFacts, compare: boolean): Promise<void> {
  const { world, stage } = low, held = low.dispatchAll();
  try {
    const y = held.map(({ handle }) => handle.expertOutput());
    await low.fill(y);
    using packed = compare ? low.packed() : undefined;
    using naive = packed && await world.naiveCombine(packed.y, world.routing.expert, world.loaded.topkWeights);
    await low.combine(facts, { held, y, naive });
    if (naive) await low.naive(naive, "naive_ll_combine", { dtype: "bf16", ...low.traffic("combine") });
  } finally {
    await stage.ranks.rest();
    for (const result of held) result.release();
  }
}

const barrier = (low: LowLatencyWorld, facts: LowLatencyFacts): Promise<void> => low.barrier({ ...facts, numSms: 0 });
