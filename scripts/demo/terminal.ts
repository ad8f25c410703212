/**
 * What people see: a heading, a few lines for each mode, the load as bars, the traffic as a heat map. In: reports. Out: lines
 * of at most 120 columns; colours only when asked for. Called by `scripts/demo.ts` on rank 0.
 */
import { basename } from "node:path";
import { NUM_EXPERTS, NUM_GROUPS, NUM_TOPK, NUM_TOPK_GROUPS } from "./layer.ts";
import type { ModeReport } from "./report.ts";
import type { Times } from "./world.ts";

const BARS = " ▁▂▃▄▅▆▇█", SHADES = "░▒▓█";
/** Colours of the heat map, from little to much, of the 256-colour palette. */
const HEAT = [24, 31, 37, 71, 142, 178, 208, 196];
/** With more ranks a cell of the heat map has no room for its number. */
const MAX_NUMBERED = 12;
/** With more still, a cell is one column. */
const MAX_WIDE = 48;

/** Writes text, painted if the terminal can and may. */
export class Painter {
  readonly #on: boolean;

  constructor(on: boolean) {
    this.#on = on;
  }
  #code(code: string, text: string): string {
    return this.#on ? `\x1b[${code}m${text}\x1b[0m` : text;
  }
  bold(text: string): string {
    return this.#code("1", text);
  }
  dim(text: string): string {
    return this.#code("2", text);
  }
  good(text: string): string {
    return this.#code("32", text);
  }
  bad(text: string): string {
    return this.#code("1;31", text);
  }
  /** `share` from 0 to 1. */
  heat(share: number, text: string): string {
    return this.#code(`38;5;${HEAT[Math.min(HEAT.length - 1, Math.floor(share * HEAT.length))]}`, text);
  }
}

const count = (n: number): string => Math.round(n).toLocaleString("en-US");
const percent = (share: number): string => `${(100 * share).toPrecision(share >= 1 ? 3 : 2)} %`;
const bytes = (n: number): string =>
  n < 1024 ? `${n} B` : n < 2 ** 20 ? `${(n / 1024).toFixed(1)} KiB` : `${(n / 2 ** 20).toFixed(1)} MiB`;
const time = (ms: number): string => ms < 1000 ? `${ms.toFixed(1)} ms` : `${(ms / 1000).toFixed(2)} s`;

/** What the heading tells. */
export interface Heading {
  readonly path: string;
  readonly tokens: number;
  readonly textTokens: number;
  readonly kinds: number;
  readonly hidden: number;
  readonly intermediate: number;
  readonly weights: number;
  readonly ranks: number;
  readonly processes: number;
  readonly backend: string;
  readonly reason: string;
  readonly runtime: string;
  readonly times: Times;
}

/** The lines before the first mode. */
export function heading(h: Heading, paint: Painter): string {
  const where = h.processes > 1 ? `in ${h.processes} processes` : "in one process";
  return [
    paint.bold("An MoE layer over the tokens of a text"),
    `  text      ${basename(h.path)}: ${count(h.tokens)} of its ${count(h.textTokens)} tokens, ${
      count(h.kinds)
    } different`,
    `  layer     top-${NUM_TOPK} of ${NUM_EXPERTS} experts from ${NUM_TOPK_GROUPS} of ${NUM_GROUPS} groups, hidden ${h.hidden}, ` +
    `intermediate ${h.intermediate}, ${(h.weights / 1e6).toFixed(1)} M weights`,
    `  ranks     ${h.ranks} ${where}, ${h.runtime}, backend ${h.backend} (${h.reason.replace(/, tried:$/, "")})`,
    `  setup     ${phases(h.times)}`,
    "",
  ].join("\n");
}

const phases = (times: Times): string =>
  Object.entries(times).map(([phase, ms]) => `${phase} ${time(ms).padStart(8)}`).join("   ");

/** The lines of a mode. */
export function modeLines(report: ModeReport, rows: string, paint: Painter): string {
  const { embed: _embed, gate: _gate, ...times } = report.phasesMs;
  return [
    `${paint.bold(report.title)} ${paint.dim(`(a row: ${rows})`)}`,
    `  time      ${phases(times)}`,
    `  moved     ${count(report.rowsMoved)} rows, ${bytes(report.bytesMoved)} out; ${
      count(report.rowsPulled)
    } rows back`,
    `  result    ${report.ok ? paint.good("✓ right") : paint.bad("✗ WRONG")}: ${verdict(report)}`,
    `  rounding  ${percent(report.rmsError)} rms from the unrounded layer (at most ${percent(report.rmsBound)})`,
    ...complaints(report).map((line) => `  ${paint.bad(`wrong     ${line}`)}`),
    "",
  ].join("\n");
}

function verdict(r: ModeReport): string {
  const all = r.bitExactValues === r.values, share = all ? "" : ` (${percent(r.bitExactValues / r.values)})`;
  const exact = `${all ? "all" : `${count(r.bitExactValues)} of`} ${count(r.values)} values${share}`;
  return `${exact} are the dense layer's, bit for bit; max |error| ${Number(r.maxAbsError.toPrecision(3))}`;
}

/** What is wrong, a line each. */
export function complaints(r: ModeReport): string[] {
  const lines: string[] = [], w = r.firstWrong;
  if (w) {
    lines.push(
      `${count(r.wrongTokens)} wrong token${
        r.wrongTokens === 1 ? "" : "s"
      }, first token ${w.token} of rank ${w.rank} (${JSON.stringify(w.word)}): ` +
        `channel ${w.channel} is ${w.got}, must be ${w.expected}`,
    );
  }
  if (!r.loadAgrees) lines.push("experts received other numbers of rows than the gates sent them");
  if (!(r.rmsError <= r.rmsBound)) lines.push("the result is further from the unrounded layer than rounding explains");
  return lines;
}

/** Rows of each expert as bars, a line for each group of the gate. */
export function loadChart(load: readonly number[], paint: Painter): string {
  const most = Math.max(...load), mean = load.reduce((a, b) => a + b, 0) / load.length, size = load.length / NUM_GROUPS;
  const lines = Array.from({ length: NUM_GROUPS }, (_, g) => {
    const part = load.slice(g * size, (g + 1) * size), name = `${g * size}-${(g + 1) * size - 1}`;
    const bars = part.map((n) => paint.heat(n / most, BARS[n === 0 ? 0 : Math.ceil(n / most * 8)]!)).join("");
    return `  ${name.padStart(9)}  ${bars}  ${count(part.reduce((a, b) => a + b, 0)).padStart(7)} rows`;
  });
  const title = `mean ${mean.toFixed(1)}, least ${Math.min(...load)}, most ${most} (expert ${load.indexOf(most)})`;
  return [`${paint.bold("Load per expert")}: ${title}`, ...lines, ""].join("\n");
}

/** Rows from each rank to each rank, more where it is darker. */
export function heatMap(report: ModeReport, paint: Painter): string {
  const { traffic } = report, all = traffic.flat(), least = Math.min(...all), most = Math.max(...all);
  const ranks = traffic.length, numbered = ranks <= MAX_NUMBERED, width = String(most).length;
  const wide = numbered || ranks <= MAX_WIDE ? 2 : 1, gap = numbered ? "  " : "";
  const share = (n: number) => most === least ? 1 : (n - least) / (most - least);
  const cell = (n: number): string => {
    const shade = SHADES[Math.min(3, Math.floor(share(n) * 4))]!.repeat(wide);
    return paint.heat(share(n), shade) + (numbered ? ` ${String(n).padStart(width)}` : "");
  };
  const line = (name: string, cells: string, sum: string) => `  ${name.padStart(9)}  ${cells}  ${sum.padStart(7)}`;
  // Without numbers there is room to name every fourth rank.
  const head = numbered
    ? traffic.map((_, to) => `${to}`.padStart(width + 3)).join(gap)
    : traffic.map((_, to) => to % 4 === 0 ? `${to}`.padEnd(4 * wide) : "").join("").slice(0, wide * ranks)
      .padEnd(wide * ranks);
  const received = traffic.map((_, to) => traffic.reduce((sum, row) => sum + row[to]!, 0));
  const total = count(all.reduce((a, b) => a + b, 0));
  return [
    `${paint.bold("Traffic")}: rows from rank to rank, ${report.title}: ${SHADES[0]} ${least} … ${SHADES[3]} ${most}`,
    line("to", head, "sent"),
    ...traffic.map((row, from) => line(`from ${from}`, row.map(cell).join(gap), count(row.reduce((a, b) => a + b, 0)))),
    ...(numbered ? [line("received", received.map((n) => `${n}`.padStart(width + 3)).join(gap), total)] : []),
    "",
  ].join("\n");
}
