/**
 * What low-latency calls cost the host when they are not captured.
 *
 * In: options. Out: figures, microseconds of one call of one rank with one token: checks, packing, FFI, launch. Called by phase.ts. How
 * they are taken stands in ../../host.ts. The halves of a call with `recvHook` are timed apart.
 */
import type { LowLatencyResult } from "../../../../mod.ts";
import { type Call, callCost } from "../../host.ts";
import type { BenchOptions } from "../../options.ts";
import { Ranks } from "../../ranks.ts";
import { CALLS, MOST_REPETITIONS } from "../host_phase.ts";
import type { Report } from "../report.ts";

/** Every call. */
export async function lowLatencyHost(report: Report, options: BenchOptions): Promise<void> {
  const { hidden, topk, experts } = options, tokens = 1;
  await using ranks = await Ranks.create(1, { ...options, numSms: 0 }, {
    hidden,
    numExperts: experts,
    numTopk: topk,
    maxTokensPerRank: tokens,
    maxLowLatencyTokensPerRank: tokens,
    numSlots: 4,
    timeoutMs: 10_000,
  });
  const buffer = ranks.buffers[0]!;
  using x = buffer.tensor("bf16", [tokens, hidden], new Uint16Array(tokens * hidden));
  using topkIdx = buffer.tensor("i32", [tokens, topk], Int32Array.from({ length: tokens * topk }, (_, i) => i % topk));
  using topkWeights = buffer.tensor("f32", [tokens, topk], new Float32Array(tokens * topk).fill(1 / topk));
  using out = buffer.tensor("bf16", [tokens, hidden]);
  using held: LowLatencyResult = buffer.lowLatencyDispatch(x, { topkIdx });
  const y = held.handle.expertOutput();
  buffer.fill(y, 0);
  const calls: Record<string, Call> = {
    ll_dispatch: () => buffer.lowLatencyDispatch(x, { topkIdx }),
    ll_combine: () => buffer.lowLatencyCombine(y, { topkIdx, topkWeights, handle: held.handle, out }),
    ll_dispatch_halves: () => {
      const result = buffer.lowLatencyDispatch(x, { topkIdx, recvHook: true });
      result.hook();
      return result;
    },
  };
  const repeated = { ...options, repetitions: Math.min(MOST_REPETITIONS, options.repetitions) };
  const facts = {
    phase: "low_latency_host",
    form: "host",
    ranks: 1,
    numSms: buffer.numSms,
    tokens,
    dtype: "none",
    layout: "low_latency",
  } as const;
  for (const [name, call] of Object.entries(calls)) {
    const { busy, idle } = await callCost(repeated, ranks, call, CALLS);
    if (busy) report.add({ ...facts, op: `host_${name}_busy`, us: busy });
    report.add({ ...facts, op: `host_${name}_idle`, us: idle });
  }
}
