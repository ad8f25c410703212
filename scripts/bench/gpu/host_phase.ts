/**
 * What calls cost the host, and what they leave in its memory.
 *
 * In: options. Out: figures: microseconds of checks, packing, FFI and launch of one call of one rank, on a busy device and on one at
 * rest; bytes of the heap that thousands of calls leave behind. Called by bench.ts. A call is given no stream, so it is the buffer's own,
 * which then waits for it; with `asyncFinish` (`_async`) it does not. What a dispatch's result costs to release stands by itself.
 */
import process from "node:process";
import { setFlagsFromString } from "node:v8";
import { runInNewContext } from "node:vm";
import { type Call, callCost, type Timed } from "../host.ts";
import type { BenchOptions } from "../options.ts";
import { Ranks } from "../ranks.ts";
import { spreadOf } from "../timing.ts";
import { hasGraphsOf } from "./features.ts";
import type { GpuFigure, Report } from "./report.ts";

/** A stream takes about a thousand launches, waits and records before it makes the host wait. */
export const CALLS = 100;
/** Calls in a round. A process grows in its first some ten thousand: garbage is collected late, and its room is kept. */
const HEAP_CALLS = 8000;
const HEAP_ROUNDS = 3;
/** Batches of calls. */
export const MOST_REPETITIONS = 5;

/** Collects garbage, where the runtime lets a program do so. */
function collect(): boolean {
  const { Bun } = globalThis as { Bun?: { gc(force: boolean): void } };
  if (Bun) {
    Bun.gc(true);
    return true;
  }
  try {
    setFlagsFromString("--expose-gc");
    (runInNewContext("gc") as () => void)();
    return true;
  } catch {
    return false;
  }
}

/** Calls of one rank with one token. */
export async function hostPhase(report: Report, options: BenchOptions): Promise<void> {
  const { hidden, topk, experts } = options, tokens = 1;
  await using ranks = await Ranks.create(1, { ...options, numSms: 0 }, {
    hidden,
    numExperts: experts,
    numTopk: topk,
    maxTokensPerRank: tokens,
    numSlots: 4,
    timeoutMs: 10_000,
  });
  const buffer = ranks.buffers[0]!;
  using x = buffer.tensor("bf16", [tokens, hidden], new Uint16Array(tokens * hidden));
  using topkIdx = buffer.tensor("i32", [tokens, topk], Int32Array.from({ length: tokens * topk }, (_, i) => i % topk));
  using out = buffer.tensor("bf16", [tokens, hidden]);
  using held = await buffer.dispatch(x, { topkIdx });
  const { handle } = held;
  const calls: Record<string, Call> = {
    dispatch: () => buffer.dispatch(x, { topkIdx, cpuSync: false }),
    dispatch_cached: () => buffer.dispatch(x, { handle }),
    combine: () => buffer.combine(x, handle, { out }),
  };
  const asyncFinish = true;
  const others: Record<string, Call> = {
    dispatch_async: () => buffer.dispatch(x, { topkIdx, cpuSync: false, asyncFinish }),
    dispatch_cached_async: () => buffer.dispatch(x, { handle, asyncFinish }),
    combine_async: () => buffer.combine(x, handle, { out, asyncFinish }),
  };
  const repeated = { ...options, repetitions: Math.min(MOST_REPETITIONS, options.repetitions) };
  const facts: Omit<GpuFigure, "op" | "us"> = {
    phase: "host",
    form: "host",
    ranks: 1,
    numSms: buffer.numSms,
    tokens,
    dtype: "none",
    layout: "none",
  };
  const cost = async (name: string, call: Call, timed: Timed = "call"): Promise<void> => {
    try {
      const { busy, idle } = await callCost(repeated, ranks, call, CALLS, timed);
      if (busy) report.add({ ...facts, op: `host_${name}_busy`, us: busy });
      report.add({ ...facts, op: `host_${name}_idle`, us: idle });
    } catch (error) {
      report.trouble(`host: ${name}: ${(error as Error).message}`);
    }
  };
  for (const [name, call] of Object.entries({ ...calls, ...others })) await cost(name, call);
  await cost("release", calls["dispatch_cached"]!, "release");
  if (hasGraphsOf(buffer)) {
    using graph = buffer.capture(buffer.stream, (operations) => operations.combine(x, handle, { out }));
    await cost("graph_launch", () => ({ event: graph.launch(), [Symbol.dispose]: () => {} }));
  }
  for (const [name, call] of Object.entries(calls)) {
    try {
      const left = await heapLeft(call, {
        calls: options.gpu.quick ? HEAP_CALLS / 8 : HEAP_CALLS,
        rest: () => ranks.rest(),
      });
      report.add({ ...facts, op: `heap_${name}`, unit: "B", us: left.perCall, more: left.more });
    } catch (error) {
      report.trouble(`host: memory of ${name}: ${(error as Error).message}`);
    }
  }
}

/**
 * Bytes that a call leaves on the heap for good: what is there after two rounds of calls and collections, less after one; and how
 * the process grew in the first round and in the last.
 */
async function heapLeft(
  call: Call,
  { calls: count, rest }: { calls: number; rest: () => Promise<void> },
): Promise<{ perCall: GpuFigure["us"]; more: Record<string, number | string> }> {
  const calls = async (): Promise<void> => {
    for (let i = 0; i < count; i++) {
      const pending = call(), called = pending instanceof Promise ? await pending : pending;
      called[Symbol.dispose]();
      if (i % 50 === 49) await rest();
    }
  };
  let collected = false;
  const heap = async (): Promise<number> => {
    for (let i = 0; i < 4; i++) { // finalizers give native events back, a turn after they were found
      collected = collect();
      await new Promise((resolve) => setTimeout(resolve, 5));
    }
    return process.memoryUsage().heapUsed;
  };
  const used: number[] = [], rss: number[] = [];
  for (let round = 0; round <= HEAP_ROUNDS; round++) {
    if (round === 0) rss.push(process.memoryUsage().rss);
    await calls();
    used.push(await heap());
    rss.push(process.memoryUsage().rss);
  }
  const left = used.slice(1).map((after, round) => (after - used[round]!) / count),
    { median, min, max } = spreadOf(left);
  return {
    perCall: { median: Math.max(0, median), min, max: Math.max(0, max) }, // what a round has freed is no call's
    more: {
      calls: count * (HEAP_ROUNDS + 1),
      rssFirst: (rss[1]! - rss[0]!) / count,
      rssLast: (rss.at(-1)! - rss.at(-2)!) / count,
      collected: collected ? "yes" : "no: the runtime has no gc() here",
    },
  };
}
