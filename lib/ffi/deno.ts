/**
 * The FFI of Deno.
 *
 * In: a neutral symbol table. Out: Deno's own bound functions. `open.ts` imports this file under Deno only.
 * Binding and calling need no more than `--allow-ffi=<file or folder>`: addresses are u64, never pointer objects, which
 * would need the permission without a path. Only `callback` does.
 */

import type { NativeCallback, Runtime, SymbolTable } from "./types.ts";

// The part of Deno's API in use, declared here so that no type package is needed and no Deno type is in the public API.
interface DenoFfi {
  dlopen(
    path: string,
    symbols: Record<string, { parameters: string[]; result: string }>,
  ): { symbols: Record<string, unknown> };
  UnsafeCallback: {
    threadSafe(
      definition: { parameters: string[]; result: string },
      fn: (kind: number) => void,
    ): { pointer: object; close(): void; unref(): number };
  };
  UnsafePointer: { value(pointer: object): bigint };
}

const deno = (globalThis as unknown as { Deno: DenoFfi }).Deno;

const types = { i32: "i32", u32: "u32", i64: "i64", u64: "u64", f32: "f32", f64: "f64", buf: "buffer" } as const;

/** Deno's half of the FFI. */
export const runtime: Runtime = {
  name: "deno",
  bind(path: string, table: SymbolTable): Record<string, unknown> {
    const symbols = Object.entries(table).map(([name, { args, ret }]) =>
      [name, { parameters: args.map((type) => types[type]), result: types[ret] }] as const
    );
    return deno.dlopen(path, Object.fromEntries(symbols)).symbols;
  },
  callback(fn: (kind: number) => void): NativeCallback {
    const callback = deno.UnsafeCallback.threadSafe({ parameters: ["u32"], result: "void" }, fn);
    callback.unref(); // Bun's never keeps the process alive; neither does this one.
    return { address: deno.UnsafePointer.value(callback.pointer), close: () => callback.close() };
  },
};
