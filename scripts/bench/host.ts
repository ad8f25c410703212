/**
 * What a call costs the host: pack, FFI and launch, without waiting; and what a promise adds to the end of an operation.
 *
 * In: options. Out: figures in microseconds of one call on one rank; the median, least and most of batches' medians, because a
 * single call may be hit by a collection or by the scheduler. Called by scripts/bench.ts. `host_x` is a call while the device
 * is busy, as in a model that runs; `host_x_idle` one that finds the device at rest: on the cpu backend it has to wake the
 * communication stream's thread, which costs an interrupt of another core.
 */
import type { EpEvent } from "../../mod.ts";
import type { BenchOptions } from "./options.ts";
import { nowUs, Ranks } from "./ranks.ts";
import type { Figure } from "./report.ts";
import { type Spread, spreadOf } from "./timing.ts";

const CALLS = 300;
const WARM_CALLS = 2000;
/** A call's cost that was promised. */
const GOAL_US = 10;
/** How long the device is kept busy for a batch of calls: many times what they take. */
const BUSY_MS = 50;

/** Operations that take so long, each a little longer, outlast the time in which completions are polled every turn. */
const LATE_MS = Array.from({ length: 11 }, (_, i) => 2 + i / 10);
const FACTS = { tokens: 1, ranks: 1, dtype: "none", layout: "none", bytes: 0 } as const;

/** What a call leaves behind. */
export interface Called {
  readonly event: EpEvent;
  [Symbol.dispose](): void;
}
/** A call that launches before it returns. */
export type Call = () => Called | Promise<Called>;

/** Runs the ops about the host that were asked for. */
export async function* benchHost(options: BenchOptions): AsyncGenerator<Figure> {
  const { hidden, topk, experts, ops } = options, tokens = 1;
  if (!ops.has("host") && !ops.has("wake")) return;
  await using ranks = await Ranks.create(1, options, {
    hidden,
    numExperts: experts,
    numTopk: topk,
    maxTokensPerRank: tokens,
    maxLowLatencyTokensPerRank: tokens,
    numSlots: 4,
  });
  const buffer = ranks.buffers[0]!;
  using x = buffer.tensor("bf16", [tokens, hidden], new Uint16Array(tokens * hidden));
  using topkIdx = buffer.tensor("i32", [tokens, topk], Int32Array.from({ length: tokens * topk }, (_, i) => i % topk));
  using topkWeights = buffer.tensor("f32", [tokens, topk], new Float32Array(tokens * topk).fill(1 / topk));
  using out = buffer.tensor("bf16", [tokens, hidden]);
  if (ops.has("host")) {
    using held = await buffer.dispatch(x, { topkIdx });
    const { handle } = held;
    const calls: Record<string, Call> = {
      dispatch: () => buffer.dispatch(x, { topkIdx, cpuSync: false }),
      dispatch_cached: () => buffer.dispatch(x, { handle }),
      combine: () => buffer.combine(x, handle, { out }),
      ll_dispatch: () => buffer.lowLatencyDispatch(x, { topkIdx }),
    };
    for (const [name, call] of Object.entries(calls)) yield* callFigures(options, ranks, name, call);
    using ll = buffer.lowLatencyDispatch(x, { topkIdx });
    const y = ll.handle.expertOutput();
    buffer.fill(y, 0);
    const combine: Call = () => buffer.lowLatencyCombine(y, { topkIdx, topkWeights, handle: ll.handle, out });
    yield* callFigures(options, ranks, "ll_combine", combine);
  }
  if (ops.has("wake")) {
    const formula = "of one rank, awaited; bound: its event asked in a busy loop, without the event loop";
    const start = (delayMs: number): EpEvent => delayMs === 0 ? buffer.barrier() : ranks.shut([], delayMs)[0]!;
    yield { op: "wake", ...FACTS, ...await wake(options, [0], start), formula: `a barrier ${formula}` };
    if (ranks.hasGate) {
      const late = `how much later than its time ends a barrier of ${LATE_MS[0]} to ${LATE_MS.at(-1)} ms ${formula}`;
      yield { op: "wake_late", ...FACTS, ...await wake(options, LATE_MS, start), formula: late };
    }
  }
}

/** How long after its delay an operation is heard of: by the event loop, and by asking without pause. */
export async function wake(
  o: BenchOptions,
  delaysMs: readonly number[],
  start: (delayMs: number) => EpEvent,
): Promise<{ measured: Spread; bound: Spread }> {
  let turn = 0;
  const nextMs = (): number => delaysMs[turn++ % delaysMs.length]!;
  const measured = await batches(o, async () => {
    const begin = nowUs(), delayMs = nextMs();
    await start(delayMs);
    return nowUs() - begin - delayMs * 1000;
  });
  const bound = await batches(o, () => {
    const begin = nowUs(), delayMs = nextMs(), event = start(delayMs);
    while (!event.done);
    return nowUs() - begin - delayMs * 1000;
  });
  return { measured, bound };
}

/** A call on a busy and on an idle device. */
async function* callFigures(o: BenchOptions, ranks: Ranks, name: string, call: Call): AsyncGenerator<Figure> {
  const figure = (suffix: string, measured: Spread, formula: string): Figure => ({
    op: `host_${name}${suffix}`,
    ...FACTS,
    measured,
    bound: { median: GOAL_US, min: GOAL_US, max: GOAL_US },
    formula: `${formula}: pack, FFI, launch; nothing is waited for. bound: the goal of ${GOAL_US} us`,
    ...(suffix === "" ? { goal: 1 } : {}),
  });
  const { busy, idle } = await callCost(o, ranks, call);
  if (busy) yield figure("", busy, "one call while the device is busy");
  yield figure("_idle", idle, "one call that finds the device at rest");
}

/** What is timed of a call: the call itself, or giving back what it left. */
export type Timed = "call" | "release";

/** What a call costs on a busy device, where it can be kept busy, and on one at rest. */
export async function callCost(
  o: BenchOptions,
  ranks: Ranks,
  call: Call,
  calls: number = CALLS,
  timed: Timed = "call",
): Promise<{ busy: Spread | undefined; idle: Spread }> {
  const idle = await batches(o, () => timeOf(call, timed, true));
  return {
    busy: ranks.hasGate ? await busyBatches(o, ranks, () => timeOf(call, timed, false), calls) : undefined,
    idle,
  };
}

/** Microseconds of one call, or of its release. `ended`: waits for its end before it gives back what it left. */
async function timeOf(call: Call, timed: Timed, ended: boolean): Promise<number> {
  const begin = nowUs();
  const pending = call();
  const us = nowUs() - begin;
  const called = pending instanceof Promise ? await pending : pending;
  if (ended) await called.event;
  const releaseBegin = nowUs();
  called[Symbol.dispose]();
  return timed === "call" ? us : nowUs() - releaseBegin;
}

/** Calls behind a shut gate. */
async function busyBatches(o: BenchOptions, ranks: Ranks, time: () => Promise<number>, calls: number): Promise<Spread> {
  const medians: number[] = [];
  for (let b = 0; b < o.repetitions; b++) {
    const opened = ranks.shut(ranks.lanes, BUSY_MS), samples: number[] = [];
    for (let i = 0; i < calls; i++) samples.push(await time());
    await Promise.all(opened);
    await ranks.rest();
    medians.push(spreadOf(samples).median);
  }
  return spreadOf(medians);
}

/** Median of each batch of calls, then the spread of those. Long calls make smaller batches. */
async function batches(options: BenchOptions, call: () => number | Promise<number>): Promise<Spread> {
  const repeat = async (most: number): Promise<number[]> => {
    const samples: number[] = [], end = nowUs() + 5000 * options.chainMs;
    do samples.push(await call()); while (samples.length < most && nowUs() < end);
    return samples;
  };
  await repeat(WARM_CALLS);
  const medians: number[] = [];
  for (let b = 0; b < options.repetitions; b++) medians.push(spreadOf(await repeat(CALLS)).median);
  return spreadOf(medians);
}
