/**
 * One mode's outcome, put together from all ranks. In: what each rank received, moved and compared. Out: a `ModeReport` on
 * every rank, which `--json` prints as it is and terminal.ts draws. Called by `scripts/demo.ts`.
 */
import type { Group } from "../../mod.ts";
import { type Comparison, RMS_BOUND } from "./compare.ts";
import { INTERMEDIATE, NUM_EXPERTS, NUM_TOPK } from "./layer.ts";
import type { Delivery, Mode } from "./modes.ts";
import type { DemoOptions, ModeName } from "./options.ts";
import type { Rank, Times } from "./world.ts";

/** What a rank tells the others about a mode. */
export interface RankReport extends Pick<Delivery, "load" | "sources"> {
  readonly rank: number;
  readonly firstToken: number;
  readonly firstExpert: number;
  readonly numTokens: number;
  readonly bytesSent: number;
  readonly rowsPulled: number;
  /** How often the rank's own gate chose each expert of the layer. */
  readonly asked: readonly number[];
  readonly comparison: Comparison;
}

/** A token whose result is wrong. */
export interface WrongToken {
  readonly rank: number;
  readonly token: number;
  readonly word: string;
  readonly channel: number;
  readonly got: number;
  readonly expected: number;
}

/** The outcome of a mode. Printed by `--json`, so names and units are for machines. */
export interface ModeReport {
  readonly mode: ModeName;
  readonly title: string;
  readonly ok: boolean;
  readonly backend: string;
  readonly runtime: string;
  readonly ranks: number;
  readonly processes: number;
  readonly tokens: number;
  readonly hidden: number;
  readonly intermediate: number;
  readonly experts: number;
  readonly topk: number;
  /** Phases of all ranks together, in the order they ran. */
  readonly phasesMs: Times;
  /** Rows that were received, and their payload and scale bytes. */
  readonly rowsMoved: number;
  readonly bytesMoved: number;
  /** Expert-output rows that combine read. */
  readonly rowsPulled: number;
  readonly maxAbsError: number;
  readonly values: number;
  readonly bitExactValues: number;
  readonly wrongTokens: number;
  readonly firstWrong: WrongToken | null;
  /** Relative distance from the layer without any rounding, and the most that rounding explains. */
  readonly rmsError: number;
  readonly rmsBound: number;
  /** Whether every expert received as many rows as all gates together sent it. */
  readonly loadAgrees: boolean;
  /** Of the whole output; the same for any number of processes. */
  readonly checksum: string;
  readonly loadPerExpert: readonly number[];
  /** Rows from each rank (first index) to each rank. */
  readonly traffic: readonly (readonly number[])[];
}

/** What rank `rank` has to tell. */
export function rankReport(
  rank: Rank,
  delivery: Delivery,
  facts: Pick<RankReport, "bytesSent" | "rowsPulled" | "comparison">,
): RankReport {
  const asked: number[] = new Array(NUM_EXPERTS).fill(0);
  rank.routing.topkIdx.forEach((expert) => asked[expert]!++);
  const { firstToken, numTokens, experts, group } = rank, { load, sources } = delivery;
  return { rank: group.rank, firstToken, firstExpert: experts.first, numTokens, load, sources, asked, ...facts };
}

/** Gives every rank all ranks' reports, in rank order. Collective. */
export async function gatherReports(group: Group, own: RankReport): Promise<RankReport[]> {
  const all = await group.allGather(new TextEncoder().encode(JSON.stringify(own)));
  return all.map((bytes) => JSON.parse(new TextDecoder().decode(bytes)) as RankReport);
}

/** Adds up all ranks' reports. */
export function mergeReports(
  all: readonly RankReport[],
  context: {
    name: ModeName;
    mode: Mode;
    demo: DemoOptions;
    words: readonly string[];
    times: Times;
    backend: string;
    processes: number;
  },
): ModeReport {
  const { name, mode, demo, times } = context;
  const sum = (of: (r: RankReport) => number) => all.reduce((total, r) => total + of(r), 0);
  const asked = Array.from({ length: NUM_EXPERTS }, (_, e) => sum((r) => r.asked[e]!));
  const loadPerExpert = all.flatMap((r) => r.load);
  const loadAgrees = loadPerExpert.every((rows, e) => rows === asked[e]);
  const rmsError = Math.sqrt(sum((r) => r.comparison.squaredError) / sum((r) => r.comparison.squaredNorm));
  const rmsBound = RMS_BOUND[mode.fp8 ? "fp8" : "bf16"];
  const values = sum((r) => r.comparison.values), bitExactValues = sum((r) => r.comparison.equal);
  const checksum = all.reduce((hash, r) => Math.imul(hash, 31) + r.comparison.checksum | 0, 0) >>> 0;
  return {
    mode: name,
    title: mode.title,
    ok: bitExactValues === values && rmsError <= rmsBound && loadAgrees,
    backend: context.backend,
    runtime: runtimeName(),
    ranks: all.length,
    processes: context.processes,
    tokens: sum((r) => r.numTokens),
    hidden: demo.hidden,
    intermediate: INTERMEDIATE,
    experts: NUM_EXPERTS,
    topk: NUM_TOPK,
    phasesMs: Object.fromEntries(Object.entries(times).map(([phase, ms]) => [phase, Math.round(ms * 1000) / 1000])),
    rowsMoved: sum((r) => r.sources.reduce((a, b) => a + b, 0)),
    bytesMoved: sum((r) => r.bytesSent),
    rowsPulled: sum((r) => r.rowsPulled),
    maxAbsError: all.reduce((most, r) => Math.max(most, r.comparison.maxAbsError ?? Infinity), 0), // JSON has no Infinity
    values,
    bitExactValues,
    wrongTokens: sum((r) => r.comparison.wrongTokens),
    firstWrong: firstWrong(all, context.words),
    rmsError,
    rmsBound,
    loadAgrees,
    checksum: checksum.toString(16).padStart(8, "0"),
    loadPerExpert,
    traffic: all.map((from) => all.map((to) => to.sources[from.rank]!)),
  };
}

function firstWrong(all: readonly RankReport[], words: readonly string[]): WrongToken | null {
  const found = all.find((r) => r.comparison.first !== null);
  if (!found) return null;
  return {
    rank: found.rank,
    word: words[found.firstToken + found.comparison.first!.token]!,
    ...found.comparison.first!,
  };
}

/** The runtime with its version. */
export function runtimeName(): string {
  const { Bun, Deno } = globalThis as { Bun?: { version: string }; Deno?: { version: { deno: string } } };
  return Bun ? `bun ${Bun.version}` : Deno ? `deno ${Deno.version.deno}` : "unknown runtime";
}
