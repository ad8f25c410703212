/**
 * The figures of a run side by side: short enough to be read at the end of a log.
 *
 * In: figures. Out: text. Called by bench.ts. A cell is microseconds, and where a bound is known how much of it is reached.
 */
import type { GpuFigure, Report } from "./report.ts";
import { us } from "./report.ts";

/** A table: a row and a column for each value that occurs, in the order in which they do. */
function pivot(
  figures: readonly GpuFigure[],
  { row, column, cell }: {
    row: (figure: GpuFigure) => string;
    column: (figure: GpuFigure) => string;
    cell: (figure: GpuFigure) => string;
  },
): string[] {
  const columns = [...new Set(figures.map(column))], rows = [...new Set(figures.map(row))];
  const cells = new Map(figures.map((figure) => [`${row(figure)}\n${column(figure)}`, cell(figure)]));
  const lines = [["", ...columns], ...rows.map((r) => [r, ...columns.map((c) => cells.get(`${r}\n${c}`) ?? "-")])];
  const widths = lines[0]!.map((_, i) => Math.max(...lines.map((line) => line[i]!.length)));
  return lines.map((line) =>
    line.map((text, i) => i === 0 ? text.padEnd(widths[i]!) : text.padStart(widths[i]!)).join("  ")
  );
}

/** All tables that there are figures for. */
export function tables(report: Report): string {
  const of = (phase: string): GpuFigure[] => report.figures.filter((figure) => figure.phase === phase);
  const share = (figure: GpuFigure): string => {
    const shares = report.shares(figure);
    return us(figure.us.median) + (shares ? ` ${shares.bound.toFixed(1)}% ${shares.memcpy.toFixed(1)}%` : "");
  };
  const short = (figure: GpuFigure): string =>
    `${figure.op.replace("dispatch", "d").replace("combine", "c").replace("_cached", "")} ${figure.form}`;
  const sms = (figure: GpuFigure): string => figure.numSms === 0 ? "all SMs" : `${figure.numSms} SMs`;
  const wide = { row: ({ op, form }: GpuFigure) => form === "launched" ? `${op} launched` : op, cell: share };
  const shared = "us, share of the best kernel, share of memcpy";
  const byTokens = (phase: string): string[] =>
    pivot(of(phase), {
      row: (figure) => String(figure.tokens),
      column: short,
      cell: (figure) => us(figure.us.median),
    });
  const parts: [string, string[]][] = [
    [`main size: ${shared}`, pivot(of("main"), { ...wide, column: sms })],
    [
      "tokens: us; d: dispatch, cached unless it says full; c: combine",
      byTokens("tokens"),
    ],
    ["tokens, graphs of many calls: us a call", byTokens("graphs")],
    [`multiprocessors: ${shared}`, pivot(of("sms"), { ...wide, column: sms })],
    [`ranks: ${shared}`, pivot(of("ranks"), { ...wide, column: ({ ranks }) => `${ranks} ranks` })],
  ];
  return parts.filter(([, lines]) => lines.length > 1).map(([title, lines]) => `${title}\n${lines.join("\n")}\n`).join(
    "\n",
  );
}
