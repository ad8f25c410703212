/**
 * The demo's command line. In: arguments. Out: options with every default filled in, or a `UsageError` that says what is
 * wrong with which flag. Called by `scripts/demo.ts`; no other file of the demo reads arguments.
 */
import { basename } from "node:path";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import type { Backend } from "../../mod.ts";

/** The three ways a layer's tokens travel. */
export const modeNames = ["bf16", "fp8", "low-latency"] as const;
/** One of them. */
export type ModeName = typeof modeNames[number];

/** What the command line says. */
export interface DemoOptions {
  /** Path of the text file. */
  readonly text: string;
  readonly ranks: number;
  /** Whether the number of ranks was asked for, and not the default. */
  readonly ranksGiven: boolean;
  /** Channels a token, a multiple of 16. */
  readonly hidden: number;
  /** Most tokens a rank. */
  readonly tokens: number;
  readonly modes: readonly ModeName[];
  readonly processes: boolean;
  readonly backend: Backend | "auto";
  readonly json: boolean;
  readonly corrupt: boolean;
}

/** A flag that cannot be understood: exit code 2. */
export class UsageError extends Error {}

const readme = fileURLToPath(new URL("../../README.md", import.meta.url));

export const USAGE = `Usage: demo.ts [options]

Sends the tokens of a text file through one Mixture-of-Experts layer with DeepSeek-V3 routing (sigmoid scores with bias,
top-8 of 256 experts from the best 4 of 8 groups): embeddings, gate, dispatch, every expert's gated feed-forward, combine.
Compares the result with the same layer computed without any communication, and exits with 1 if it differs.

      --text FILE       text to read (default: ${basename(readme)})
      --ranks N         ranks, 1 to 64 (default: 8)
      --tokens N        most tokens a rank, 1 to 16384 (default: 256)
      --hidden N        channels a token, a multiple of 16 from 16 to 16384 (default: 512)
      --mode MODE       ${modeNames.join(", ")} or all (default: all)
      --processes       a process for each rank, instead of all ranks in this one
      --backend NAME    auto, cpu, cuda or nvshmem (default: auto)
      --json            one JSON object for each mode on standard output, nothing else
      --corrupt         for testing the check: flip a byte of the first row that each rank receives
  -h, --help            this text

Started by scripts/launch.ts, torchrun or mpirun, a process is one rank of their job, and rank 0 prints.
NO_COLOR turns colours off. Times are of first, cold calls; scripts/bench.ts measures.
`;

/** Reads the command line; undefined when help is asked for. @throws {UsageError} */
export function parseOptions(args: readonly string[]): DemoOptions | undefined {
  const values = rawValues(args);
  if (values.help) return undefined;
  const hidden = whole("hidden", values.hidden ?? "512", 16, 16384);
  if (hidden % 16 !== 0) throw new UsageError(`--hidden is ${hidden}, needs a multiple of 16`);
  return {
    text: values.text ?? readme,
    ranks: whole("ranks", values.ranks ?? "8", 1, 64),
    ranksGiven: values.ranks !== undefined,
    hidden,
    tokens: whole("tokens", values.tokens ?? "256", 1, 16384),
    modes: modesOf(values.mode ?? "all"),
    processes: values.processes ?? false,
    backend: oneOf("backend", values.backend ?? "auto", ["auto", "cpu", "cuda", "nvshmem"] as const),
    json: values.json ?? false,
    corrupt: values.corrupt ?? false,
  };
}

// deno-lint-ignore explicit-function-return-type -- inferred from the table of flags
function rawValues(args: readonly string[]) {
  try {
    const { values } = parseArgs({
      args: [...args],
      options: {
        text: { type: "string" },
        ranks: { type: "string" },
        tokens: { type: "string" },
        hidden: { type: "string" },
        mode: { type: "string" },
        processes: { type: "boolean" },
        backend: { type: "string" },
        json: { type: "boolean" },
        corrupt: { type: "boolean" },
        help: { type: "boolean", short: "h" },
      },
    });
    return values;
  } catch (error) {
    throw new UsageError((error as Error).message.split("\n")[0]!);
  }
}

function modesOf(text: string): readonly ModeName[] {
  const mode = oneOf("mode", text, [...modeNames, "all"] as const);
  return mode === "all" ? modeNames : [mode];
}

function oneOf<T extends string>(flag: string, text: string, allowed: readonly T[]): T {
  if ((allowed as readonly string[]).includes(text)) return text as T;
  throw new UsageError(`--${flag} is "${text}", needs ${allowed.slice(0, -1).join(", ")} or ${allowed.at(-1)}`);
}

function whole(flag: string, text: string, least: number, most: number): number {
  const value = /^\d+$/.test(text) ? Number(text) : NaN;
  if (value >= least && value <= most) return value;
  throw new UsageError(`--${flag} is "${text}", needs a whole number from ${least} to ${most}`);
}
