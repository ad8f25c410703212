/**
 * Ceilings that move rows as the calls do: a plain scatter for dispatches, a plain pull for combines.
 *
 * In: a stage of the main size. Out: figures; what moves rows is compared with the naive way byte by byte before it is timed.
 * Called by bench.ts, before the calls. A copy reads and writes one stream of memory; a dispatch writes several rows for each that
 * it reads, which the memory does faster or slower. So the best kernel of either kind is what shares are taken of, see report.ts.
 * Between devices a combine could push its rows, too, to where their owner sums them: that is timed beside the pull. Few
 * multiprocessors end at what they can store, however fast the memory is: that is timed as well, on one device. The kernels run
 * one a rank, without any word between the ranks: some blocks that stay, and a block a token, of which the faster counts.
 */
import { NaiveCombine, NaiveDispatch } from "./naive.ts";
import { PlainPull, PlainPush, PlainScatter, PlainStore } from "./plain_kernels.ts";
import type { NaiveWork } from "./work.ts";
import { type NewContext, World } from "./main_phase.ts";
import type { GpuFigure } from "./report.ts";
import type { Routing } from "./routes.ts";

/** Blocks of a rank's kernel: a few that stay on its share of the multiprocessors, or one a token. */
const RESIDENT_BLOCKS_A_SM = 4;
const BLOCK_A_TOKEN = 65535;
const STORED_BYTES = 2 ** 30;

/** All patterns that goals are about; what `numSms` multiprocessors a rank can store. */
export async function plainCeilings(
  newContext: NewContext,
  routing: Routing,
  numSms: readonly number[],
): Promise<void> {
  for (const layout of ["rank", "expert"] as const) {
    const context = await newContext(), { naive: library, stage } = context;
    if (typeof library === "string") return;
    const world = new World(context, routing, "ceiling"), { loaded } = world, route = routing[layout];
    const work: NaiveWork = { library, stage, loaded, route };
    try {
      for (const dtype of ["bf16", "fp8"] as const) await scatters(world, work, dtype);
      await pulls(world, work);
      if (layout === "rank") await stores(world, work, numSms);
      world.release();
    } catch (error) {
      context.failed(`ceiling: ${layout} layout`, error);
    }
  }
}

type Facts = Omit<GpuFigure, "op" | "phase" | "form" | "ranks" | "tokens" | "us" | "measured">;

async function scatters(world: World, work: NaiveWork, dtype: "bf16" | "fp8"): Promise<void> {
  const { stage, route } = work, rows = stage.rows(dtype), [buffer] = stage.ranks.buffers, { ranksOnDevice } = buffer!;
  if (rows.partBytes.some((bytes) => bytes % 16 !== 0)) return; // its vectors are of 16 bytes
  const facts: Facts = {
    numSms: 0,
    dtype: rows.dtype,
    layout: route.layout,
    ...world.traffic(route, rows.partBytes.reduce((a, b) => a + b, 0)),
  };
  using naive = new NaiveDispatch(work, rows);
  await naive.once();
  for (const blocks of [Math.ceil(RESIDENT_BLOCKS_A_SM * buffer!.capabilities.numSms / ranksOnDevice), BLOCK_A_TOKEN]) {
    using plain = new PlainScatter(work, rows, blocks);
    await plain.once();
    await plain.compare(`plain scatter of ${dtype}, ${route.layout} layout`, world.context.verifier, naive);
    await world.time(plain.chain, { op: "plain_scatter", ...facts, more: { blocks } });
  }
}

async function stores(world: World, work: NaiveWork, numSms: readonly number[]): Promise<void> {
  const { ranksOnDevice } = work.stage.ranks.buffers[0]!;
  for (const sms of numSms) {
    using plain = new PlainStore(work, STORED_BYTES, sms * ranksOnDevice);
    const facts = { numSms: sms, dtype: "none", layout: "none", bytes: STORED_BYTES } as const;
    await world.time(plain.chain, { op: "plain_store", ...facts });
  }
}

async function pulls(world: World, work: NaiveWork): Promise<void> {
  const { stage, route, loaded } = work, weights = route.layout === "expert" ? loaded.topkWeights : undefined;
  using rows = new NaiveDispatch(work, stage.rows("bf16"));
  await rows.once();
  const y = rows.result.map(([address]) => address!);
  using naive = new NaiveCombine(work, y, weights);
  await naive.once();
  using plain = new PlainPull(work, y, weights);
  await plain.once();
  await plain.compare(`plain pull, ${route.layout} layout`, world.context.verifier, naive);
  const facts: Facts = { numSms: 0, dtype: "bf16", layout: route.layout, ...world.traffic(route, 2 * stage.hidden) };
  await world.time(plain.chain, { op: "plain_pull", ...facts });
  if (facts.linkBytes === undefined) return;
  // Between devices the rows can be pushed as well, to where their owner sums them.
  using push = new PlainPush(work, y, weights);
  await push.once();
  await push.compare(`plain push, ${route.layout} layout`, world.context.verifier, naive);
  await world.time(push.chain, { op: "plain_push", ...facts });
}
