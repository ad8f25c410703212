/**
 * The bench: verifies dispatch, combine and low latency, then times them. On a GPU it is the one of bench/gpu/bench.ts.
 *
 *   bun scripts/bench.ts [options]      deno run -A scripts/bench.ts [options]      --help lists the options
 *
 * In: flags. Out: a table for people, and with --json a line a figure for machines. Exits with 1 when a result is not the
 * reference's, without having timed it. How things are timed stands in bench/timing.ts, what the bound is in bench/ceiling.ts,
 * the naive way in bench/naive.ts.
 */
import process from "node:process";
import { EpError, LibraryError } from "../mod.ts";
import { benchGpu } from "./bench/gpu/bench.ts";
import { benchHost } from "./bench/host.ts";
import { benchLowLatency } from "./bench/low_latency.ts";
import { benchNormal } from "./bench/normal.ts";
import { type BenchOptions, isDefaultShape, parseOptions, USAGE } from "./bench/options.ts";
import { nowUs, Ranks } from "./bench/ranks.ts";
import { appendJson, type Figure, goals, type Machine, machineOf, table } from "./bench/report.ts";
import { VerificationError, Verifier } from "./bench/verify.ts";

async function* figuresOf(options: BenchOptions): AsyncGenerator<Figure> {
  const verifier = new Verifier(options.corrupt);
  yield* benchNormal(options, verifier);
  yield* benchLowLatency(options, verifier);
  yield* benchHost(options);
}

/** The machine, as a small buffer sees it. */
async function lookUp(options: BenchOptions): Promise<Machine> {
  const { hidden, experts, topk } = options;
  const shape = { hidden, numExperts: experts, numTopk: topk, maxTokensPerRank: 1 };
  await using ranks = await Ranks.create(1, options, shape);
  return machineOf(ranks.buffers[0]!, options);
}

/** Answers how many results were wrong that were not timed. */
async function bench(options: BenchOptions): Promise<number> {
  const begin = nowUs();
  const machine = await lookUp(options);
  console.log(
    `${machine.gpu}, driver ${machine.driver}, backend ${machine.backend}, ${machine.runtime}, ${machine.commit}, ${machine.date}`,
  );
  if (machine.backend !== "cpu" || options.gpu.anyBackend) return await benchGpu(options, machine);
  console.log(
    `${options.ranks} ranks in one process, hidden ${options.hidden}, top-${options.topk} of ${options.experts} experts; ` +
      `us a call of all ranks: median and spread of ${options.repetitions} chains`,
  );
  const figures: Figure[] = [];
  for await (const figure of figuresOf(options)) {
    figures.push(figure);
    if (options.json !== undefined) appendJson(options.json, figure, machine, options);
    console.error(`  ${figure.op}, ${figure.tokens} tokens: ${figure.measured.median.toFixed(1)} us`);
  }
  console.log(`\n${table(figures)}`);
  console.log(`\n${goals(figures, isDefaultShape(options)).join("\n")}`);
  console.log(`\n${figures.length} figures in ${((nowUs() - begin) / 1e6).toFixed(0)} s`);
  return 0;
}

async function main(): Promise<number> {
  try {
    const options = parseOptions(process.argv.slice(2));
    if (options) return await bench(options) === 0 ? 0 : 1;
    console.log(USAGE);
    return 0;
  } catch (error) {
    if (error instanceof VerificationError) console.error(`Refused to time a wrong result: ${error.message}`);
    else if (error instanceof LibraryError) console.error(error.message);
    else if (error instanceof EpError && error.op === "create") console.error(error.message);
    else console.error((error as Error).stack ?? error);
    return 1;
  }
}

// Exits although a buffer that hangs may have been left behind.
if (import.meta.main) process.exit(await main());
