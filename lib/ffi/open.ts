/**
 * Opens a native library.
 *
 * In: a backend and, if the caller has one, a path. Out: the functions of `abi.ts`, bound by the engine, nothing around
 * them. A library is opened once per realm (each worker has its own bindings; the native state is one per process) and
 * never closed: native threads may still run in it. The buffers of `lib/buffer.ts` begin here.
 */

import { LibraryError } from "../error.ts";
import { ABI_VERSION } from "./abi.ts";
import { locate, type Place, placeOf } from "./locate.ts";
import { type BackendName, type Bindings, type Library, type Runtime, type SymbolTable, symbolTable } from "./types.ts";

export type { Library } from "./types.ts";

/** The runtime's half. Literal imports, so that Deno, JSR and bundlers see both files; only one is evaluated. */
export const runtime: Runtime | undefined = "Bun" in globalThis
  ? (await import("./bun.ts")).runtime
  : "Deno" in globalThis
  ? (await import("./deno.ts")).runtime
  : undefined;

/** Options of {@linkcode openLibrary}. */
export interface OpenOptions {
  /** The library file, instead of the one that belongs to this package. */
  path?: string | undefined;
}

function reason(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** Binds a file: its version first, since a library of another version need not have the other symbols. */
function bind(backend: BackendName, path: string, place: Place): Library {
  if (!runtime) throw new LibraryError(`Cannot open ${path}: this runtime has no FFI that is known, use Bun or Deno`);
  const attempt = (table: SymbolTable): Bindings => {
    try {
      return runtime.bind(path, table) as unknown as Bindings;
    } catch (cause) {
      const refused = cause instanceof Error && ["NotCapable", "PermissionDenied"].includes(cause.name);
      const advice = refused ? `Run Deno with --allow-ffi=${path}, or with the folder` : place.advice;
      throw new LibraryError(`Cannot open ${path}: ${reason(cause)}\n  ${advice}`, { cause });
    }
  };
  const { deepep_abi_version } = symbolTable;
  const found = attempt({ deepep_abi_version: deepep_abi_version! }).deepep_abi_version();
  if (found !== ABI_VERSION) {
    throw new LibraryError(
      `Cannot use ${path}: its ABI version is ${found}, this package needs ${ABI_VERSION}\n  ${place.advice}`,
    );
  }
  return { backend, path, symbols: attempt(symbolTable) };
}

const byRequest = new Map<string, Promise<Library>>();
const byPath = new Map<string, Library>();

/**
 * Opens the library of a backend, or answers the one that is open.
 *
 * Deno needs `--allow-ffi=<the file or its folder>`, and read, write, env and net only as far as the file is looked for.
 *
 * @throws {LibraryError} if it is nowhere, is not what the manifest says, has another ABI version, or lacks a symbol
 */
export function openLibrary(backend: BackendName, options: OpenOptions = {}): Promise<Library> {
  const request = `${backend} ${options.path ?? ""}`;
  const open = async (): Promise<Library> => {
    const place = placeOf(backend);
    const path = await locate(place, options.path);
    const key = `${backend} ${path}`;
    const library = byPath.get(key) ?? bind(backend, path, place);
    byPath.set(key, library);
    return library;
  };
  const pending = byRequest.get(request) ?? open();
  byRequest.set(request, pending);
  pending.catch(() => byRequest.delete(request)); // a failure is not kept: the file may be there next time
  return pending;
}
