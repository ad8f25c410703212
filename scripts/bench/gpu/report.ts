/**
 * What the bench says of a GPU: a line as soon as a figure is there, for people and as JSON, and at the end goals against figures.
 *
 * In: figures. Out: text, lines in a file. Called by bench.ts and the phases. The JSON keys are those of ../report.ts where they mean
 * the same.
 */
import { appendFileSync } from "node:fs";
import type { BenchOptions } from "../options.ts";
import type { Machine } from "../report.ts";
import type { Spread } from "../timing.ts";
import { bestKernel, bestMemcpy, type Ceiling } from "./ceilings.ts";
import type { Form, Measured } from "./clock.ts";

/** How a figure came about. */
export type FigureForm = Form | "host" | "copy";

/** A figure. */
export interface GpuFigure {
  readonly phase: string;
  readonly op: string;
  readonly form: FigureForm;
  readonly ranks: number;
  readonly numSms: number;
  readonly tokens: number;
  readonly dtype: "bf16" | "fp8" | "none";
  readonly layout: "rank" | "expert" | "none";
  /** Microseconds, or what `unit` says. */
  readonly us: Spread;
  readonly unit?: "B";
  /** Least traffic over all ranks: bytes read once and bytes written once. */
  readonly bytes?: number;
  readonly measured?: Measured;
  /** What else is worth keeping. */
  readonly more?: Readonly<Record<string, number | string | null>>;
}

const round = (value: number): number => Number(value.toPrecision(5));

/** Three significant digits or whole microseconds. */
export function us(value: number): string {
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

/** The figures of a run. */
export class Report {
  readonly figures: GpuFigure[] = [];
  readonly options: BenchOptions;
  readonly machine: Machine;
  /** What was skipped or went wrong. */
  readonly troubles: string[] = [];
  #ceilings: readonly Ceiling[] = [];

  constructor(options: BenchOptions, machine: Machine) {
    this.options = options;
    this.machine = machine;
  }

  /** What bounds are made from, from now on. */
  set ceilings(ceilings: readonly Ceiling[]) {
    this.#ceilings = ceilings;
  }

  /** GB/s of the fastest copy kernel; undefined when none was measured. */
  get ceiling(): Ceiling | undefined {
    return bestKernel(this.#ceilings);
  }

  /** Microseconds below which nothing moves so many bytes as a copy kernel does. */
  boundUs(bytes: number): number | undefined {
    return this.ceiling && bytes > 0 ? bytes / this.ceiling.gbs.median / 1000 : undefined;
  }

  /** The driver's fastest copy; undefined when none was measured. */
  get memcpy(): Ceiling | undefined {
    return bestMemcpy(this.#ceilings);
  }

  /** Which share of the bound a figure reaches, and which of the driver's memcpy, in percent. */
  shares({ bytes = 0, us, unit }: GpuFigure): { bound: number; memcpy: number } | undefined {
    const { ceiling, memcpy } = this;
    if (!ceiling || !memcpy || bytes === 0 || unit) return undefined;
    const percent = ({ gbs }: Ceiling): number => 100 * bytes / us.median / 1000 / gbs.median;
    return { bound: percent(ceiling), memcpy: percent(memcpy) };
  }

  /** Keeps, prints and writes a figure. */
  add(figure: GpuFigure): void {
    this.figures.push(figure);
    const bound = this.boundUs(figure.bytes ?? 0), shares = this.shares(figure), { memcpy } = this;
    const { measured, more, unit = "us" } = figure;
    const same = bestKernel(this.#ceilings, figure.ranks * figure.numSms);
    const words = [
      `${figure.op} ${figure.form}`.padEnd(30),
      `${figure.ranks}r ${figure.numSms}sm ${figure.tokens}t`.padEnd(15),
      `${us(figure.us.median)} ${unit}`.padStart(10),
      `(${us(figure.us.min)} .. ${us(figure.us.max)})`.padEnd(18),
      figure.bytes
        ? `${(figure.bytes / 1e6).toFixed(2)} MB ${(figure.bytes / figure.us.median / 1e3).toFixed(0)} GB/s`
        : "",
      bound && shares
        ? `bound ${us(bound)} us = ${shares.bound.toFixed(1)} %, ${shares.memcpy.toFixed(1)} % of memcpy`
        : "",
      measured?.late ? `host late in ${measured.late} of ${measured.repetitions}` : "",
      ...Object.entries(more ?? {}).map(([key, value]) => `${key} ${typeof value === "number" ? round(value) : value}`),
    ];
    this.say("  " + words.filter((word) => word !== "").join("  "));
    this.line({
      phase: figure.phase,
      op: figure.op,
      form: figure.form,
      ranks: figure.ranks,
      numSms: figure.numSms,
      tokens: figure.tokens,
      dtype: figure.dtype,
      layout: figure.layout,
      ...(unit === "us" ? {} : { unit }), // then of the next three
      usMedian: round(figure.us.median),
      usMin: round(figure.us.min),
      usMax: round(figure.us.max),
      bytes: figure.bytes ?? 0,
      boundUs: bound ? round(bound) : null,
      ratio: shares ? round(shares.bound / 100) : null,
      memcpyRatio: shares ? round(shares.memcpy / 100) : null,
      ceilingGBs: this.ceiling ? round(this.ceiling.gbs.median) : null,
      ceilingSms: this.ceiling?.numSms ?? null,
      sameSmsGBs: same ? round(same.gbs.median) : null,
      memcpyGBs: memcpy ? round(memcpy.gbs.median) : null,
      ...(measured
        ? {
          iterations: measured.iterations,
          repetitions: measured.repetitions,
          enqueueUs: round(measured.enqueueUs),
          late: measured.late,
        }
        : {}),
      ...more,
    });
  }

  /** Notes what went wrong, and goes on. */
  trouble(what: string): void {
    this.troubles.push(what);
    this.say(`! ${what}`);
    this.line({ op: "trouble", message: what });
  }

  /** Text for people. */
  say(text: string): void {
    console.log(text);
  }

  /** A line for machines. */
  line(values: Record<string, unknown>): void {
    if (this.options.json === undefined) return;
    const { hidden, topk, experts } = this.options;
    appendFileSync(this.options.json, JSON.stringify({ ...values, ...this.machine, hidden, topk, experts }) + "\n");
  }

  /** The first figure that has these values. */
  find(wanted: Partial<GpuFigure>): GpuFigure | undefined {
    const entries = Object.entries(wanted) as [keyof GpuFigure, unknown][];
    return this.figures.find((figure) => entries.every(([key, value]) => figure[key] === value));
  }
}

/** A row of the table of goals. */
interface Goal {
  readonly what: string;
  readonly goal: string;
  readonly reached: string;
  /** Undefined when there is no figure. */
  readonly met: boolean | undefined;
}

function share(report: Report, what: string, goal: number, wanted: Partial<GpuFigure>): Goal {
  const figure = report.find({ phase: "main", form: "chain", ...wanted });
  const bound = figure && report.boundUs(figure.bytes ?? 0), shares = figure && report.shares(figure);
  return {
    what,
    goal: `>= ${(100 * goal).toFixed(0)} % of the bound`,
    reached: shares === undefined
      ? "no figure"
      : `${shares.bound.toFixed(1)} % (${us(figure!.us.median)} us, bound ${us(bound!)} us); ` +
        `${shares.memcpy.toFixed(1)} % of memcpy`,
    met: shares === undefined ? undefined : shares.bound >= 100 * goal,
  };
}

function least(what: string, goal: string, limit: number, figures: readonly GpuFigure[], beside = ""): Goal {
  const worst = figures.length === 0 ? undefined : Math.max(...figures.map((figure) => figure.us.median));
  return {
    what,
    goal,
    reached: worst === undefined
      ? "no figure"
      : figures.map((figure) => `${figure.op} ${us(figure.us.median)} ${figure.unit ?? "us"}`).join(", ") + beside,
    met: worst === undefined ? undefined : worst <= limit,
  };
}

function fullGoal(report: Report, sms: number): Goal {
  const full = report.find({ phase: "main", op: "dispatch_awaited", numSms: sms });
  const cached = report.find({ phase: "main", op: "dispatch_cached", form: "chain", numSms: sms });
  const extra = full && cached ? full.us.median - cached.us.median : undefined;
  return {
    what: `full dispatch with routing, counts and promise, ${sms} SMs`,
    goal: "cached + <= 40 us",
    reached: extra === undefined ? "no figure" : `cached + ${us(extra)} us (${us(full!.us.median)} us)`,
    met: extra === undefined ? undefined : extra <= 40,
  };
}

function naiveGoal(report: Report, form: Form): Goal {
  const pairs = ["dispatch", "combine"].flatMap((op) =>
    report.figures.filter((figure) => figure.op === `naive_${op}` && figure.form === form && figure.tokens <= 4096)
      .flatMap((naive) => {
        const wanted = { form, tokens: naive.tokens, ranks: naive.ranks, layout: "rank", dtype: naive.dtype } as const;
        const ours = report.find({ ...wanted, phase: naive.phase, op: op === "dispatch" ? "dispatch_cached" : op });
        return ours ? [{ op, tokens: naive.tokens, speedup: naive.us.median / ours.us.median }] : [];
      })
  );
  const worst = pairs.toSorted((a, b) => a.speedup - b.speedup)[0];
  const lost = pairs.filter(({ speedup }) => speedup <= 1).map(({ op, tokens }) => `${op} ${tokens}`);
  return {
    what: `against the naive way, 1 … 4096 tokens, ${form}`,
    goal: "faster at every size",
    reached: worst
      ? `${pairs.length} comparisons, least ${
        worst.speedup.toFixed(2)
      } times as fast (${worst.op}, ${worst.tokens} tokens)` +
        (lost.length > 0 ? `; not faster: ${lost.join(", ")}` : "")
      : "no figure",
    met: worst && worst.speedup > 1,
  };
}

/** What was to be reached, and what was. The goals are about the shape of the defaults. */
export function goalTable(report: Report): string {
  const { numSms } = report.options.gpu, [most = 16] = numSms, few = 4;
  const host = (suffix: string): GpuFigure[] =>
    report.figures.filter(({ phase, op }) => phase === "host" && op.startsWith("host_") && op.endsWith(suffix));
  const goals: Goal[] = [
    share(report, `dispatch BF16, cached, ${most} SMs`, 0.92, { op: "dispatch_cached", numSms: most }),
    share(report, `dispatch FP8, cached, ${most} SMs`, 0.90, { op: "dispatch_fp8", numSms: most }),
    share(report, `combine BF16, ${most} SMs`, 0.97, { op: "combine", numSms: most }),
    share(report, `dispatch BF16, cached, ${few} SMs`, 0.6, { op: "dispatch_cached", numSms: few }),
    share(report, `dispatch FP8, cached, ${few} SMs`, 0.6, { op: "dispatch_fp8", numSms: few }),
    share(report, `combine BF16, ${few} SMs`, 0.6, { op: "combine", numSms: few }),
    fullGoal(report, most),
    share(report, `dispatch, expert layout, ${most} SMs`, 0.88, { op: "dispatch_expert", numSms: most }),
    share(report, `combine, expert layout, weighted, ${most} SMs`, 0.88, { op: "combine_expert", numSms: most }),
    least("host cost of a call, device busy", "<= 10 us", 10, host("_busy")),
    least("host cost of a call, device at rest", "<= 10 us", 10, host("_idle")),
    least(
      "host memory that a call leaves",
      "none (<= 16 B)",
      16,
      report.figures.filter(({ op, more }) => op.startsWith("heap_") && more?.["collected"] === "yes"),
    ),
    least(
      "promise after the counts, p50",
      "<= 5 us",
      5,
      report.figures.filter(({ op }) => op === "wake_observed"),
      ["wake_asked", "wake_turn"].map((op) => report.find({ op })).map((figure) =>
        figure ? `; ${figure.op} ${us(figure.us.median)} us` : ""
      ).join(""),
    ),
    ...(["chain", "launched", "graph"] as const).map((form) => naiveGoal(report, form)),
  ];
  const { ceiling, memcpy } = report;
  const bounds = ceiling && memcpy
    ? `goals about bytes are judged by the bound, the copy kernel at ${ceiling.gbs.median.toFixed(0)} GB/s; ` +
      `beside it the share of the driver's memcpy at ${memcpy.gbs.median.toFixed(0)} GB/s\n`
    : "";
  const width = Math.max(...goals.map(({ what }) => what.length)),
    goalWidth = Math.max(...goals.map(({ goal }) => goal.length));
  return bounds +
    goals.map(({ what, goal, reached, met }) =>
      `${met === undefined ? "-     " : met ? "met   " : "missed"}  ${what.padEnd(width)}  ${
        goal.padEnd(goalWidth)
      }  ${reached}`
    ).join("\n");
}
