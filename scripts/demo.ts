/**
 * The demo: the main job on real input. A Mixture-of-Experts layer with DeepSeek-V3 routing over the tokens of a text file:
 * embeddings, gate, dispatch to the ranks of the experts, their feed-forwards, combine; then the same layer without
 * communication, which every bit must agree with. In: the flags of `--help`. Out: a report for people or JSON lines, and
 * the exit code: 0 right, 1 wrong or failed, 2 a bad flag. Needs nothing installed.
 *
 *   bun scripts/demo.ts        deno run -A scripts/demo.ts
 */
import process from "node:process";
import type { Group } from "../mod.ts";
import { compare } from "./demo/compare.ts";
import { denseLayer, type DenseResult } from "./demo/dense.ts";
import { INTERMEDIATE, Layer } from "./demo/layer.ts";
import { type Mode, modes } from "./demo/modes.ts";
import { type DemoOptions, type ModeName, parseOptions, USAGE, UsageError } from "./demo/options.ts";
import { onTerminal, runProcesses } from "./demo/processes.ts";
import { Progress } from "./demo/progress.ts";
import { gatherReports, mergeReports, type ModeReport, rankReport, runtimeName } from "./demo/report.ts";
import { heading, heatMap, loadChart, modeLines, Painter } from "./demo/terminal.ts";
import { readText, type Text } from "./demo/text.ts";
import { allTokens, joinGroups, Laps, launched, makeRanks, type Rank, type Times } from "./demo/world.ts";

/** Everything a mode needs. */
interface World {
  readonly demo: DemoOptions;
  readonly text: Text;
  readonly layer: Layer;
  readonly ranks: readonly Rank[];
  readonly times: Times;
  readonly progress: Progress;
  /** Dense results by kind of rounding: modes that round alike share one. */
  readonly dense: Map<string, Promise<DenseResult>>;
}

/** The dense result for the tokens of all ranks of this process. */
function denseOf(
  { layer, ranks, progress, dense }: World,
  mode: Pick<Mode, "fp8" | "sumsPerRank">,
): Promise<DenseResult> {
  const key = `${mode.fp8} ${mode.sumsPerRank}`, known = dense.get(key);
  if (known) return known;
  const { fp8, sumsPerRank } = mode, numRanks = ranks[0]!.group.size;
  const made = denseLayer(layer, allTokens(ranks), { fp8, sumsPerRank, numRanks, progress });
  dense.set(key, made);
  return made;
}

/** Runs one rank through a mode and its check. All ranks do it together. */
async function runRank(world: World, name: ModeName, rank: Rank): Promise<ModeReport> {
  const mode = modes[name], { buffer, group } = rank, { hidden } = world.layer;
  const before = buffer.stats(), laps = await Laps.start(group);
  const delivery = await mode.run(rank, laps);
  world.progress.end();
  await laps.lap();
  const after = buffer.stats();
  const expected = await denseOf(world, mode), plain = await denseOf(world, modes.bf16);
  const from = (rank.firstToken - world.ranks[0]!.firstToken) * hidden, to = from + rank.numTokens * hidden;
  const part = ({ rounded, unrounded }: DenseResult): DenseResult => ({
    rounded: rounded.subarray(from, to),
    unrounded: unrounded.subarray(from, to),
  });
  const comparison = compare(delivery.out, part(expected), part(plain).unrounded, hidden);
  await laps.lap("check");
  const all = await gatherReports(
    group,
    rankReport(rank, delivery, {
      bytesSent: after.bytesSent - before.bytesSent,
      rowsPulled: after.rowsPulled - before.rowsPulled,
      comparison,
    }),
  );
  return mergeReports(all, {
    name,
    mode,
    demo: world.demo,
    words: world.text.words,
    times: { ...world.times, ...laps.times },
    backend: buffer.backend,
    processes: launched() ? group.size : 1,
  });
}

function printHeading({ demo, text, layer, ranks, times }: World, paint: Painter): void {
  const { group, buffer } = ranks[0]!;
  const tokens = Math.min(text.ids.length, group.size * demo.tokens);
  console.log(heading({
    path: text.path,
    tokens,
    textTokens: text.ids.length,
    kinds: new Set(text.words.slice(0, tokens)).size,
    hidden: demo.hidden,
    intermediate: INTERMEDIATE,
    weights: layer.numWeights,
    ranks: group.size,
    processes: launched() ? group.size : 1,
    backend: buffer.backend,
    reason: buffer.backendReason,
    runtime: runtimeName(),
    times,
  }, paint));
}

/** Runs and prints every mode; whether all were right. Rank 0 prints. */
async function runModes(world: World, begun: number): Promise<boolean> {
  const { demo, ranks } = world, prints = ranks[0]!.group.rank === 0;
  const paint = new Painter(onTerminal("stdout") && !process.env.NO_COLOR);
  const talks = prints && !demo.json, reports: ModeReport[] = [];
  if (talks) printHeading(world, paint);
  for (const name of demo.modes) {
    const [report] = await Promise.all(ranks.map((rank) => runRank(world, name, rank)));
    reports.push(report!);
    if (talks) console.log(modeLines(report!, modes[name].rows, paint));
    else if (prints) console.log(JSON.stringify(report));
  }
  const wrong = reports.filter((report) => !report.ok);
  if (talks && reports.length > 0) {
    console.log(loadChart(reports[0]!.loadPerExpert, paint));
    console.log(heatMap(reports[0]!, paint));
    const seconds = ((performance.now() - begun) / 1000).toFixed(1);
    console.log(
      wrong.length === 0
        ? paint.good(`All right in ${seconds} s`)
        : paint.bad(`${wrong.length} of ${reports.length} modes wrong, in ${seconds} s`),
    );
  } else if (prints) {
    for (const { title, firstWrong: w } of wrong) {
      console.error(`demo: ${title} is wrong${w ? `, first at token ${w.token} of rank ${w.rank}` : ""}`);
    }
  }
  return wrong.length === 0;
}

async function main(args: readonly string[]): Promise<number> {
  const begun = performance.now(), demo = parseOptions(args);
  if (!demo) {
    console.log(USAGE);
    return 0;
  }
  const text = readText(demo.text);
  if (demo.processes && !launched()) return await runProcesses(demo, args);
  const groups: readonly Group[] = await joinGroups(demo);
  const progress = new Progress(onTerminal("stderr") && groups[0]!.rank === 0);
  const layer = new Layer(demo.hidden);
  const { ranks, times } = await makeRanks(groups, { demo, text, layer, progress });
  const right = await runModes({ demo, text, layer, ranks, times, progress, dense: new Map() }, begun);
  // Nobody leaves before rank 0 has said how it went: the launcher ends a job with its first failure.
  await Promise.all(groups.map((group) => group.barrier()));
  await Promise.all(ranks.map((rank) => rank.buffer.close()));
  await Promise.all(groups.map((group) => group[Symbol.asyncDispose]()));
  return right || groups[0]!.rank !== 0 ? 0 : 1;
}

try {
  process.exitCode = await main(process.argv.slice(2));
} catch (error) {
  if (error instanceof UsageError) {
    console.error(`demo: ${error.message}\nTry --help`);
    process.exit(2);
  }
  console.error(`demo: ${(error as Error).message}`);
  process.exit(1); // other ranks of this process may still wait for each other
}
