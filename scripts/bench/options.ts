/**
 * The flags of the bench.
 *
 * In: the command line. Out: checked options with every default filled in. Called by scripts/bench.ts. The defaults are the
 * shape of published figures that a machine without a GPU can hold: 8 ranks, 512 tokens, hidden 7168, top-8 of 256 experts.
 */
import { parseArgs } from "node:util";
import type { Backend } from "../../mod.ts";

/** What can be measured, in the order in which it is. */
export const OPS = [
  "dispatch",
  "dispatch_cached",
  "dispatch_fp8",
  "dispatch_expert",
  "combine",
  "combine_copy",
  "ll_dispatch",
  "ll_combine",
  "host",
  "wake",
] as const;

/** One of {@linkcode OPS}. */
export type OpName = (typeof OPS)[number];

/** Parts of the bench of a GPU, in their order. */
export const GPU_PHASES = [
  "ceiling",
  "links",
  "main",
  "host",
  "wake",
  "low_latency",
  "graphs",
  "tokens",
  "ranks",
  "sms",
] as const;

/** One of {@linkcode GPU_PHASES}. */
export type GpuPhase = (typeof GPU_PHASES)[number];

/** What `--help` prints. */
export const USAGE = `Usage: bench.ts [options]      (bun scripts/bench.ts, or deno run -A scripts/bench.ts)

Verifies dispatch, combine and low latency against the reference, then times them. All ranks are in this process. Beside
each figure stand the bytes, the copy ceiling of the same run and the naive way (permute, one copy per peer, unpermute).

  --backend auto|cpu|cuda   default: the best that works here
  --library FILE            library to use instead of the package's own
  --ranks N                 default 8
  --tokens N                tokens a rank in normal mode, default 512; on a GPU 4096
  --ll-tokens N,N,...       tokens a rank in low-latency mode, default 1,8,32,128
  --hidden N                default 7168
  --topk N                  default 8
  --experts N               default 256
  --ops OP,OP,...           default all: ${OPS.slice(0, 6).join(", ")},
                            ${OPS.slice(6).join(", ")}
  --iterations N            calls in a chain, default: as many as fill --chain-ms
  --chain-ms N              length of a chain, default 200
  --repetitions N           chains of each kind, taken in turns, default 7
  --quick                   the same as --chain-ms 60 --repetitions 3
  --json FILE               append one JSON line per figure
  --commit TEXT             what the figures are of, where git does not tell

On a GPU the bench is another one: device events, launches against graphs, sweeps, the naive way with kernels of its own.
  --only PHASE,...          default all: ${GPU_PHASES.join(", ")}
  --sms N,N,...             multiprocessors a rank in phase main, default 16,8,4; sweeps take the first
  --ll-sms N                in phase low_latency; default: the first of --sms, 32 where ranks share no GPU
  --sweep-tokens N,N,...    default 1,2,4,...,8192; with --quick 1,8,64,512,4096
  --compare-tokens N,N,...  sizes that are also launched one by one, captured as graphs and held against the naive way,
                            default 1,2,4,...,4096; with --quick 1,64,4096
  --sweep-sms N,N,...       default 2,4,8,12,16; with --quick 4,16
  --sweep-ranks N,N,...     default 1,2,4,8; with --quick 1,4
  --limit SECONDS           leave out phases and sizes that would begin later, default 85; with --quick 35
  --size-limit SECONDS      leave out figures of a size that would begin later than that after it began, default 3
  --naive-library FILE      scripts/bench/naive.cu, compiled already; default: build/bench, by nvcc if need be
  --gpu-bench               the same on the cpu backend, without what it lacks (for its test)
  --corrupt                 flip a bit of what is verified: the bench must refuse and exit with 1 (for its test)
  --help                    this text
`;

/** Options of the bench of a GPU. */
export interface GpuOptions {
  readonly phases: ReadonlySet<GpuPhase>;
  readonly tokens: number;
  readonly numSms: readonly number[];
  /** Low latency; undefined: the first of `numSms`, or the library's default for ranks that share no device. */
  readonly lowLatencySms: number | undefined;
  readonly sweepTokens: readonly number[];
  /** Those of them that are launched one by one, captured as graphs and held against the naive way, too. */
  readonly compareTokens: readonly number[];
  readonly sweepSms: readonly number[];
  readonly sweepRanks: readonly number[];
  readonly repetitions: number;
  readonly limitS: number;
  readonly sizeLimitS: number;
  readonly quick: boolean;
  readonly naiveLibrary: string | undefined;
  /** On the cpu backend, too. */
  readonly anyBackend: boolean;
}

/** Options with every default filled in. */
export interface BenchOptions {
  readonly backend: Backend | "auto";
  readonly library: string | undefined;
  readonly ranks: number;
  readonly tokens: number;
  readonly lowLatencyTokens: readonly number[];
  readonly hidden: number;
  readonly topk: number;
  readonly experts: number;
  /** 0 = the plan's choice. */
  readonly numSms: number;
  readonly ops: ReadonlySet<OpName>;
  /** Undefined: as many as fill `chainMs`. */
  readonly iterations: number | undefined;
  readonly chainMs: number;
  readonly repetitions: number;
  readonly json: string | undefined;
  readonly commit: string | undefined;
  readonly corrupt: boolean;
  readonly gpu: GpuOptions;
}

function whole(name: string, text: string, least: number): number {
  const value = Number(text);
  if (!Number.isSafeInteger(value) || value < least) {
    throw new RangeError(`Cannot bench: --${name} is ${text}, needs a whole number from ${least}`);
  }
  return value;
}

const wholes = (name: string, text: string, least: number): number[] =>
  text.split(",").map((n) => whole(name, n, least));

/** The words of a list, checked. */
function words<T extends string>(what: string, text: string, known: readonly T[]): Set<T> {
  const given = text.split(",");
  const unknown = given.find((word) => !(known as readonly string[]).includes(word));
  if (unknown !== undefined) {
    throw new RangeError(`Cannot bench: there is no ${what} ${unknown}; ${what}s are ${known.join(", ")}`);
  }
  return new Set(given as T[]);
}

/** Whether a shape is that of the defaults, which goals are about. */
export function isDefaultShape({ ranks, tokens, hidden, topk, experts }: BenchOptions): boolean {
  return ranks === 8 && tokens === 512 && hidden === 7168 && topk === 8 && experts === 256;
}

/** Reads the command line; undefined when it asks for help. @throws {RangeError} naming the flag and its value */
export function parseOptions(args: string[]): BenchOptions | undefined {
  const text = { type: "string" } as const, flag = { type: "boolean", default: false } as const;
  const { values } = parseArgs({
    args,
    options: {
      backend: { ...text, default: "auto" },
      library: text,
      ranks: { ...text, default: "8" },
      tokens: text,
      "ll-tokens": { ...text, default: "1,8,32,128" },
      hidden: { ...text, default: "7168" },
      topk: { ...text, default: "8" },
      experts: { ...text, default: "256" },
      sms: text,
      "ll-sms": text,
      only: { ...text, default: GPU_PHASES.join(",") },
      "sweep-tokens": text,
      "compare-tokens": text,
      "sweep-sms": text,
      "sweep-ranks": text,
      limit: text,
      "size-limit": text,
      "naive-library": text,
      "gpu-bench": flag,
      commit: text,
      ops: { ...text, default: OPS.join(",") },
      iterations: text,
      "chain-ms": text,
      repetitions: text,
      quick: flag,
      json: text,
      corrupt: flag,
      help: flag,
    },
  });
  if (values.help) return undefined;
  if (!["auto", "cpu", "cuda", "nvshmem"].includes(values.backend)) {
    throw new RangeError(`Cannot bench: --backend is ${values.backend}, needs auto, cpu, cuda or nvshmem`);
  }
  const ops = words("op", values.ops, OPS), { quick } = values;
  const topk = whole("topk", values.topk, 1), experts = whole("experts", values.experts, 1);
  if (topk > experts) throw new RangeError(`Cannot bench: --topk is ${topk}, there are ${experts} experts`);
  const ranks = whole("ranks", values.ranks, 1);
  const powers = (count: number): string => Array.from({ length: count }, (_, i) => 2 ** i).join(",");
  const swept = quick ? "1,8,64,512,4096" : powers(14);
  const gpu: GpuOptions = {
    phases: words("phase", values.only, GPU_PHASES),
    tokens: whole("tokens", values.tokens ?? "4096", 1),
    numSms: wholes("sms", values.sms ?? "16,8,4", 1),
    lowLatencySms: values["ll-sms"] === undefined ? undefined : whole("ll-sms", values["ll-sms"], 1),
    sweepTokens: wholes("sweep-tokens", values["sweep-tokens"] ?? swept, 1),
    compareTokens: wholes("compare-tokens", values["compare-tokens"] ?? (quick ? "1,64,4096" : powers(13)), 1),
    sweepSms: wholes("sweep-sms", values["sweep-sms"] ?? (quick ? "4,16" : "2,4,8,12,16"), 1),
    sweepRanks: wholes("sweep-ranks", values["sweep-ranks"] ?? (quick ? "1,4" : "1,2,4,8"), 1),
    repetitions: whole("repetitions", values.repetitions ?? (quick ? "5" : "9"), 1),
    limitS: whole("limit", values.limit ?? (quick ? "35" : "85"), 1),
    sizeLimitS: whole("size-limit", values["size-limit"] ?? "3", 1),
    quick,
    naiveLibrary: values["naive-library"],
    anyBackend: values["gpu-bench"],
  };
  return {
    backend: values.backend as Backend | "auto",
    library: values.library,
    ranks,
    tokens: whole("tokens", values.tokens ?? "512", 1),
    lowLatencyTokens: wholes("ll-tokens", values["ll-tokens"], 1),
    hidden: whole("hidden", values.hidden, 16),
    topk,
    experts,
    numSms: 0,
    ops,
    iterations: values.iterations === undefined ? undefined : whole("iterations", values.iterations, 1),
    chainMs: whole("chain-ms", values["chain-ms"] ?? (quick ? "60" : "200"), 1),
    repetitions: whole("repetitions", values.repetitions ?? (quick ? "3" : "7"), 1),
    json: values.json,
    commit: values.commit,
    corrupt: values.corrupt,
    gpu,
  };
}
