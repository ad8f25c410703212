/**
 * Draws what the bench measured on several GPUs: what calls send over the links, by multiprocessors, and low latency, by tokens.
 *
 *   bun scripts/bench/plot.ts FILE.jsonl > FILE.svg
 *
 * In: lines of `bench.ts --json`, one rank a GPU. Out: an SVG of two panels, whose numbers are those of the file. Called by hand, for
 * the README.
 */
import { readFileSync } from "node:fs";
import process from "node:process";

/** A line of the file, as far as it is drawn. */
interface Line {
  readonly phase?: string;
  readonly op: string;
  readonly ranks: number;
  readonly numSms: number;
  readonly tokens: number;
  readonly usMedian: number;
  readonly linkGBs?: number;
  readonly marginal?: number;
  readonly ways?: string;
  readonly gpu: string;
  readonly numDevices: number;
  readonly hidden: number;
  readonly topk: number;
  readonly experts: number;
}

interface Point {
  readonly x: number;
  readonly y: number;
}
interface Series {
  readonly name: string;
  readonly color: string;
  readonly points: readonly Point[];
  /** A ceiling: a line across, without points. */
  readonly dashed?: boolean;
}
interface Axis {
  readonly label: string;
  readonly ticks: readonly number[];
  readonly log: boolean;
}

const WIDTH = 430, HEIGHT = 300, LEFT = 58, TOP = 40, RIGHT = 16, BOTTOM = 46;
/** More are not drawn. */
const MOST_SMS = 24;
const BLUE = "#1f6feb", GREEN = "#1a7f37", RED = "#cf222e", GREY = "#6e7781";

/** Ticks from 0, a hundred apart. */
const hundreds = (points: readonly Point[]): number[] =>
  Array.from({ length: 1 + Math.ceil(Math.max(100, ...points.map(({ y }) => y)) / 100) }, (_, i) => 100 * i);
/** Ticks that double, from `least` on. */
function doubles(values: readonly number[], least: number): number[] {
  const ticks = [least];
  while (ticks.at(-1)! < Math.max(2 * least, ...values)) ticks.push(2 * ticks.at(-1)!);
  return ticks;
}
const sorted = (values: readonly number[]): number[] => [...new Set(values)].sort((a, b) => a - b);

const escaped = (text: string): string => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;");
const text = (x: number, y: number, words: string, more = ""): string =>
  `<text x="${x.toFixed(1)}" y="${y.toFixed(1)}" ${more}>${escaped(words)}</text>`;

/** Where a value lies between the ends of an axis, 0 to 1. */
function place({ ticks, log }: Axis, value: number): number {
  const of = (v: number): number => log ? Math.log(v) : v, first = of(ticks[0]!), last = of(ticks.at(-1)!);
  return (of(value) - first) / (last - first);
}

/** One panel; `left`: where it begins. */
function panel(left: number, title: string, [xAxis, yAxis]: readonly [Axis, Axis], series: readonly Series[]): string {
  const x = (value: number): number => left + LEFT + place(xAxis, value) * (WIDTH - LEFT - RIGHT);
  const y = (value: number): number => HEIGHT - BOTTOM - place(yAxis, value) * (HEIGHT - TOP - BOTTOM);
  const [x0, x1] = [x(xAxis.ticks[0]!), x(xAxis.ticks.at(-1)!)];
  const [y0, y1] = [y(yAxis.ticks[0]!), y(yAxis.ticks.at(-1)!)];
  const out = [text(left + LEFT, 20, title, 'font-weight="bold"')];
  for (const tick of yAxis.ticks) {
    out.push(`<path d="M${x0} ${y(tick).toFixed(1)}H${x1}" stroke="#d0d7de"/>`);
    out.push(text(x0 - 6, y(tick) + 4, String(tick), 'text-anchor="end"'));
  }
  for (const tick of xAxis.ticks) out.push(text(x(tick), y0 + 16, String(tick), 'text-anchor="middle"'));
  out.push(text((x0 + x1) / 2, HEIGHT - 8, xAxis.label, 'text-anchor="middle"'));
  const turned = `transform="rotate(-90 ${left + 14} ${(y0 + y1) / 2})" text-anchor="middle"`;
  out.push(text(left + 14, (y0 + y1) / 2, yAxis.label, turned));
  series.forEach(({ name, color, points, dashed = false }, i) => {
    const [first] = points;
    if (!first) return;
    const path = dashed
      ? `M${x0} ${y(first.y).toFixed(1)}H${x1}`
      : points.map((p, n) => `${n === 0 ? "M" : "L"}${x(p.x).toFixed(1)} ${y(p.y).toFixed(1)}`).join("");
    out.push(
      `<path d="${path}" fill="none" stroke="${color}" stroke-width="2"${dashed ? ' stroke-dasharray="5 4"' : ""}/>`,
    );
    if (!dashed) {
      for (const p of points) {
        out.push(`<circle cx="${x(p.x).toFixed(1)}" cy="${y(p.y).toFixed(1)}" r="3" fill="${color}"/>`);
      }
    }
    const row = y0 - 8 - 15 * (series.length - 1 - i);
    out.push(
      `<path d="M${x1 - 190} ${row - 4}h22" stroke="${color}" stroke-width="2"${
        dashed ? ' stroke-dasharray="5 4"' : ""
      }/>`,
    );
    out.push(text(x1 - 162, row, name));
  });
  return out.join("\n");
}

/** The drawing. */
export function plot(lines: readonly Line[]): string {
  const [{ gpu, numDevices, hidden, topk, experts }] = lines as [Line];
  const here = lines.filter(({ ranks }) => ranks === numDevices), all = here.filter(({ phase }) => phase === "sms");
  const tokens = Math.max(0, ...all.map((line) => line.tokens)), swept = all.filter((line) => line.tokens === tokens);
  if (swept.length === 0) throw new Error(`Cannot plot: no figure of phase sms has ${numDevices} ranks, one a GPU`);
  const bySms = (op: string): Point[] =>
    swept.filter((line) => line.op === op && line.numSms <= MOST_SMS).map(({ numSms, linkGBs }) => ({
      x: numSms,
      y: linkGBs!,
    }));
  const ceiling = (op: string): Point[] => {
    const all = here.filter((line) => line.op === op && line.ways === "all pairs").map(({ linkGBs }) => linkGBs!);
    return all.length === 0 ? [] : [{ x: 0, y: Math.max(...all) }];
  };
  const byTokens = (op: string): Point[] => {
    const all = here.filter((line) =>
      line.op === op && (line.phase === "low_latency" || line.phase === "low_latency_tokens")
    );
    return all.map(({ tokens, marginal, usMedian }) => ({ x: tokens, y: marginal ?? usMedian })).sort((a, b) =>
      a.x - b.x
    );
  };
  const carried: Series[] = [
    { name: "memcpy, all pairs", color: GREY, points: ceiling("link_memcpy"), dashed: true },
    { name: "kernel that stores, all pairs", color: BLUE, points: ceiling("link_push"), dashed: true },
    { name: "kernel that loads, all pairs", color: RED, points: ceiling("link_pull"), dashed: true },
    { name: "dispatch BF16", color: BLUE, points: bySms("dispatch_cached") },
    { name: "dispatch FP8", color: GREEN, points: bySms("dispatch_fp8") },
    { name: "combine BF16", color: RED, points: bySms("combine") },
  ];
  const decode: Series[] = [
    { name: "combine BF16", color: RED, points: byTokens("ll_combine") },
    { name: "dispatch FP8", color: GREEN, points: byTokens("ll_dispatch") },
  ];
  const pointsOf = (all: readonly Series[]): Point[] => all.flatMap(({ points }) => points);
  const links = panel(0, `normal mode, ${tokens} tokens a rank`, [
    { label: "multiprocessors a rank", ticks: sorted(pointsOf(carried.slice(3)).map(({ x }) => x)), log: false },
    { label: "GB/s out of a GPU, as many in", ticks: hundreds(pointsOf(carried)), log: false },
  ], carried);
  const lowLatency = panel(WIDTH, "low latency, one more call of a graph", [
    { label: "tokens a rank", ticks: doubles(pointsOf(decode).map(({ x }) => x), 1), log: true },
    { label: "µs", ticks: doubles(pointsOf(decode).map(({ y }) => y), 5), log: true },
  ], decode);
  const [width, height] = [2 * WIDTH, HEIGHT + 18];
  const where = `${numDevices} ${gpu}, a rank each, hidden ${hidden}, top-${topk} of ${experts} experts`;
  return [
    `<svg xmlns="http://www.w3.org/2000/svg" width="${width}" height="${height}" viewBox="0 0 ${width} ${height}" ` +
    `font-family="sans-serif" font-size="11" fill="#24292f">`,
    `<rect width="${width}" height="${height}" fill="#ffffff"/>`,
    links,
    lowLatency,
    text(width - 8, height - 6, where, 'text-anchor="end" fill="#6e7781"'),
    "</svg>\n",
  ].join("\n");
}

if (import.meta.main) {
  const [path] = process.argv.slice(2);
  if (path === undefined) throw new Error("Usage: plot.ts FILE.jsonl > FILE.svg");
  const lines = readFileSync(path, "utf8").split("\n").filter((line) => line !== "");
  process.stdout.write(plot(lines.map((line) => JSON.parse(line) as Line)));
}
