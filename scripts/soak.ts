/**
 * Decode steps without end, each of them checked: dispatch, stand-in experts, combine, on all ranks of one process.
 *
 * In: the flags below. Out: progress on standard error, and a line of JSON on standard output. The first mismatch ends it with
 * status 1 and its step, rank and token. On cuda a step is a replay of a captured graph that draws its rows and routing, and
 * checks every element of its result, on the device; every `--look` steps the host draws and checks a step by itself. On cpu it
 * is plain calls, drawn and checked by the host. Runs under Bun and Deno.
 */
import process from "node:process";
import { parseArgs } from "node:util";
import { type Backend, EpBuffer, Group } from "../mod.ts";
import { type DecodeShape, draw, expected, firstWrong } from "./decode/draw.ts";
import { decodeBuffer, DecodeStep } from "./decode/step.ts";

const USAGE = `Usage: soak.ts [options]      (bun scripts/soak.ts, or deno run -A scripts/soak.ts)

  --backend auto|cpu|cuda   default: the best that works here
  --steps N                 default 1000000
  --seconds N               end well after so long, however many steps there were; default: no limit
  --ranks N                 default 8
  --tokens N                of each rank, default 8
  --hidden N                default 1024
  --experts N               default 64
  --topk N                  default 8
  --seed N                  default 1
  --look N                  on cuda: steps between two looks of the host, default 1000
  --halves                  send and receive in two calls each
  --per-graph N             on cuda: steps in a graph, at most 8, default 4; 0 = plain calls
  --corrupt                 believe that experts do another thing: the first step must be found wrong (for its test)
  --help                    this text
`;

/** What to run, and how it is checked. */
export interface SoakOptions {
  readonly backend: Backend | "auto";
  readonly steps: number;
  readonly seconds: number;
  readonly ranks: number;
  readonly shape: DecodeShape;
  readonly seed: number;
  readonly look: number;
  readonly recvHook: boolean;
  /** 0: plain calls. */
  readonly perGraph: number;
  readonly corrupt: boolean;
}

/** A result that is wrong. */
class Mismatch extends Error {
  readonly at: { readonly step: number; readonly rank: number; readonly token: number };
  constructor(step: number, rank: number, token: number) {
    super(`step ${step}, rank ${rank}: token ${token} is wrong`);
    this.at = { step, rank, token };
  }
}

function parse(args: string[]): SoakOptions | undefined {
  const text = { type: "string" } as const, flag = { type: "boolean", default: false } as const;
  const { values } = parseArgs({
    args,
    options: {
      backend: { ...text, default: "auto" },
      steps: { ...text, default: "1000000" },
      seconds: { ...text, default: "86400" },
      ranks: { ...text, default: "8" },
      tokens: { ...text, default: "8" },
      hidden: { ...text, default: "1024" },
      experts: { ...text, default: "64" },
      topk: { ...text, default: "8" },
      seed: { ...text, default: "1" },
      look: { ...text, default: "1000" },
      halves: flag,
      "per-graph": { ...text, default: "4" },
      corrupt: flag,
      help: flag,
    },
  });
  if (values.help) return undefined;
  const whole = (name: Exclude<keyof typeof values, "halves" | "corrupt" | "help">, least = 1): number => {
    const value = Number(values[name]);
    if (Number.isSafeInteger(value) && value >= least) return value;
    throw new RangeError(`Cannot soak: --${name} is ${values[name]}, needs a whole number from ${least}`);
  };
  if (!["auto", "cpu", "cuda"].includes(values.backend)) {
    throw new RangeError(`Cannot soak: --backend is ${values.backend}, needs auto, cpu or cuda`);
  }
  return {
    backend: values.backend as SoakOptions["backend"],
    steps: whole("steps"),
    seconds: whole("seconds"),
    ranks: whole("ranks"),
    shape: { tokens: whole("tokens"), hidden: whole("hidden"), experts: whole("experts"), topk: whole("topk") },
    seed: whole("seed"),
    look: whole("look"),
    recvHook: values.halves,
    perGraph: whole("per-graph", 0),
    corrupt: values.corrupt,
  };
}

/** All ranks in this thread, and what they have done. */
export class Soak implements AsyncDisposable {
  readonly #options: SoakOptions;
  readonly #buffers: readonly EpBuffer[];
  readonly #ranks: readonly DecodeStep[];
  #step = 0;

  private constructor(options: SoakOptions, buffers: readonly EpBuffer[]) {
    this.#options = options;
    this.#buffers = buffers;
    const { shape, seed, perGraph, recvHook } = options, how = { seed, perGraph, recvHook, ...this.#believed };
    this.#ranks = buffers.map((buffer) => new DecodeStep(buffer, shape, how));
  }

  static async create(options: SoakOptions): Promise<Soak> {
    const buffer = { ...decodeBuffer(options.shape, options.perGraph), backend: options.backend, timeoutMs: 60_000 };
    return new Soak(options, await Promise.all(Group.local(options.ranks).map((g) => EpBuffer.create(g, buffer))));
  }

  /** What does the work. */
  get backend(): Backend {
    return this.#buffers[0]!.backend;
  }
  /** Steps that were made. */
  get steps(): number {
    return this.#step;
  }

  get #believed() {
    return this.#options.corrupt ? { believed: { multiply: 7, add: 11 } } : {};
  }

  /** Makes the next steps, about `count`, and checks them. @throws {Mismatch} */
  async advance(count: number): Promise<void> {
    if (this.backend === "cpu") return await this.#byHost();
    const last = this.#step + count, { perRun } = this.#ranks[0]!;
    for (let runs = 1; this.#step < last; runs++) {
      const events = this.#ranks.map((rank) => rank.run());
      this.#step += perRun;
      // Some at a time: neither the host nor the device waits for the other, and none runs far ahead.
      if (runs % 16 === 0) await Promise.all(events);
    }
    await this.#look();
  }

  /** On cpu: one step, drawn and checked here. */
  async #byHost(): Promise<void> {
    const { shape, seed } = this.#options, step = this.#step++;
    const sent = this.#ranks.map(({ buffer: { rank } }) => draw(shape, { seed, step, rank }));
    for (const [r, rank] of this.#ranks.entries()) {
      rank.x.write(sent[r]!.x);
      rank.topkIdx.write(sent[r]!.topkIdx);
      rank.topkWeights.write(sent[r]!.topkWeights);
    }
    for (const rank of this.#ranks) rank.run();
    await Promise.all(this.#ranks.map(async ({ out, standIn }, r) => {
      const want = expected(shape, sent[r]!, this.#believed.believed ?? standIn);
      const token = firstWrong(shape, await out.read(), want);
      if (token >= 0) throw new Mismatch(step, r, token);
    }));
  }

  /** On cuda: what the device has found, and the latest step once more by the host. */
  async #look(): Promise<void> {
    const { shape, seed } = this.#options, step = this.#step - 1;
    const found = await Promise.all(this.#ranks.map((rank) => rank.found()));
    const wrong = found.map(({ first }, rank) => ({ rank, first })).filter(({ first }) => first)
      .sort((a, b) => a.first!.step - b.first!.step)[0];
    if (wrong) throw new Mismatch(wrong.first!.step, wrong.rank, wrong.first!.token);
    for (const [rank, { steps }] of found.entries()) {
      if (steps !== this.#step) throw new Error(`rank ${rank} has checked ${steps} steps of ${this.#step}`);
    }
    await Promise.all(this.#ranks.map(async ({ x, out, standIn }, rank) => {
      const sent = draw(shape, { seed, step, rank }), [rows, got] = await Promise.all([x.read(), out.read()]);
      const drawn = firstWrong(shape, rows, sent.x);
      if (drawn >= 0) throw new Error(`step ${step}, rank ${rank}: token ${drawn} was not drawn as the host draws it`);
      const token = firstWrong(shape, got, expected(shape, sent, standIn));
      if (token >= 0) throw new Mismatch(step, rank, token);
    }));
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const rank of this.#ranks) rank[Symbol.dispose]();
    await Promise.all(this.#buffers.map((buffer) => buffer.close()));
  }
}

/** Answers the exit status. */
async function main(): Promise<number> {
  const options = parse(process.argv.slice(2));
  if (!options) {
    console.log(USAGE);
    return 0;
  }
  const { steps: wanted, seconds: limit, look, ranks, shape, seed, perGraph, recvHook } = options;
  const soak = await Soak.create(options), began = performance.now();
  const seconds = () => (performance.now() - began) / 1000;
  const usPerStep = () => Number((seconds() * 1e6 / Math.max(1, soak.steps)).toFixed(2));
  let wrong: Mismatch["at"] | undefined, told = 0;
  try {
    while (soak.steps < wanted && seconds() < limit) {
      await soak.advance(Math.min(look, wanted - soak.steps));
      if (seconds() - told < 5) continue;
      told = seconds();
      console.error(`${soak.steps} of ${wanted} steps, ${usPerStep()} us a step`);
    }
  } catch (error) {
    if (!(error instanceof Mismatch)) throw error;
    console.error(error.message);
    wrong = error.at;
  }
  const { steps, backend } = soak, runtime = "Bun" in globalThis ? "bun" : "deno";
  const facts = {
    backend,
    runtime,
    ranks,
    ...shape,
    seed,
    halves: recvHook,
    perGraph: backend === "cpu" ? 0 : perGraph,
  };
  const times = { seconds: Number(seconds().toFixed(1)), usPerStep: usPerStep() };
  console.log(JSON.stringify({ soak: wrong ? "failed" : "passed", ...facts, steps, wanted, ...times, ...wrong }));
  await soak[Symbol.asyncDispose]();
  return wrong ? 1 : 0;
}

// Exits although a buffer that hangs may have been left behind.
if (import.meta.main) {
  process.exit(
    await main().catch((error) => {
      console.error(error instanceof RangeError ? error.message : error.stack ?? error);
      return 1;
    }),
  );
}
