/**
 * What a call costs the host: pack, FFI and launch, without waiting; and what a promise adds to the end of an operation.
 *
 * In: options. Out: figures in microseconds of one call on one rank; the median, least and most of batches' medians, because a
 * single call may be hit by a collection or by the scheduler. Called by scripts/bench.ts. Each call finds an idle stream, so
 * the price of waking the stream's thread is in it.
 */
import type { EpEvent, Tensor } from "../../mod.ts";
import { expertRows } from "./verify.ts";
import type { BenchOptions } from "./options.ts";
import { nowUs, Ranks } from "./ranks.ts";
import type { Figure } from "./report.ts";
import { type Spread, spreadOf } from "./timing.ts";

const CALLS = 300;
const WARM_CALLS = 2000;
/** A call's cost that was promised. */
const GOAL_US = 10;

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
  });
  const buffer = ranks.buffers[0]!;
  using x = buffer.tensor("bf16", [tokens, hidden], new Uint16Array(tokens * hidden));
  using topkIdx = buffer.tensor("i32", [tokens, topk], Int32Array.from({ length: tokens * topk }, (_, i) => i % topk));
  using topkWeights = buffer.tensor("f32", [tokens, topk], new Float32Array(tokens * topk).fill(1 / topk));
  using out = buffer.tensor("bf16", [tokens, hidden]);
  const batches = (call: () => Promise<number>) => median(options, call);
  const facts = { tokens, ranks: 1, dtype: "none", layout: "none", bytes: 0 } as const;
  const figure = (op: string, measured: Spread): Figure => ({
    op,
    ...facts,
    measured,
    bound: { median: GOAL_US, min: GOAL_US, max: GOAL_US },
    formula: `one call, ${tokens} token: pack, FFI, launch; nothing is waited for. bound: the goal of ${GOAL_US} us`,
    goal: 1,
  });
  if (ops.has("host")) {
    const handle = await buffer.dispatch(x, { topkIdx }).then((result) => {
      const kept = result.handle.keep();
      result.release();
      return kept;
    });
    yield figure(
      "host_dispatch",
      await batches(() => timeDispatch(() => buffer.dispatch(x, { topkIdx, cpuSync: false }))),
    );
    yield figure("host_dispatch_cached", await batches(() => timeDispatch(() => buffer.dispatch(x, { handle }))));
    yield figure("host_combine", await batches(() => timeDispatch(() => buffer.combine(x, handle, { out }))));
    handle.release();
    yield figure(
      "host_ll_dispatch",
      await batches(() => {
        const begin = nowUs();
        const result = buffer.lowLatencyDispatch(x, { topkIdx });
        return ended(nowUs() - begin, result.event, () => result.release());
      }),
    );
    using ll = buffer.lowLatencyDispatch(x, { topkIdx });
    const y = ll.handle.expertOutput();
    for (let e = 0; e < topk; e++) buffer.fill(expertRows(y, e, tokens) as Tensor, 0);
    yield figure(
      "host_ll_combine",
      await batches(() => {
        const begin = nowUs();
        const result = buffer.lowLatencyCombine(y, { topkIdx, topkWeights, handle: ll.handle, out });
        return ended(nowUs() - begin, result.event, () => result[Symbol.dispose]());
      }),
    );
  }
  if (ops.has("wake")) {
    const promise = await batches(async () => {
      const begin = nowUs();
      await buffer.barrier();
      return nowUs() - begin;
    });
    const polled = await batches(() => {
      const begin = nowUs(), event = buffer.barrier();
      while (!event.done);
      return Promise.resolve(nowUs() - begin);
    });
    yield {
      op: "wake",
      ...facts,
      measured: promise,
      bound: polled,
      formula:
        "a barrier of one rank, awaited; bound: the same, its event asked in a busy loop, without the event loop",
    };
  }
}

/** Median of each batch of calls, then the spread of those. */
async function median(options: BenchOptions, call: () => Promise<number>): Promise<Spread> {
  for (let i = 0; i < WARM_CALLS; i++) await call();
  const medians: number[] = [];
  for (let b = 0; b < options.repetitions; b++) {
    const samples: number[] = [];
    for (let i = 0; i < CALLS; i++) samples.push(await call());
    medians.push(spreadOf(samples).median);
  }
  return spreadOf(medians);
}

/** The time until an asynchronous call returns its promise: by then it has launched. */
async function timeDispatch(
  call: () => Promise<{ readonly event: EpEvent; release?: () => void; [Symbol.dispose](): void }>,
): Promise<number> {
  const begin = nowUs();
  const pending = call();
  const us = nowUs() - begin;
  const result = await pending;
  return ended(us, result.event, () => result[Symbol.dispose]());
}

async function ended(us: number, event: EpEvent, release: () => void): Promise<number> {
  await event;
  release();
  return us;
}
