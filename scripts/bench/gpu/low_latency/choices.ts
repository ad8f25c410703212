/**
 * What options of low-latency calls cost: the same calls with one of them changed.
 *
 * In: a size. Out: figures beside those of the calls as they are by default. Called by phase.ts.
 */
import type { Fp8Options } from "../../../../lib/dtype.ts";
import type { CombineChoices, DispatchChoices } from "../../low_latency_calls.ts";
import type { Size } from "./phase.ts";
import { LowLatencyWorld } from "./world.ts";

const PHASE = "low_latency_options";

/** Every option, one at a time. */
export async function choicesOfCalls({ routing, numSms, newContext }: Size): Promise<void> {
  const piece = async (
    what: string,
    choices: { maskOnTimeout?: boolean },
    run: (low: LowLatencyWorld) => Promise<void>,
  ): Promise<void> => {
    const context = await newContext(choices), low = new LowLatencyWorld(context, routing, PHASE);
    try {
      await run(low);
      low.release();
    } catch (error) {
      context.failed(`${PHASE}: ${what} of ${routing.tokens} tokens`, error);
    }
  };
  for (const maskOnTimeout of [false, true]) {
    const suffix = maskOnTimeout ? "_mask_on_timeout" : "";
    await piece(`dispatch${suffix}`, { maskOnTimeout }, (low) => dispatches(low, numSms, suffix));
    await piece(`combine${suffix}`, { maskOnTimeout }, (low) => combines(low, numSms, suffix));
  }
}

/** With a suffix, of the buffers' options, only the call as it is. */
async function dispatches(low: LowLatencyWorld, numSms: number, suffix: string): Promise<void> {
  const { stage: { ranks: { buffers } } } = low;
  const waits = buffers.map((b) => b.tensor("i64", [buffers.length], new BigInt64Array(buffers.length)));
  const stats = buffers.map((b) => b.tensor("i32", [b.numLocalExperts], new Int32Array(b.numLocalExperts)));
  const kinds: Record<string, { choices: (rank: number) => DispatchChoices; fp8?: Fp8Options }> = {
    "": { choices: () => ({}) },
    _wait_stats: { choices: (r) => ({ waitStats: waits[r]! }) },
    _expert_stats: { choices: (r) => ({ expertStats: stats[r]! }) },
    _row_major_scales: { choices: () => ({ scalesColumnMajor: false }) },
    _round_scale: { choices: () => ({ roundScale: true }), fp8: { round: true } },
    _ue8m0: { choices: () => ({ roundScale: true, useUe8m0: true }), fp8: { round: true, ue8m0: true } },
    _hook: { choices: () => ({ recvHook: true }) },
  };
  for (const [kind, { choices, fp8 = {} }] of Object.entries(kinds)) {
    if (suffix === "" || kind === "") await low.dispatch({ op: `ll_dispatch${kind}${suffix}`, numSms }, choices, fp8);
  }
  if (suffix === "") {
    const { world, stage } = low;
    using naive = await world.naiveDispatch(stage.rows("bf16"), world.routing.expert);
    await low.dispatch({ op: "ll_dispatch_bf16", numSms }, () => ({ fp8: false }), null, naive);
  }
  for (const tensor of [...waits, ...stats]) tensor.release();
}

async function combines(low: LowLatencyWorld, numSms: number, suffix: string): Promise<void> {
  const { stage: { ranks } } = low, { buffers } = ranks, held = low.dispatchAll();
  const waits = buffers.map((b) => b.tensor("i64", [buffers.length], new BigInt64Array(buffers.length)));
  try {
    const y = held.map(({ handle }) => handle.expertOutput());
    await low.fill(y);
    const kinds: Record<string, (rank: number) => CombineChoices> = {
      "": () => ({}),
      _wait_stats: (r) => ({ waitStats: waits[r]! }),
      _hook: () => ({ recvHook: true }),
    };
    for (const [kind, choices] of Object.entries(kinds)) {
      if (suffix === "" || kind === "") {
        await low.combine({ op: `ll_combine${kind}${suffix}`, numSms }, { held, y, choices });
      }
    }
    if (suffix === "") await copied(low, { held, numSms });
  } finally {
    await ranks.rest();
    for (const result of held) result.release();
    for (const tensor of waits) tensor.release();
  }
}

/** From tensors of the user's: rows are first put where peers read, as they are or cast, which in place would leave e4m3 to the next. */
async function copied(
  low: LowLatencyWorld,
  { held, numSms }: { held: ReturnType<LowLatencyWorld["dispatchAll"]>; numSms: number },
): Promise<void> {
  const own = low.stage.ranks.buffers.map((b, r) => b.tensor("bf16", held[r]!.handle.expertOutput().shape));
  await low.fill(own);
  await low.combine({ op: "ll_combine_copy", numSms }, { held, y: own });
  await low.combine({ op: "ll_combine_copy_fp8", numSms }, { held, y: own, choices: () => ({ fp8: true }) });
  for (const tensor of own) tensor.release();
}
