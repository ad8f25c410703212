/**
 * Opens scripts/decode/decode.cu: the kernels of a decode step that are not the library's.
 *
 * In: nvcc, a library that was compiled before, or one that DEEPEP_DECODE_LIBRARY names. Out: its functions, or why there are
 * none. Called by step.ts and by the tests on cuda; run as a program it compiles and prints the path.
 */
import process from "node:process";
import { fileURLToPath } from "node:url";
import { runtime } from "../../lib/ffi/open.ts";
import { compileKernels } from "../native/kernels.ts";

const source = fileURLToPath(new URL("./decode.cu", import.meta.url));

/** Fields of each command in the order of decode.cu; all are words of 64 bits. */
const fields = {
  draw: ["x", "topkIdx", "topkWeights", "record", "seed", "rank", "tokens", "hidden", "experts", "topk"],
  experts: ["x", "scales", "scaleExpertStride", "scaleRowStride", "scaleElemStride", "count", "y", "firstExpert"]
    .concat(["localExperts", "maxRows", "hidden", "multiply", "add"]),
  check: ["x", "topkIdx", "topkWeights", "out", "record", "tokens", "hidden", "topk", "multiply", "add"],
  compute: ["begin", "end", "sink", "steps", "blocks"],
  stamp: ["at"],
} as const;

/** A command of decode.cu. */
export type Command = keyof typeof fields;

const table = {
  deepep_decode_open: { args: ["i32"], ret: "i32" },
  deepep_decode_draw: { args: ["buf", "u64"], ret: "i32" },
  deepep_decode_experts: { args: ["buf", "u64"], ret: "i32" },
  deepep_decode_check: { args: ["buf", "u64"], ret: "i32" },
  deepep_decode_compute: { args: ["buf", "u64"], ret: "i32" },
  deepep_decode_stamp: { args: ["buf", "u64"], ret: "i32" },
  deepep_decode_shape: { args: ["buf", "u64"], ret: "i32" },
  deepep_decode_error: { args: ["i32", "buf", "u32"], ret: "i32" },
} as const;

type Run = (words: Uint8Array, stream: bigint) => number;
type Symbols = Record<`deepep_decode_${Command}`, Run> & {
  deepep_decode_open(device: number): number;
  deepep_decode_shape: Run;
  deepep_decode_error(code: number, out: Uint8Array, bytes: number): number;
};

/** The open library. */
export class DecodeKernels {
  readonly #symbols: Symbols;

  constructor(path: string, device = 0) {
    if (!runtime) throw new Error("this runtime has no FFI that is known");
    this.#symbols = runtime.bind(path, table) as unknown as Symbols;
    this.#check("open", this.#symbols.deepep_decode_open(device));
  }

  /** Enqueues a command on a stream; in a capture it is recorded. */
  run(command: Command, values: Readonly<Record<string, bigint | number>>, stream: bigint): void {
    const words = BigUint64Array.from(fields[command], (field: string) => BigInt(values[field]!));
    this.#check(command, this.#symbols[`deepep_decode_${command}`](new Uint8Array(words.buffer), stream));
  }

  /** The graph that `stream` is being captured into: its size, and the most edges from or to one of its nodes. */
  shape(stream: bigint): { nodes: number; edges: number; widest: number } {
    const words = new BigUint64Array(3);
    this.#check("shape", this.#symbols.deepep_decode_shape(new Uint8Array(words.buffer), stream));
    const [nodes, edges, widest] = Array.from(words, Number) as [number, number, number];
    return { nodes, edges, widest };
  }

  #check(what: string, code: number): void {
    if (code === 0) return;
    const text = new Uint8Array(new ArrayBuffer(256));
    this.#symbols.deepep_decode_error(code, text, text.length);
    throw new Error(`Cannot ${what} decode.cu: ${new TextDecoder().decode(text.subarray(0, text.indexOf(0)))}`);
  }
}

let opened: DecodeKernels | string | undefined;

/** The library, or why there is none. Opened once in a realm. */
export function decodeKernels(): DecodeKernels | string {
  if (opened === undefined) {
    try {
      opened = new DecodeKernels(process.env["DEEPEP_DECODE_LIBRARY"] || compileKernels("decode", source));
    } catch (error) {
      opened = (error as Error).message;
    }
  }
  return opened;
}

if (import.meta.main) console.log(compileKernels("decode", source));
