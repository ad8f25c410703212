/**
 * How a call's time grows: over tokens, multiprocessors and ranks; and the naive way at every size.
 *
 * In: stages and routings. Out: figures and linear fits. Called by bench.ts. Small calls end before one thread has launched eight
 * ranks, so each size is timed in three forms, see clock.ts; the naive way in the same three.
 */
import type { DispatchHandle, DispatchResult, Graph, Payload, Recorder, Tensor } from "../../../mod.ts";
import type { Chain } from "../timing.ts";
import { checkRows, checkSums } from "./checks.ts";
import { all, type Form } from "./clock.ts";
import { hasGraphsOf } from "./features.ts";
import { type NewContext, type PhaseContext, World } from "./main_phase.ts";
import type { NaiveCombine, NaiveDispatch } from "./naive.ts";
import type { GpuFigure, Report } from "./report.ts";
import type { Routing } from "./routes.ts";
import type { Stage } from "./stage.ts";

/** The naive way is compared up to here. */
const MOST_NAIVE_TOKENS = 4096;

/** All sizes. `left`: whether there is time for another one. */
export async function tokenSweep(
  newContext: NewContext,
  routings: readonly Routing[],
  numSms: number,
  left: () => boolean,
): Promise<void> {
  const { report } = await newContext();
  for (const routing of routings) {
    if (!left()) {
      report.trouble(`tokens: no time for ${routing.tokens} tokens and more`);
      break;
    }
    for (const [what, run] of [["dispatch", sizeOfDispatch], ["combine", sizeOfCombine]] as const) {
      const context = await newContext(), world = new World(context, routing, "tokens");
      try {
        await run(world, numSms);
        world.release();
      } catch (error) {
        context.failed(`tokens: ${what} of ${routing.tokens} tokens`, error);
      }
    }
  }
  fits(report);
}

/** Does something unless it has failed before. */
async function unlessBroken({ context }: World, what: string, run: () => Promise<void>): Promise<void> {
  if (context.broken.has(what)) return;
  context.broken.add(what);
  await run();
  context.broken.delete(what);
}

const hasGraphs = (stage: Stage): boolean => hasGraphsOf(stage.ranks.buffers[0]!);

type Facts = Omit<GpuFigure, "phase" | "op" | "form" | "ranks" | "tokens" | "us" | "measured">;

async function naiveForms(world: World, op: string, naive: NaiveDispatch | NaiveCombine, facts: Facts): Promise<void> {
  for (const form of ["chain", "launched"] as const) await world.time(naive.chain, { op, ...facts, numSms: 0 }, form);
  if (!hasGraphs(world.stage)) return;
  await unlessBroken(world, `${op} graph`, async () => {
    await world.time(naive.graph, { op, ...facts, numSms: 0 }, "graph");
  });
}

async function sizeOfDispatch(world: World, numSms: number): Promise<void> {
  const { stage, routing: { rank: route, tokens } } = world, rows = stage.rows("bf16");
  const facts: Facts = { numSms, dtype: "bf16", layout: "rank", bytes: world.bytes(route, 2 * stage.hidden) };
  using naive = tokens <= MOST_NAIVE_TOKENS ? await world.naiveDispatch(rows, route) : undefined;
  const what = `dispatch of ${tokens} tokens`;
  const handles = await world.checkedHandles(what, rows, route, naive);
  await world.checkCached(`${what}, cached`, { rows, route, handles, numSms, naive });
  const cached = world.cached(rows, handles, numSms);
  for (const form of ["chain", "launched"] as const) {
    await world.time(cached, { op: "dispatch_cached", ...facts }, form);
  }
  await world.time(world.full(rows, numSms, false), { op: "dispatch_full", ...facts });
  await world.time(world.full(rows, numSms, true), { op: "dispatch_awaited", ...facts }, "launched");
  if (naive) await naiveForms(world, "naive_dispatch", naive, facts);
  if (hasGraphs(stage)) await dispatchGraphs(world, handles, facts);
  for (const handle of handles) handle.release();
}

async function sizeOfCombine(world: World, numSms: number): Promise<void> {
  const { stage, routing: { rank: route, tokens } } = world;
  const facts: Facts = { numSms, dtype: "bf16", layout: "rank", bytes: world.bytes(route, 2 * stage.hidden) };
  const results = await stage.route(world.loaded, stage.rows("bf16"));
  try {
    const y = await world.outputs(results, route, 1);
    using naive = tokens <= MOST_NAIVE_TOKENS ? await world.naiveCombine(y, route) : undefined;
    const chain = world.combine(y, results, numSms);
    await world.checkCombine(`combine of ${tokens} tokens`, chain, { route, shift: 1, weighted: false, naive });
    for (const form of ["chain", "launched"] as const) await world.time(chain, { op: "combine", ...facts }, form);
    if (naive) await naiveForms(world, "naive_combine", naive, facts);
    if (hasGraphs(stage)) {
      await unlessBroken(world, "combine graph", () => combineGraph(world, y, results, facts));
      await unlessBroken(world, "layer graph", () => layerGraph(world, facts));
    }
  } finally {
    for (const result of results) result.release();
  }
}

/** A graph a rank; `release` ends them and what they made. */
async function captured<T>(
  stage: Stage,
  record: (operations: Recorder, rank: number) => T,
): Promise<{ graphs: Graph<T>[]; chain: Chain; once: () => Promise<void> }> {
  await stage.ranks.rest(); // what a capture waits for must have ended
  const graphs = stage.ranks.buffers.map((b, r) => b.capture(b.stream, (operations) => record(operations, r)));
  const launch = () => graphs.map((graph) => graph.launch());
  return {
    graphs,
    chain: { lanes: stage.ownLanes, callsPerStep: 4, step: () => void launch() },
    once: async () => {
      await stage.ranks.rest();
      await all(launch());
    },
  };
}

async function dispatchGraphs(world: World, handles: readonly DispatchHandle[], facts: Facts): Promise<void> {
  const { stage, routing: { tokens, rank: route }, loaded, context: { verifier } } = world, rows = stage.rows("bf16");
  const { topkIdx, topkWeights } = loaded, { numSms } = facts;
  const kinds = {
    dispatch_cached: (r: number) => ({ handle: handles[r]!, numSms }),
    dispatch_full: (r: number) => ({ topkIdx: topkIdx[r]!, topkWeights: topkWeights[r]!, numSms }),
  };
  for (const [op, of] of Object.entries(kinds)) {
    await unlessBroken(world, `${op} graph`, async () => {
      const { graphs, chain, once } = await captured(
        stage,
        (operations, r) => operations.dispatch(rows.payload(r, tokens), of(r)),
      );
      try {
        graphs.forEach(({ results }, r) => stage.ranks.buffers[r]!.fill(results.x as Tensor, 0xa5));
        await once();
        const results = graphs.map((graph) => graph.results);
        await checkRows(`${op} of ${tokens} tokens, graph`, { stage, loaded, verifier, rows, route }, results);
        await world.time(chain, { op, ...facts }, "graph");
      } finally {
        for (const graph of graphs) {
          graph.release();
          graph.results.release();
        }
      }
    });
  }
}

async function combineGraph(
  world: World,
  y: readonly Tensor[],
  held: readonly DispatchResult<Payload>[],
  facts: Facts,
): Promise<void> {
  const { stage, routing: { tokens, rank: route }, loaded, context: { verifier }, out } = world, { numSms } = facts;
  const { graphs, chain, once } = await captured(
    stage,
    (operations, r) => operations.combine(y[r]!, held[r]!.handle, { out: out[r]!, numSms }),
  );
  try {
    world.poisonOut();
    await once();
    const what = `combine of ${tokens} tokens, graph`;
    await checkSums(what, { stage, loaded, verifier, route, shift: 1, weighted: false }, out);
    await world.time(chain, { op: "combine", ...facts }, "graph");
  } finally {
    for (const graph of graphs) graph.release();
  }
}

/** A layer: routing, dispatch, no experts, combine in place. */
async function layerGraph(world: World, facts: Facts): Promise<void> {
  const { stage, routing: { tokens, rank: route }, loaded, context: { verifier }, out } = world, { numSms } = facts;
  const rows = stage.rows("bf16"), { topkIdx, topkWeights } = loaded;
  const { graphs, chain, once } = await captured(stage, (operations, r) => {
    const routed = { topkIdx: topkIdx[r]!, topkWeights: topkWeights[r]!, numSms };
    const recv = operations.dispatch(rows.payload(r, tokens), routed);
    operations.combine(recv.handle.expertOutput(), recv.handle, { out: out[r]!, numSms });
    return recv;
  });
  try {
    await once();
    const results = graphs.map((graph) => graph.results);
    await checkRows(`layer of ${tokens} tokens, graph`, { stage, loaded, verifier, rows, route }, results);
    await world.time(chain, { op: "dispatch_full_combine", ...facts, bytes: 2 * (facts.bytes ?? 0) }, "graph");
  } finally {
    for (const graph of graphs) {
      graph.release();
      graph.results.release();
    }
  }
}

/** Fixed microseconds and microseconds a MB, by least squares of relative errors. */
export function fitted(points: readonly { mb: number; us: number }[]): { fixed: number; perMb: number; worst: number } {
  let w = 0, x = 0, y = 0, xx = 0, xy = 0;
  for (const { mb, us } of points) {
    const weight = 1 / (us * us);
    w += weight;
    x += weight * mb;
    y += weight * us;
    xx += weight * mb * mb;
    xy += weight * mb * us;
  }
  const perMb = (w * xy - x * y) / (w * xx - x * x), fixed = (y - perMb * x) / w;
  const worst = Math.max(...points.map(({ mb, us }) => Math.abs(fixed + perMb * mb - us) / us));
  return { fixed, perMb, worst };
}

function fits(report: Report): void {
  const series = new Map<string, GpuFigure[]>();
  for (const figure of report.figures) {
    if (figure.phase !== "tokens" || !figure.bytes) continue;
    const name = `${figure.op} ${figure.form}`;
    series.set(name, [...series.get(name) ?? [], figure]);
  }
  report.say("\n  time = fixed + bytes * slope, least squares of relative errors over the token sweep:");
  for (const [name, figures] of series) {
    if (figures.length < 3) continue;
    const { fixed, perMb, worst } = fitted(figures.map(({ bytes, us }) => ({ mb: bytes! / 1e6, us: us.median })));
    report.say(
      `  ${name.padEnd(32)} ${fixed.toFixed(1).padStart(8)} us + ${perMb.toFixed(4)} us/MB ` +
        `(${(1000 / perMb).toFixed(0)} GB/s), worst point ${(100 * worst).toFixed(0)} % off`,
    );
    report.line({ op: "fit", series: name, fixedUs: fixed, usPerMB: perMb, worst, points: figures.length });
  }
}

/** Dispatch and combine at the main size with some numbers of multiprocessors or, on other stages, of ranks. */
export async function shapeSweep(
  context: PhaseContext,
  routing: Routing,
  phase: "sms" | "ranks",
  numSms: readonly number[],
): Promise<void> {
  const world = new World(context, routing, phase), { stage } = world, { rank: route } = routing;
  const bytes = world.bytes(route, 2 * stage.hidden), facts = { dtype: "bf16", layout: "rank", bytes } as const;
  const bf16 = stage.rows("bf16"), fp8 = stage.rows("fp8");
  const handles = await world.checkedHandles(`${phase}: dispatch`, bf16, route, undefined);
  for (const sms of numSms) {
    for (const rows of [bf16, fp8]) {
      const what = `${phase}: dispatch of ${rows.dtype}, ${sms} SMs`;
      await world.checkCached(what, { rows, route, handles, numSms: sms, naive: undefined });
    }
    await world.time(world.cached(bf16, handles, sms), { op: "dispatch_cached", numSms: sms, ...facts });
    await world.time(world.cached(fp8, handles, sms), {
      op: "dispatch_fp8",
      numSms: sms,
      dtype: fp8.dtype,
      layout: "rank",
      bytes: world.bytes(route, fp8.partBytes.reduce((a, b) => a + b, 0)),
    });
    await world.time(world.full(bf16, sms, false), { op: "dispatch_full", numSms: sms, ...facts });
  }
  for (const handle of handles) handle.release();
  const results = await stage.route(world.loaded, bf16);
  try {
    const y = await world.outputs(results, route, 1);
    for (const sms of numSms) {
      const chain = world.combine(y, results, sms);
      await world.checkCombine(`${phase}: combine, ${sms} SMs`, chain, {
        route,
        shift: 1,
        weighted: false,
        naive: undefined,
      });
      await world.time(chain, { op: "combine", numSms: sms, ...facts });
    }
  } finally {
    for (const result of results) result.release();
  }
  world.release();
}

/** The forms that a figure can have, for people. */
export const FORMS: Readonly<Record<Form, string>> = {
  chain: "all calls enqueued behind a gate, then run: the device's time",
  launched: "enqueued while they run, by one thread for all ranks",
  graph: "replays of captured calls, enqueued behind a gate",
};
