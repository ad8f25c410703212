/**
 * What the bench says: a table for people, JSON lines for machines.
 *
 * In: figures. Out: text. Called by scripts/bench.ts. `ratio` is bound / measured, so 1 is the bound and more is better.
 */
import { execFileSync } from "node:child_process";
import { appendFileSync, readFileSync } from "node:fs";
import { cpus, release } from "node:os";
import process from "node:process";
import { fileURLToPath } from "node:url";
import type { EpBuffer } from "../../mod.ts";
import type { BenchOptions } from "./options.ts";
import type { Spread } from "./timing.ts";

/** A figure, as an op gives it. */
export interface Figure {
  readonly op: string;
  /** Tokens a rank. */
  readonly tokens: number;
  readonly ranks: number;
  readonly dtype: "bf16" | "fp8" | "none";
  readonly layout: "rank" | "expert" | "low_latency" | "none";
  /** Microseconds a call. */
  readonly measured: Spread;
  /** Least traffic of the call over all ranks: bytes read and bytes written. */
  readonly bytes: number;
  /** How `bytes` comes about, and what the bound is. */
  readonly formula: string;
  /** Microseconds: nothing is faster that moves these bytes with copies; or the goal, where `formula` says so. */
  readonly bound: Spread;
  /** Microseconds of the naive way. */
  readonly naive?: Spread;
  /** Most `measured / bound` that was promised on the cpu backend. */
  readonly goal?: number;
}

/** Where figures were taken. */
export interface Machine {
  readonly backend: string;
  /** The device: a GPU, or the CPU's model on the cpu backend. */
  readonly gpu: string;
  /** How many of these the ranks of the bench can be on. */
  readonly numDevices: number;
  /** The driver's version, or the kernel's on the cpu backend. */
  readonly driver: string;
  readonly commit: string;
  readonly runtime: string;
  /** The day and time of the run. */
  readonly date: string;
}

/** Looks the machine up. */
export function machineOf(buffer: EpBuffer, options: BenchOptions): Machine {
  const { backend, capabilities } = buffer;
  const { bun, deno } = process.versions as Record<string, string | undefined>;
  return {
    backend,
    gpu: backend === "cpu" ? `${cpus()[0]?.model.trim() ?? "unknown"} x${cpus().length}` : capabilities.name,
    numDevices: backend === "cpu" ? 1 : Math.min(options.ranks, buffer.core.device.numDevices),
    driver: backend === "cpu" ? release() : `${driverVersion()}CUDA ${capabilities.driverVersion}`,
    commit: options.commit ?? commit(),
    runtime: bun ? `bun ${bun}` : deno ? `deno ${deno}` : `node ${process.versions.node}`,
    date: new Date().toISOString().slice(0, 19) + "Z",
  };
}

/** The version of NVIDIA's kernel driver and a comma, or nothing where it does not tell. */
function driverVersion(): string {
  try {
    const text = readFileSync("/proc/driver/nvidia/version", "utf8");
    return `${/\b\d{3,}\.\d+(\.\d+)?\b/.exec(text)![0]}, `;
  } catch {
    return "";
  }
}

function commit(): string {
  try {
    const cwd = fileURLToPath(new URL("../..", import.meta.url));
    return execFileSync("git", ["rev-parse", "--short=12", "HEAD"], { cwd, encoding: "utf8", stdio: "pipe" }).trim();
  } catch {
    return ""; // no git, or no repository: a package
  }
}

const round = (us: number): number => Number(us.toPrecision(5));

/** The JSON line of a figure. */
export function jsonLine(figure: Figure, machine: Machine, options: BenchOptions): string {
  const { measured, bound, naive } = figure;
  return JSON.stringify({
    op: figure.op,
    ...machine,
    ranks: figure.ranks,
    numSms: options.numSms,
    tokens: figure.tokens,
    hidden: options.hidden,
    topk: options.topk,
    experts: options.experts,
    dtype: figure.dtype,
    layout: figure.layout,
    usMedian: round(measured.median),
    usMin: round(measured.min),
    usMax: round(measured.max),
    bytes: figure.bytes,
    boundUs: round(bound.median),
    ratio: round(bound.median / measured.median),
    naiveUs: naive ? round(naive.median) : null,
  });
}

/** Appends a figure's line to a file. */
export function appendJson(path: string, figure: Figure, machine: Machine, options: BenchOptions): void {
  appendFileSync(path, jsonLine(figure, machine, options) + "\n");
}

/** Three significant digits or whole microseconds. */
function us(value: number): string {
  return value >= 100 ? value.toFixed(0) : value >= 10 ? value.toFixed(1) : value.toFixed(2);
}

const header = ["op", "dtype", "layout", "tokens", "us", "min .. max", "MB", "GB/s", "bound us", "ratio"]
  .concat(["naive us", "speedup"]);

function cells(figure: Figure): string[] {
  const { measured, bound, naive, bytes } = figure;
  return [
    figure.op,
    figure.dtype === "none" ? "" : figure.dtype,
    figure.layout === "none" ? "" : figure.layout,
    String(figure.tokens),
    us(measured.median),
    `${us(measured.min)} .. ${us(measured.max)}`,
    bytes === 0 ? "" : (bytes / 1e6).toFixed(1),
    bytes === 0 ? "" : (bytes / measured.median / 1e3).toFixed(1),
    us(bound.median),
    (bound.median / measured.median).toFixed(2),
    naive ? us(naive.median) : "",
    naive ? (naive.median / measured.median).toFixed(2) : "",
  ];
}

/** Aligned columns, the first three to the left; then what each line's bytes and bound are. */
export function table(figures: readonly Figure[]): string {
  const rows = [header, ...figures.map(cells)];
  const widths = header.map((_, c) => Math.max(...rows.map((row) => row[c]!.length)));
  const lines = rows.map((row) =>
    row.map((cell, c) => c < 3 ? cell.padEnd(widths[c]!) : cell.padStart(widths[c]!)).join("  ").trimEnd()
  );
  const formulas = new Map(figures.map(({ op, formula }) => [op, formula]));
  const width = Math.max(...[...formulas.keys()].map((op) => op.length));
  return [...lines, "", ...[...formulas].map(([op, text]) => `${op.padEnd(width)}  ${text}`)].join("\n");
}

/** What was promised of the cpu backend, against what was measured. Promises about the bound are for the default shape. */
export function goals(figures: readonly Figure[], isDefaultShape: boolean): string[] {
  const line = (factor: number, goal: number, what: string): string =>
    `${factor <= goal ? "met   " : "missed"}  ${what}, goal ${goal}`;
  return figures.flatMap(({ op, tokens, ranks, measured, bound, naive, goal }) => {
    const lines: string[] = [], of = `${op} at ${tokens} ${tokens === 1 ? "token" : "tokens"}`;
    if (goal !== undefined && (isDefaultShape || ranks === 1)) {
      const factor = measured.median / bound.median;
      lines.push(line(factor, goal, `${of}: ${factor.toFixed(2)} times the bound`));
    }
    if (naive !== undefined) {
      const factor = measured.median / naive.median;
      lines.push(line(factor, 1, `${of}: ${factor.toFixed(2)} times the naive way`));
    }
    return lines;
  });
}
