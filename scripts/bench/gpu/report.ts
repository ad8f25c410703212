/**
 * What the bench says of a GPU: a line as soon as a figure is there, for people and as JSON.
 *
 * In: figures. Out: text, lines in a file. Called by bench.ts and the phases; goals.ts and tables.ts read the figures at the end. The
 * JSON keys are those of ../report.ts where they mean the same. The bound of a call is its least traffic at the rate of the fastest
 * kernel of the run that moves rows as the call does: the copy kernel or the plain scatter, for combines the plain pull, too. Where
 * rows go over links, the fastest copy of all pairs of devices takes the place of the copy kernel: memory has to move some more
 * bytes than a link, at ten times its rate.
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
  readonly layout: "rank" | "expert" | "low_latency" | "none";
  /** Microseconds, or what `unit` says. */
  readonly us: Spread;
  readonly unit?: "B";
  /** Least traffic over all ranks: bytes read once and bytes written once. */
  readonly bytes?: number;
  /** Of a call whose ranks are on several devices: the most bytes that one of them sends to others, or gets from them. */
  readonly linkBytes?: number;
  /** Of such a call: bytes of the rows that a rank receives or sums, its own ones included, as published figures count them. */
  readonly rankBytes?: number;
  readonly measured?: Measured;
  /** What else is worth keeping. */
  readonly more?: Readonly<Record<string, number | string | null>>;
}

/** What a call moves. */
export type Traffic = Required<Pick<GpuFigure, "bytes">> & Pick<GpuFigure, "linkBytes" | "rankBytes">;

/** GB/s that leave a device over its links, and as many that reach it, while all pairs of devices copy. */
export interface Links {
  readonly memcpy: number;
  readonly kernel: number;
}

/** What a call is held against, and how fast it moves the call's bytes, read plus written. */
export interface Rate {
  readonly name: "copy" | "link" | "scatter" | "pull";
  readonly gbs: number;
}

/** Shares of ceilings that a figure reaches, percent. */
export interface Shares {
  /** Of the fastest kernel: what goals are judged by. */
  readonly bound: number;
  readonly memcpy: number;
  /** Of each kernel. */
  readonly of: readonly { readonly name: Rate["name"]; readonly percent: number }[];
}

const round = (value: number): number => Number(value.toPrecision(5));

/** How fast a call's bytes move, read plus written, when those over links take their time at `linkGbs`. */
const overLinks = ({ bytes = 0, linkBytes = 0 }: GpuFigure, linkGbs: number): number => bytes * linkGbs / linkBytes;

/** GB/s over the links of the busiest device, and of the rows of a rank as published figures count them. */
function linkRates({ linkBytes, rankBytes, us }: GpuFigure): Record<string, number> {
  if (linkBytes === undefined) return {};
  const gbs = (bytes: number): number => round(bytes / us.median / 1000);
  return { linkGBs: gbs(linkBytes), ...(rankBytes === undefined ? {} : { rankGBs: gbs(rankBytes) }) };
}

/** Three significant digits or whole microseconds. */
export function us(value: number): string {
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

/** Shares for people, the judge first. */
export function sharesWords({ bound, memcpy, of }: Shares): string {
  const each = of.map(({ name, percent }) => `${name} ${percent.toFixed(1)}`);
  return `${bound.toFixed(1)} % of the best kernel (${each.join(", ")}), ${memcpy.toFixed(1)} % of memcpy`;
}

/** The figures of a run. */
export class Report {
  readonly figures: GpuFigure[] = [];
  readonly options: BenchOptions;
  readonly machine: Machine;
  /** What was skipped or went wrong. */
  readonly troubles: string[] = [];
  #ceilings: readonly Ceiling[] = [];
  /** Between devices, where there are several. */
  links: Links | undefined;

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

  /**
   * The kernels that move bytes as a figure's call does. Scatter and pull are the fastest that were timed at the main size in the
   * same layout and dtype, or in the nearest: low latency sends a row an expert, as the expert layout does.
   */
  kernels(figure: GpuFigure): Rate[] {
    const { op, dtype, layout } = figure, { links, ceiling } = this, rates: Rate[] = [];
    if (figure.linkBytes === undefined) {
      if (ceiling) rates.push({ name: "copy", gbs: ceiling.gbs.median });
    } else if (links) {
      rates.push({ name: "link", gbs: overLinks(figure, Math.max(links.memcpy, links.kernel)) });
    }
    const places = layout === "low_latency" ? "expert" : layout;
    const add = (name: "scatter" | "pull"): void => {
      const all = this.figures.filter((one) => one.phase === "ceiling" && one.op === `plain_${name}`);
      const near = [
        all.filter((one) => one.layout === places && one.dtype === dtype),
        all.filter((one) => one.dtype === dtype),
        all,
      ].find(({ length }) => length > 0);
      if (near) rates.push({ name, gbs: Math.max(...near.map(({ bytes, us }) => bytes! / us.median / 1000)) });
    };
    add("scatter");
    if (op.includes("combine")) add("pull");
    return rates;
  }

  /** Microseconds below which no kernel moves a figure's bytes. */
  boundUs(figure: GpuFigure): number | undefined {
    const best = Math.max(...this.kernels(figure).map(({ gbs }) => gbs));
    return best > 0 && figure.bytes ? figure.bytes / best / 1000 : undefined;
  }

  /** The driver's fastest copy; undefined when none was measured. */
  get memcpy(): Ceiling | undefined {
    return bestMemcpy(this.#ceilings);
  }

  /** Which share of each ceiling a figure reaches; undefined where ceilings or bytes are missing, or are what was timed. */
  shares(figure: GpuFigure): Shares | undefined {
    const { bytes = 0, us, unit, phase, linkBytes } = figure, kernels = this.kernels(figure);
    const memcpy = linkBytes === undefined
      ? this.memcpy?.gbs.median
      : this.links && overLinks(figure, this.links.memcpy);
    if (kernels.length === 0 || !memcpy || bytes === 0 || unit || phase === "ceiling") return undefined;
    const percent = (gbs: number): number => 100 * bytes / us.median / 1000 / gbs;
    return {
      bound: percent(Math.max(...kernels.map(({ gbs }) => gbs))),
      memcpy: percent(memcpy),
      of: kernels.map(({ name, gbs }) => ({ name, percent: percent(gbs) })),
    };
  }

  /** Keeps, prints and writes a figure. */
  add(figure: GpuFigure): void {
    this.figures.push(figure);
    const shares = this.shares(figure), bound = shares && this.boundUs(figure), { memcpy } = this;
    const { measured, unit = "us" } = figure, more = { ...figure.more, ...linkRates(figure) };
    const same = bestKernel(this.#ceilings, figure.ranks * figure.numSms);
    const words = [
      `${figure.op} ${figure.form}`.padEnd(30),
      `${figure.ranks}r ${figure.numSms}sm ${figure.tokens}t`.padEnd(15),
      `${us(figure.us.median)} ${unit}`.padStart(10),
      `(${us(figure.us.min)} .. ${us(figure.us.max)})`.padEnd(18),
      figure.bytes
        ? `${(figure.bytes / 1e6).toFixed(2)} MB ${(figure.bytes / figure.us.median / 1e3).toFixed(0)} GB/s`
        : "",
      bound && shares ? `bound ${us(bound)} us; ${sharesWords(shares)}` : "",
      measured?.late ? `host late in ${measured.late} of ${measured.repetitions}` : "",
      ...Object.entries(more).map(([key, value]) => `${key} ${typeof value === "number" ? round(value) : value}`),
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
      ...(figure.linkBytes === undefined ? {} : { linkBytes: figure.linkBytes, rankBytes: figure.rankBytes }),
      boundUs: bound ? round(bound) : null,
      ratio: shares ? round(shares.bound / 100) : null,
      memcpyRatio: shares ? round(shares.memcpy / 100) : null,
      ...Object.fromEntries(shares?.of.map(({ name, percent }) => [`${name}Ratio`, round(percent / 100)]) ?? []),
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
