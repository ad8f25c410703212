/**
 * Compiles and opens scripts/bench/naive.cu.
 *
 * In: nvcc, or a library that was compiled before. Out: its functions, or why there are none: then the bench goes on without the
 * naive way. Called by naive.ts; run as a program it compiles and prints the path. The file's name has the hash of the source,
 * so that a library that was carried from another machine is of this source.
 */
import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, renameSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { runtime } from "../../../lib/ffi/open.ts";
import { findToolkit } from "../../native/toolkit.ts";
import type { Lane } from "../ranks.ts";

const source = fileURLToPath(new URL("../naive.cu", import.meta.url));
const folder = fileURLToPath(new URL("../../../build/bench", import.meta.url));

const table = {
  naive_open: { args: ["i32"], ret: "i32" },
  naive_run: { args: ["buf", "u32"], ret: "i32" },
  naive_capture: { args: ["buf", "u32", "buf"], ret: "i32" },
  naive_replay: { args: ["u64", "u64", "i32"], ret: "i32" },
  naive_free_graph: { args: ["u64"], ret: "i32" },
  naive_error: { args: ["i32", "buf", "u32"], ret: "i32" },
} as const;

/** The functions of naive.cu. */
interface Symbols {
  naive_open(devices: number): number;
  naive_run(commands: Uint8Array, count: number): number;
  naive_capture(commands: Uint8Array, count: number, out: Uint8Array): number;
  naive_replay(graph: bigint, stream: bigint, device: number): number;
  naive_free_graph(graph: bigint): number;
  naive_error(code: number, out: Uint8Array, bytes: number): number;
}

/** Commands, see naive.cu. */
export const OP = {
  gather: 1,
  copy: 2,
  record: 3,
  wait: 4,
  reduce: 5,
  scatter: 6,
  compare: 7,
  work: 8,
  stream: 9,
  store: 10,
} as const;

/** A command: an operation on a stream. */
export interface Command {
  readonly op: keyof typeof OP;
  /** As of a {@linkcode Lane}: it knows the device. */
  readonly on: Lane;
  readonly a?: bigint;
  readonly b?: bigint;
  readonly c?: bigint;
  readonly n: number;
  /** Two numbers that share a word: the lower half, then the upper. */
  readonly m?: number | readonly [number, number];
  readonly k?: number | readonly [number, number];
}

const word = (value: number | readonly [number, number]): bigint =>
  typeof value === "number" ? BigInt(value) : BigInt(value[0]) | BigInt(value[1]) << 32n;

/** Commands as the library reads them. */
export class Program {
  readonly bytes: Uint8Array;
  readonly count: number;

  constructor(commands: readonly Command[]) {
    const words = new BigUint64Array(new ArrayBuffer(Math.max(1, commands.length) * 64));
    commands.forEach(({ op, on: { stream, buffer }, a = 0n, b = 0n, c = 0n, n, m = 0, k = 0 }, i) =>
      words.set([word([OP[op], buffer.deviceIndex]), stream.address, a, b, c, BigInt(n), word(m), word(k)], i * 8)
    );
    this.bytes = new Uint8Array(words.buffer);
    this.count = commands.length;
  }
}

/** The open library. */
export class NaiveLibrary {
  readonly #symbols: Symbols;

  constructor(path: string, devices: number) {
    if (!runtime) throw new Error("this runtime has no FFI that is known");
    this.#symbols = runtime.bind(path, table) as unknown as Symbols;
    this.#check("open", this.#symbols.naive_open(devices));
  }

  /** Enqueues a program. */
  run(program: Program): void {
    this.#check("run", this.#symbols.naive_run(program.bytes, program.count));
  }

  /** Makes a graph of a program, to be replayed on the stream of its first command. */
  capture(program: Program): bigint {
    const out = new BigUint64Array(new ArrayBuffer(8));
    const code = this.#symbols.naive_capture(program.bytes, program.count, new Uint8Array(out.buffer));
    this.#check("capture", code);
    return out[0]!;
  }

  /** Enqueues a replay. */
  replay(graph: bigint, { stream, buffer }: Lane): void {
    this.#check("replay", this.#symbols.naive_replay(graph, stream.address, buffer.deviceIndex));
  }

  /** Frees a graph that does not run. */
  free(graph: bigint): void {
    this.#check("free", this.#symbols.naive_free_graph(graph));
  }

  #check(what: string, code: number): void {
    if (code === 0) return;
    const text = new Uint8Array(new ArrayBuffer(256));
    this.#symbols.naive_error(code, text, text.length);
    throw new Error(`Cannot ${what} the naive way: ${new TextDecoder().decode(text.subarray(0, text.indexOf(0)))}`);
  }
}

/** Compiles the library unless it is there; answers its path. @throws {Error} saying why there is none */
export function compileNaive(): string {
  const hash = createHash("sha256").update(readFileSync(source)).digest("hex").slice(0, 12);
  const path = join(folder, `libnaive-${hash}.so`);
  if (existsSync(path)) return path;
  const toolkit = findToolkit();
  if (typeof toolkit === "string") throw new Error(toolkit);
  mkdirSync(folder, { recursive: true });
  const made = `${path}.${process.pid}.tmp`;
  const targets = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90"]
    .concat(["-gencode=arch=compute_100,code=sm_100", "-gencode=arch=compute_100,code=compute_100"]);
  const flags = ["-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-O3", "-std=c++17", "--fmad=false"];
  const { status, stderr } = spawnSync(
    toolkit.nvcc,
    [...flags, "--threads=0", "-cudart", "static", ...targets, "-o", made, source],
    { encoding: "utf8", timeout: 120_000 },
  );
  if (status !== 0) throw new Error(`nvcc failed: ${stderr?.split("\n").slice(0, 5).join("\n")}`);
  renameSync(made, path);
  return path;
}

let opened: NaiveLibrary | string | undefined;

/** The library for the first `devices` devices, or why there is none. Opened once. `path`: one that is compiled already. */
export function naiveLibrary(devices: number, path?: string): NaiveLibrary | string {
  if (opened === undefined) {
    try {
      opened = new NaiveLibrary(path ?? compileNaive(), devices);
    } catch (error) {
      opened = (error as Error).message;
    }
  }
  return opened;
}

if (import.meta.main) console.log(compileNaive());
