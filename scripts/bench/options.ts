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

/** What `--help` prints. */
export const USAGE = `Usage: bench.ts [options]      (bun scripts/bench.ts, or deno run -A scripts/bench.ts)

Verifies dispatch, combine and low latency against the reference, then times them. All ranks are in this process. Beside
each figure stand the bytes, the copy ceiling of the same run and the naive way (permute, one copy per peer, unpermute).

  --backend auto|cpu|cuda   default: the best that works here
  --library FILE            library to use instead of the package's own
  --ranks N                 default 8
  --tokens N                tokens a rank in normal mode, default 512
  --ll-tokens N,N,...       tokens a rank in low-latency mode, default 1,8,32,128
  --hidden N                default 7168
  --topk N                  default 8
  --experts N               default 256
  --sms N                   multiprocessors an operation may use, default: the plan's choice; nothing on cpu
  --ops OP,OP,...           default all: ${OPS.slice(0, 6).join(", ")},
                            ${OPS.slice(6).join(", ")}
  --iterations N            calls in a chain, default: as many as fill --chain-ms
  --chain-ms N              length of a chain, default 200
  --repetitions N           chains of each kind, taken in turns, default 7
  --quick                   the same as --chain-ms 60 --repetitions 3
  --json FILE               append one JSON line per figure
  --corrupt                 flip a bit of what is verified: the bench must refuse and exit with 1 (for its test)
  --help                    this text
`;

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
  readonly corrupt: boolean;
}

function whole(name: string, text: string, least: number): number {
  const value = Number(text);
  if (!Number.isSafeInteger(value) || value < least) {
    throw new RangeError(`Cannot bench: --${name} is ${text}, needs a whole number from ${least}`);
  }
  return value;
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
      tokens: { ...text, default: "512" },
      "ll-tokens": { ...text, default: "1,8,32,128" },
      hidden: { ...text, default: "7168" },
      topk: { ...text, default: "8" },
      experts: { ...text, default: "256" },
      sms: { ...text, default: "0" },
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
  const ops = values.ops.split(",");
  const unknown = ops.find((op) => !(OPS as readonly string[]).includes(op));
  if (unknown !== undefined) throw new RangeError(`Cannot bench: there is no op ${unknown}; ops are ${OPS.join(", ")}`);
  const topk = whole("topk", values.topk, 1), experts = whole("experts", values.experts, 1);
  if (topk > experts) throw new RangeError(`Cannot bench: --topk is ${topk}, there are ${experts} experts`);
  return {
    backend: values.backend as Backend | "auto",
    library: values.library,
    ranks: whole("ranks", values.ranks, 1),
    tokens: whole("tokens", values.tokens, 1),
    lowLatencyTokens: values["ll-tokens"].split(",").map((n) => whole("ll-tokens", n, 1)),
    hidden: whole("hidden", values.hidden, 16),
    topk,
    experts,
    numSms: whole("sms", values.sms, 0),
    ops: new Set(ops as OpName[]),
    iterations: values.iterations === undefined ? undefined : whole("iterations", values.iterations, 1),
    chainMs: whole("chain-ms", values["chain-ms"] ?? (values.quick ? "60" : "200"), 1),
    repetitions: whole("repetitions", values.repetitions ?? (values.quick ? "3" : "7"), 1),
    json: values.json,
    corrupt: values.corrupt,
  };
}
