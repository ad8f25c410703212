/**
 * The types between the ABI and the two runtimes.
 *
 * In: the functions of `abi.ts`. Out: a neutral symbol table that `bun.ts` and `deno.ts` translate once, when a library
 * is opened, and the type of the bound functions. Those are the engine's own: nothing wraps a hot call.
 */

import { type Argument, functions, type FunctionSpec, type Scalar } from "./abi.ts";

/** A parameter: a scalar, or bytes that are lent for the duration of the call. */
export type ArgType = Scalar | "buf";

/** One native function. */
export interface Signature {
  readonly args: readonly ArgType[];
  readonly ret: Scalar;
}

/** The functions to bind, by symbol. */
export type SymbolTable = Readonly<Record<string, Signature>>;

/** 64-bit scalars, addresses among them, are bigint in both directions: exact, and the fast path of both engines. */
type ScalarValue<T> = T extends "i64" | "u64" ? bigint : number;
type ArgumentValue<T> = T extends Scalar ? ScalarValue<T> : T extends "buf" ? ArrayBufferView : Uint8Array;
type ArgumentValues<A extends readonly Argument[]> = { -readonly [I in keyof A]: ArgumentValue<A[I][1]> };

/** The functions of the ABI as JavaScript calls them. */
export type Bindings = {
  readonly [K in keyof typeof functions]: (
    ...args: ArgumentValues<(typeof functions)[K]["args"]>
  ) => ScalarValue<(typeof functions)[K]["ret"]>;
};

/** The backends, a library file each. */
export type BackendName = "cpu" | "cuda" | "nvshmem";

/** An open library. It is never closed. */
export interface Library {
  readonly backend: BackendName;
  /** The file. */
  readonly path: string;
  /** The functions of the ABI. */
  readonly symbols: Bindings;
}

/** A function pointer that native code may call from any thread; `fn` then runs on the JavaScript thread. */
export interface NativeCallback {
  readonly address: bigint;
  /** Only after the last native call has returned, and never inside the callback. */
  close(): void;
}

/** What a runtime supplies. */
export interface Runtime {
  readonly name: "bun" | "deno";
  /** Binds the symbols of a library file. Throws the engine's error when the file or a symbol is missing. */
  bind(path: string, table: SymbolTable): Record<string, unknown>;
  /** Makes a callback `void (*)(uint32_t)`. Deno blocks the calling thread until `fn` has run, Bun does not. */
  callback(fn: (kind: number) => void): NativeCallback;
}

const isScalar = (type: string): type is Scalar => /^[iuf](32|64)$/.test(type);

/** The symbol table of the ABI: structs are lent like any other bytes. */
export const symbolTable: SymbolTable = Object.fromEntries(
  Object.entries<FunctionSpec>(functions).map(([name, { args, ret }]) => [
    name,
    { args: args.map(([, type]) => isScalar(type) ? type : "buf"), ret },
  ]),
);
