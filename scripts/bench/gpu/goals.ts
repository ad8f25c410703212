/**
 * What was to be reached, and what was.
 *
 * In: the figures of a run. Out: a table, a goal a row. Called by bench.ts. Goals are about the shape of the defaults. Like is compared
 * with like: chains with chains, calls launched one by one with such calls, the host's clock with the host's clock; a share is that of
 * the fastest kernel that moves rows as the call does.
 */
import { GPU_PHASES } from "../options.ts";
import type { Form } from "./clock.ts";
import { type GpuFigure, type Report, sharesWords, us } from "./report.ts";

/** A row of the table. */
export interface Goal {
  readonly what: string;
  readonly goal: string;
  readonly reached: string;
  /** Undefined when figures are missing. */
  readonly met: boolean | undefined;
}

const NO_FIGURE = "no figure";

function share(report: Report, what: string, goal: number, wanted: Partial<GpuFigure>): Goal {
  const figure = report.find({ phase: "main", form: "chain", ...wanted });
  const bound = figure && report.boundUs(figure), shares = figure && report.shares(figure);
  return {
    what,
    goal: `>= ${(100 * goal).toFixed(0)} % of the bound`,
    reached: shares === undefined
      ? NO_FIGURE
      : `${us(figure!.us.median)} us, bound ${us(bound!)} us: ${sharesWords(shares)}`,
    met: shares === undefined ? undefined : shares.bound >= 100 * goal,
  };
}

/** At most `limit` in every one of some figures. */
function most(
  what: string,
  limit: number,
  figures: readonly GpuFigure[],
  { unit = "us", goal = "", beside = "" } = {},
): Goal {
  const worst = figures.length === 0 ? undefined : Math.max(...figures.map((figure) => figure.us.median));
  return {
    what,
    goal: goal || `<= ${limit} ${unit}`,
    reached: worst === undefined
      ? NO_FIGURE
      : figures.map((figure) => `${figure.op} ${us(figure.us.median)} ${figure.unit ?? "us"}`).join(", ") + beside,
    met: worst === undefined ? undefined : worst <= limit,
  };
}

/** What a full dispatch adds to a cached one, each way that both were timed. */
function fullGoals(report: Report, numSms: number): Goal[] {
  const ways = [
    ["chains, not awaited", "dispatch_full", "dispatch_cached", "chain"],
    ["launched, awaited", "dispatch_awaited", "dispatch_cached", "launched"],
    ["host's clock, one call to its end", "dispatch_full_until_end", "dispatch_cached_until_end", "host"],
  ] as const;
  return ways.map(([words, full, cached, form]) => {
    const [a, b] = [full, cached].map((op) => report.find({ phase: "main", op, form, numSms }));
    const extra = a && b ? a.us.median - b.us.median : undefined;
    return {
      what: `full dispatch, ${numSms} SMs: ${words}`,
      goal: "cached + <= 40 us",
      reached: extra === undefined
        ? NO_FIGURE
        : `cached + ${us(extra)} us (${us(a!.us.median)} and ${us(b!.us.median)} us)`,
      met: extra === undefined ? undefined : extra <= 40,
    };
  });
}

/** Sizes that the naive way must lose at. */
const NAIVE_SIZES = Array.from({ length: 13 }, (_, i) => 2 ** i);
/** Calls that are held against a naive way. */
const RIVALS = {
  naive_dispatch: ["dispatch_cached", "dispatch_full", "dispatch_awaited"],
  naive_combine: ["combine"],
  naive_ll_dispatch: ["ll_dispatch"],
  naive_ll_combine: ["ll_combine"],
} as const;

/** `1, 2, 4, 8` as `1 … 8` where they follow each other. */
function sizes(tokens: readonly number[]): string {
  const ordered = tokens.toSorted((a, b) => a - b), runs: number[][] = [];
  for (const size of ordered) {
    const last = runs.at(-1);
    if (last?.at(-1) === size / 2) last!.push(size);
    else runs.push([size]);
  }
  return runs.map((run) => run.length > 2 ? `${run[0]} … ${run.at(-1)}` : run.join(", ")).join(", ");
}

/** One row a call: where it wins against the naive way, and where it does not. */
function naiveGoals(report: Report, form: Form): Goal[] {
  return Object.entries(RIVALS).flatMap(([rival, ops]) => {
    const theirs = report.figures.filter((figure) =>
      figure.op === rival && figure.form === form && NAIVE_SIZES.includes(figure.tokens) && figure.phase !== "main"
    );
    const wanted = rival.startsWith("naive_ll") ? [...new Set(theirs.map(({ tokens }) => tokens))] : NAIVE_SIZES;
    return ops.flatMap((op): Goal[] => {
      const pairs = theirs.flatMap(({ phase, tokens, ranks, us: naive }) => {
        const ours = report.find({ phase, op, form, tokens, ranks });
        return ours ? [{ tokens, ours: ours.us.median, naive: naive.median }] : [];
      });
      if (pairs.length === 0) return [];
      const lost = pairs.filter(({ ours, naive }) => ours >= naive),
        missing = wanted.filter((size) => !pairs.some(({ tokens }) => tokens === size));
      const won = pairs.filter((pair) => !lost.includes(pair));
      const times = (pair: { ours: number; naive: number }): number => pair.naive / pair.ours;
      const parts = [
        won.length > 0
          ? `wins at ${sizes(won.map(({ tokens }) => tokens))} (${Math.min(...won.map(times)).toFixed(2)} to ${
            Math.max(...won.map(times)).toFixed(2)
          } times as fast)`
          : "wins nowhere",
        ...lost.map(({ tokens, ours, naive }) => `loses at ${tokens} (${us(ours)} against ${us(naive)} us)`),
        missing.length > 0 ? `not measured: ${sizes(missing)}` : "",
      ];
      return [{
        what: `against the naive way, ${form}: ${op}`,
        goal: "faster at every size",
        reached: parts.filter((part) => part !== "").join("; "),
        met: lost.length > 0 ? false : missing.length > 0 ? undefined : true,
      }];
    });
  });
}

/** Microseconds of a low-latency call of all ranks, by tokens: dispatch FP8, combine BF16 in place. */
const LOW_LATENCY = [[128, 32, 51], [8, 11, 10], [1, 8, 7]] as const;
/** The same with a device a rank, of eight. */
const LOW_LATENCY_OVER_LINKS = [[128, 35, 45]] as const;

function lowLatencyGoals(report: Report): Goal[] {
  const phase = "low_latency", { runtime, numDevices } = report.machine, ranks = 8;
  // Goals are for eight ranks, on one device or on eight.
  const limits = numDevices === 1 ? LOW_LATENCY : numDevices === ranks ? LOW_LATENCY_OVER_LINKS : [];
  if (!report.figures.some((figure) => figure.phase === phase)) return [];
  const one = (what: string, op: string, tokens: number, limit: number): Goal => {
    const figure = report.find({ phase, op, tokens, ranks }), marginal = figure?.more?.["marginal"];
    const bound = figure && report.boundUs(figure);
    return {
      what: `low latency, ${what}, ${tokens} tokens`,
      goal: `<= ${limit} us`,
      reached: figure === undefined
        ? NO_FIGURE
        : `${us(figure.us.median)} us (${us(figure.us.min)} .. ${us(figure.us.max)}), ${figure.form}` +
          (typeof marginal === "number" ? `; ${us(marginal)} us for one more call in the graph` : "") +
          (bound === undefined ? "" : `; bytes alone ${us(bound)} us`),
      met: figure === undefined ? undefined : figure.us.median <= limit,
    };
  };
  const host = report.figures.filter((figure) => figure.phase === "low_latency_host" && !figure.op.includes("halves"));
  return [
    ...limits.flatMap(([tokens, dispatch, combine]) => [
      one("dispatch FP8", "ll_dispatch", tokens, dispatch),
      one("combine BF16", "ll_combine", tokens, combine),
    ]),
    most(`low latency, host cost of a call, device busy, ${runtime}`, 8, host.filter(({ op }) => op.endsWith("_busy"))),
    most(
      `low latency, host cost of a call, device at rest, ${runtime}`,
      8,
      host.filter(({ op }) => op.endsWith("_idle")),
    ),
  ];
}

/** Of DeepEP V1 on 8 H200: GB/s as it counts them, and microseconds, at 4096 tokens. UCCL `ep/README.md`. */
const PUBLISHED = { dispatch_fp8: [320, 500], combine: [319, 973] } as const;

/** Shares of what memory moves, or between devices of what links carry. */
function byteGoals(report: Report, many: number, few: number): Goal[] {
  const calls = [["dispatch BF16, cached", "dispatch_cached"], ["dispatch FP8, cached", "dispatch_fp8"], [
    "combine BF16",
    "combine",
  ]] as const;
  if (report.links) {
    return [
      ...calls.map(([what, op]) => share(report, `${what}, ${many} SMs`, 0.9, { op, numSms: many })),
      ...Object.entries(PUBLISHED).flatMap(([op, [gbs, limit]]): Goal[] => {
        const figure = report.find({ phase: "main", form: "chain", op, numSms: many, tokens: 4096 });
        if (!figure?.rankBytes || report.machine.numDevices < 8) return []; // fewer send less to others
        const reached = figure.rankBytes / figure.us.median / 1000;
        return [{
          what: `${op}, ${many} SMs, against DeepEP V1`,
          goal: `>= ${gbs} GB/s, <= ${limit} us`,
          reached: `${reached.toFixed(0)} GB/s, ${us(figure.us.median)} us`,
          met: reached >= gbs && figure.us.median <= limit,
        }];
      }),
    ];
  }
  const goals = [0.92, 0.9, 0.97];
  return [
    ...calls.map(([what, op], i) => share(report, `${what}, ${many} SMs`, goals[i]!, { op, numSms: many })),
    ...calls.map(([what, op]) => share(report, `${what}, ${few} SMs`, 0.6, { op, numSms: few })),
    share(report, `dispatch, expert layout, ${many} SMs`, 0.88, { op: "dispatch_expert", numSms: many }),
    share(report, `combine, expert layout, weighted, ${many} SMs`, 0.88, { op: "combine_expert", numSms: many }),
  ];
}

/** Every goal. */
export function goalsOf(report: Report): Goal[] {
  const { numSms } = report.options.gpu, [many = 16] = numSms, few = 4;
  const host = (suffix: string): GpuFigure[] =>
    report.figures.filter(({ phase, op }) => phase === "host" && op.startsWith("host_") && op.endsWith(suffix));
  const { runtime } = report.machine;
  const wakes = ["wake_asked", "wake_turn"].map((op) => report.find({ op }));
  return [
    ...byteGoals(report, many, few),
    ...fullGoals(report, many),
    most(`host cost of a call, device busy, ${runtime}`, 10, host("_busy")),
    most(`host cost of a call, device at rest, ${runtime}`, 10, host("_idle")),
    most(
      `host memory that a call leaves, ${runtime}`,
      16,
      report.figures.filter(({ op, more }) => op.startsWith("heap_") && more?.["collected"] === "yes"),
      { goal: "none (<= 16 B)" },
    ),
    most(`promise after the counts, p50, ${runtime}`, 5, report.figures.filter(({ op }) => op === "wake_observed"), {
      beside: wakes.map((figure) => figure ? `; ${figure.op} ${us(figure.us.median)} us` : "").join(""),
    }),
    ...(["chain", "launched", "graph"] as const).flatMap((form) => naiveGoals(report, form)),
    ...lowLatencyGoals(report),
  ];
}

/** Goals as lines, after what they are judged by. Those of phases that were left out are not among them. */
export function goalTable(report: Report): string {
  const all = report.options.gpu.phases.size === GPU_PHASES.length, { ceiling, memcpy } = report;
  const goals = goalsOf(report).filter(({ reached }) => all || reached !== NO_FIGURE);
  const width = Math.max(...goals.map(({ what }) => what.length));
  const goalWidth = Math.max(...goals.map(({ goal }) => goal.length));
  const lines = goals.map(({ what, goal, reached, met }) => {
    const verdict = met === undefined ? "-" : met ? "met" : "missed";
    return `${verdict.padEnd(6)}  ${what.padEnd(width)}  ${goal.padEnd(goalWidth)}  ${reached}`;
  });
  if (report.links) {
    const { memcpy, kernel } = report.links;
    lines.unshift(
      `goals about bytes are judged by the fastest copy of all pairs of devices: memcpy ${
        memcpy.toFixed(0)
      } GB/s out of ` +
        `a device, kernels ${kernel.toFixed(0)}`,
    );
  } else if (ceiling && memcpy) {
    lines.unshift(
      `goals about bytes are judged by the fastest kernel that moves rows as the call does: the copy (${
        ceiling.gbs.median.toFixed(0)
      } GB/s), the plain scatter, for combines the plain pull; the driver's memcpy moves ${
        memcpy.gbs.median.toFixed(0)
      } GB/s`,
    );
  }
  return lines.join("\n");
}
