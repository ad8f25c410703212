/**
 * The bench of a GPU: ceilings, the calls at the main size, what they cost the host, and sweeps.
 *
 * In: options. Out: lines as they come, JSON beside them, and at the end goals against figures. Called by scripts/bench.ts. Each
 * phase is on its own: when one fails the next goes on, on new buffers if those of the failed one are broken. Phases that would
 * begin after the time limit are left out, and it is said.
 */
import type { BenchOptions, GpuPhase } from "../options.ts";
import { nowUs, Ranks } from "../ranks.ts";
import type { Machine } from "../report.ts";
import { VerificationError, Verifier } from "../verify.ts";
import { type Ceiling, COPY_BYTES, measureCopies } from "./ceilings.ts";
import { within } from "./clock.ts";
import { goalTable } from "./goals.ts";
import { graphsOfSize, slotsOf } from "./graphs.ts";
import { hostPhase } from "./host_phase.ts";
import { measureLinks } from "./links.ts";
import { lowLatencyPhase } from "./low_latency/phase.ts";
import { mainPhase, type PhaseContext } from "./main_phase.ts";
import { type NaiveLibrary, naiveLibrary } from "./naive_library.ts";
import { plainCeilings } from "./plain.ts";
import { Report } from "./report.ts";
import { makeRouting, mostRows, type Routing } from "./routes.ts";
import { Stage, type StageShape } from "./stage.ts";
import { FORMS, shapeSweep, tokenSweep } from "./sweeps.ts";
import { tables } from "./tables.ts";
import { wakePhase } from "./wake.ts";

/** Stages, of which one lives at a time. */
class Stages {
  readonly #options: BenchOptions;
  #stage: Stage | undefined;
  #key = "";

  constructor(options: BenchOptions) {
    this.#options = options;
  }

  /** The stage of such ranks, new unless the present one is; `made` hears when it is. */
  async get(shape: StageShape, made: () => void = () => {}): Promise<Stage> {
    const key = JSON.stringify(shape);
    if (this.#stage && key === this.#key && this.#usable()) return this.#stage;
    await this.close();
    this.#stage = await within(60_000, "creating the buffers", Stage.create(this.#options, shape));
    this.#key = key;
    made();
    return this.#stage;
  }

  #usable(): boolean {
    try {
      this.#stage?.dropResults();
      return this.#stage?.usable ?? false;
    } catch {
      return false;
    }
  }

  /** Closes the stage; one that hangs is left behind. */
  async close(): Promise<void> {
    const stage = this.#stage;
    this.#stage = undefined;
    if (stage) await within(30_000, "closing the buffers", stage[Symbol.asyncDispose]());
  }
}

/** What a run shares. */
class Run {
  readonly options: BenchOptions;
  readonly report: Report;
  readonly verifier: Verifier;
  readonly stages: Stages;
  readonly beginUs: number = nowUs();
  /** Or why there is none. */
  readonly naive: NaiveLibrary | string;
  readonly #broken = new Set<string>();
  wrong = 0;
  #sizeS = Infinity;
  #sizeEnd = Infinity;

  constructor(options: BenchOptions, report: Report) {
    const path = options.gpu.naiveLibrary;
    this.naive = path === undefined && report.machine.backend === "cpu"
      ? "it needs a GPU"
      : naiveLibrary(report.machine.numDevices, path);
    this.options = options;
    this.report = report;
    this.verifier = new Verifier(options.corrupt);
    this.stages = new Stages(options);
  }

  get seconds(): number {
    return (nowUs() - this.beginUs) / 1e6;
  }
  left(): boolean {
    return this.seconds < this.options.gpu.limitS;
  }
  /** Whether there is time for one more size; what comes until the next, or the next phase, then has the time of one. */
  nextSize(limitS: number = this.options.gpu.sizeLimitS): boolean {
    this.#sizeS = limitS;
    this.#sizeEnd = this.seconds + limitS;
    return this.left();
  }

  /** Runs a phase that was asked for, and goes on whatever comes of it. */
  async phase(name: GpuPhase, title: string, run: () => Promise<void>): Promise<void> {
    if (!this.options.gpu.phases.has(name)) return;
    if (!this.left()) return this.report.trouble(`${name}: left out, ${this.options.gpu.limitS} s are over`);
    this.report.say(`\n${name}: ${title}  [${this.seconds.toFixed(0)} s]`);
    this.#sizeS = this.#sizeEnd = Infinity;
    try {
      await run();
    } catch (error) {
      this.failed(name, error);
      await this.stages.close().catch((closing: Error) => this.report.trouble(`${name}: ${closing.message}`));
    }
  }

  /** Notes a failure. */
  failed(what: string, error: unknown): void {
    if (error instanceof VerificationError) this.wrong++;
    this.report.trouble(`${what}: ${(error as Error).message}`);
    console.error((error as Error).stack ?? error);
  }

  /** What a phase works with, on such a stage. Sweeps, which have many points, repeat less. */
  async context(shape: StageShape, swept = true): Promise<PhaseContext> {
    const { repetitions } = this.options.gpu;
    const stage = await this.stages.get(shape, () => this.#sizeEnd = this.seconds + this.#sizeS); // a new one takes seconds
    return {
      report: this.report,
      verifier: this.verifier,
      stage,
      naive: this.naive,
      repetitions: swept ? Math.ceil(repetitions / 2) : repetitions,
      broken: this.#broken,
      left: () => this.seconds < this.#sizeEnd,
      failed: (what, error) => this.failed(what, error),
    };
  }
}

/** Runs the bench; answers how many results were wrong. */
export async function benchGpu(options: BenchOptions, machine: Machine): Promise<number> {
  const report = new Report(options, machine), run = new Run(options, report);
  const { gpu, ranks, topk, experts } = options;
  const route = (numRanks: number, tokens: number): Routing =>
    makeRouting({ ranks: numRanks, tokens, topk, experts }, 1 + tokens);
  const main = route(ranks, gpu.tokens);
  const sizes = gpu.phases.has("tokens")
    ? gpu.sweepTokens
    : gpu.sweepTokens.filter((tokens) => gpu.phases.has("graphs") && gpu.compareTokens.includes(tokens));
  const swept = sizes.map((tokens) => route(ranks, tokens));
  const every = gpu.phases.has("tokens") ? [main, ...swept] : [main];
  const shape = {
    numRanks: ranks,
    tokens: Math.max(...every.map(({ tokens }) => tokens)),
    rows: Math.max(mostRows(main.expert), ...every.map(({ rank }) => mostRows(rank))),
  };
  report.say(
    `${ranks} ranks, ${gpu.tokens} tokens each, ${(main.rank.rows / ranks / gpu.tokens).toFixed(2)} rows a token; ` +
      `slots of ${shape.rows} rows. us a call of all ranks: median (min .. max) of ${gpu.repetitions}, of ${
        Math.ceil(gpu.repetitions / 2)
      } in sweeps`,
  );
  for (const [form, words] of Object.entries(FORMS)) report.say(`  ${form}: ${words}`);
  const { naive } = run;
  if (typeof naive === "string") report.say(`  no naive way: ${naive}`);

  await run.phase("ceiling", "what copies move, read and written", () => ceilings(run, "before"));
  if (typeof naive !== "string") {
    await run.phase("ceiling", "what plain kernels move that scatter and pull the rows of the calls", async () => {
      await plainCeilings(() => run.context(shape), main, gpu.numSms);
    });
  }
  if (typeof naive !== "string") {
    await run.phase("links", "what copies between devices move, bytes that one device sends", async () => {
      const { stage, repetitions } = await run.context({ numRanks: ranks, tokens: 1, rows: ranks });
      report.links = await measureLinks(stage, { report, library: naive, repetitions });
      if (!report.links) report.say("  all ranks are on one device");
    });
  }
  await run.phase("main", `the calls, ${gpu.numSms.join(", ")} SMs a rank`, async () => {
    await mainPhase(() => run.context(shape, false), main, gpu.numSms);
  });
  await run.phase("host", "a call of one rank, not awaited", () => hostPhase(report, options));
  await run.phase(
    "wake",
    "from counts in host memory, seen by a worker that reads them without pause, to the promise",
    () => wakePhase(report, options, gpu.quick ? 200 : 1000),
  );
  await run.phase("low_latency", "decode sizes, all ranks together", () =>
    lowLatencyPhase({
      options,
      report,
      context: (shape, swept = false) => run.context(shape, swept),
      nextSize: (limited) => limited ? run.nextSize() : run.nextSize(Infinity),
      failed: (what, error) => run.failed(what, error),
    }));
  const numSms = gpu.numSms[0]!;
  const compared = swept.filter(({ tokens }) => gpu.compareTokens.includes(tokens));
  await run.phase("graphs", `graphs of many calls, ${numSms} SMs a rank, the naive way beside`, async () => {
    for (const [numSlots, routings] of Map.groupBy(compared, ({ tokens }) => slotsOf(tokens))) {
      const rows = Math.max(...routings.map(({ rank }) => mostRows(rank)));
      const tokens = Math.max(...routings.map(({ tokens }) => tokens));
      const newContext = () => run.context({ numRanks: ranks, tokens, rows, numSlots });
      for (const routing of routings) {
        if (!run.nextSize()) return report.trouble(`graphs: no time for ${routing.tokens} tokens and more`);
        await graphsOfSize(newContext, routing, numSms);
      }
    }
  });
  await run.phase("tokens", `1 … ${shape.tokens} tokens, ${numSms} SMs a rank, the naive way beside some`, async () => {
    const newContext = () => run.context(shape);
    const nextSize = (): boolean => run.nextSize();
    await tokenSweep(newContext, swept, { numSms, compare: gpu.compareTokens, nextSize });
  });
  await run.phase("ranks", `ranks, ${numSms} SMs each`, async () => {
    for (const numRanks of gpu.sweepRanks) {
      if (!run.left()) return report.trouble(`ranks: no time for ${numRanks} and more`);
      const routing = route(numRanks, gpu.tokens);
      const context = await run.context({ numRanks, tokens: gpu.tokens, rows: mostRows(routing.rank) });
      await shapeSweep(context, routing, "ranks", [numSms]);
    }
  });
  await run.phase("sms", "multiprocessors a rank", async () => {
    await shapeSweep(await run.context(shape), main, "sms", gpu.sweepSms);
  });
  await run.stages.close().catch((error: Error) => report.trouble(error.message));
  if (gpu.phases.has("ceiling") && !gpu.quick) {
    await run.phase("ceiling", "again, to see whether the device has changed", () => ceilings(run, "after"));
  }
  report.say(`\n${tables(report)}\n${goalTable(report)}`);
  if (report.troubles.length > 0) report.say(`\n${report.troubles.length} troubles:\n${report.troubles.join("\n")}`);
  report.say(`\n${report.figures.length} figures in ${run.seconds.toFixed(0)} s`);
  return run.wrong;
}

/** Measures copies; those before the calls are ceilings. */
async function ceilings({ options, report, stages }: Run, when: "before" | "after"): Promise<void> {
  await stages.close();
  const { gpu, ranks: numRanks, hidden } = options;
  await using ranks = await Ranks.create(1, { ...options, numSms: 0 }, {
    hidden,
    numExperts: 1,
    numTopk: 1,
    maxTokensPerRank: 1,
  });
  await ranks.rest();
  const onDevice = Math.ceil(numRanks / report.machine.numDevices),
    most = [0, 16 * onDevice],
    rounds = gpu.quick || when === "after" ? 2 : 4;
  const every = when === "after" ? most : [0, 16, ...gpu.sweepSms.map((n) => n * onDevice), 16 * onDevice];
  const all = COPY_BYTES.flatMap((bytes, i) => measureCopies(ranks.buffers[0]!, i === 0 ? every : most, bytes, rounds));
  if (when === "before") report.ceilings = all;
  for (const one of all) say(report, one, when);
  const { ceiling, memcpy } = report;
  if (when === "before" && ceiling && memcpy) {
    report.say(
      `  the copy kernel moves ${ceiling.gbs.median.toFixed(0)} GB/s on ${ceiling.numSms} SMs, ` +
        `${(ceiling.traffic / 2e9).toFixed(2)} GB, the driver's memcpy ${memcpy.gbs.median.toFixed(0)} GB/s`,
    );
  }
}

function say(report: Report, ceiling: Ceiling, when: string): void {
  report.add({
    phase: "ceiling",
    op: ceiling.numSms === undefined ? "memcpy" : "copy_kernel",
    form: "copy",
    ranks: 1,
    numSms: ceiling.numSms ?? 0,
    tokens: 0,
    dtype: "none",
    layout: "none",
    us: ceiling.us,
    bytes: ceiling.traffic,
    more: { GBs: ceiling.gbs.median, GBsMin: ceiling.gbs.min, GBsMax: ceiling.gbs.max, when },
  });
}
