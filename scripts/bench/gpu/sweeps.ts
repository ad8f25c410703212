/**
 * How a call's time grows: over tokens, multiprocessors and ranks; and the naive way beside some sizes.
 *
 * In: stages and routings. Out: figures and linear fits. Called by bench.ts. Small calls end before one thread has launched eight
 * ranks, so some sizes are timed as they are launched, too, see clock.ts; graphs.ts has them in graphs.
 */
import type { Form } from "./clock.ts";
import { type NewContext, type PhaseContext, World } from "./main_phase.ts";
import type { GpuFigure, Report } from "./report.ts";
import type { Routing } from "./routes.ts";

/** All sizes. `compare`: those that are launched and held against the naive way. `nextSize`: whether there is time for one more. */
export async function tokenSweep(
  newContext: NewContext,
  routings: readonly Routing[],
  { numSms, compare, nextSize }: { numSms: number; compare: readonly number[]; nextSize: () => boolean },
): Promise<void> {
  const { report } = await newContext();
  for (const routing of routings) {
    if (!nextSize()) {
      report.trouble(`tokens: no time for ${routing.tokens} tokens and more`);
      break;
    }
    for (const [what, run] of [["dispatch", sizeOfDispatch], ["combine", sizeOfCombine]] as const) {
      const context = await newContext(), world = new World(context, routing, "tokens");
      try {
        await run(world, numSms, compare.includes(routing.tokens));
        world.release();
      } catch (error) {
        context.failed(`tokens: ${what} of ${routing.tokens} tokens`, error);
      }
    }
  }
  fits(report);
}

type Facts = Omit<GpuFigure, "phase" | "op" | "form" | "ranks" | "tokens" | "us" | "measured">;

const FORMS_OF_CALLS = ["chain", "launched"] as const;

async function sizeOfDispatch(world: World, numSms: number, compared: boolean): Promise<void> {
  const { stage, routing: { rank: route, tokens } } = world, rows = stage.rows("bf16");
  const facts: Facts = { numSms, dtype: "bf16", layout: "rank", ...world.traffic(route, 2 * stage.hidden) };
  using naive = compared ? await world.naiveDispatch(rows, route) : undefined;
  const what = `dispatch of ${tokens} tokens`;
  const handles = await world.checkedHandles(what, rows, route, naive);
  await world.checkCached(`${what}, cached`, { rows, route, handles, numSms, naive });
  const cached = world.cached(rows, handles, numSms);
  await world.time(cached, { op: "dispatch_cached", ...facts });
  if (compared) {
    await world.time(cached, { op: "dispatch_cached", ...facts }, "launched");
    await world.time(world.full(rows, numSms, false), { op: "dispatch_full", ...facts });
    await world.time(world.full(rows, numSms, true), { op: "dispatch_awaited", ...facts }, "launched");
  }
  if (naive) {
    for (const form of FORMS_OF_CALLS) {
      await world.time(naive.chain, { ...facts, op: "naive_dispatch", numSms: 0 }, form);
    }
  }
  for (const handle of handles) handle.release();
}

async function sizeOfCombine(world: World, numSms: number, compared: boolean): Promise<void> {
  const { stage, routing: { rank: route, tokens } } = world;
  const facts: Facts = { numSms, dtype: "bf16", layout: "rank", ...world.traffic(route, 2 * stage.hidden) };
  const results = await stage.route(world.loaded, stage.rows("bf16"));
  try {
    const y = await world.outputs(results, route, 1);
    using naive = compared ? await world.naiveCombine(y, route) : undefined;
    const chain = world.combine(y, results, numSms);
    await world.checkCombine(`combine of ${tokens} tokens`, chain, { route, shift: 1, weighted: false, naive });
    await world.time(chain, { op: "combine", ...facts });
    if (compared) await world.time(chain, { op: "combine", ...facts }, "launched");
    if (naive) {
      for (const form of FORMS_OF_CALLS) {
        await world.time(naive.chain, { ...facts, op: "naive_combine", numSms: 0 }, form);
      }
    }
  } finally {
    for (const result of results) result.release();
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
    if (figure.phase !== "tokens" && figure.phase !== "graphs" || !figure.bytes) continue;
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
  const facts = { dtype: "bf16", layout: "rank", ...world.traffic(route, 2 * stage.hidden) } as const;
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
      ...world.traffic(route, fp8.partBytes.reduce((a, b) => a + b, 0)),
    });
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
  graph: "a graph of many calls a rank (how many stands beside), replays enqueued behind a gate, divided by the calls",
};
