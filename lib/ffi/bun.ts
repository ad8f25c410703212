/**
 * The FFI of Bun.
 *
 * In: a neutral symbol table. Out: Bun's own bound functions. `open.ts` imports this file under Bun only.
 * Buffers are Bun's "ptr", which takes a view; addresses are not, since "ptr" would answer rounded numbers.
 */

import { dlopen, type FFIFunction, JSCallback } from "bun:ffi";
import type { NativeCallback, Runtime, SymbolTable } from "./types.ts";

const types = { i32: "i32", u32: "u32", i64: "i64", u64: "u64", f32: "f32", f64: "f64", buf: "ptr" } as const;

/** Bun's half of the FFI. */
export const runtime: Runtime = {
  name: "bun",
  bind(path: string, table: SymbolTable): Record<string, unknown> {
    const symbols: Record<string, FFIFunction> = {};
    for (const [name, { args, ret }] of Object.entries(table)) {
      symbols[name] = { args: args.map((type) => types[type]), returns: types[ret] };
    }
    return dlopen(path, symbols).symbols;
  },
  callback(fn: (kind: number) => void): NativeCallback {
    const callback = new JSCallback(fn, { args: ["u32"], returns: "void", threadsafe: true });
    return { address: BigInt(callback.ptr ?? 0), close: () => callback.close() };
  },
};
