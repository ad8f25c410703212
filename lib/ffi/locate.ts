/**
 * Finds the file of a native library.
 *
 * In: a backend, and a path if the caller has one. Out: a path to open. The order: the explicit path, the environment,
 * the file beside this package when the package is on a disk, the user's cache, and where the package came from when
 * that is http(s). What is cached or fetched must have the SHA-256 that `lib/native/manifest.ts` gives; a library beside
 * the package is trusted as its code is. The error lists everything that was tried. `open.ts` calls this.
 */

import { createHash } from "node:crypto";
import { existsSync } from "node:fs";
import { mkdir, readFile, rename, rm, writeFile } from "node:fs/promises";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { LibraryError } from "../error.ts";
import { manifest } from "../native/manifest.ts";
import type { BackendName } from "./types.ts";

/** Longest download, milliseconds. */
const FETCH_MS = 120_000;

/** Where a library may be. */
export interface Place {
  /** The file name. */
  readonly name: string;
  /** What it is built for, as in `linux-x64`. */
  readonly platform: string;
  /** The environment variable that names the file. */
  readonly env: string;
  /** The file beside the package. */
  readonly url: URL;
  /** Its SHA-256 in hex, or undefined when this release has no such file. */
  readonly sha256: string | undefined;
  /** What to do when it is nowhere. */
  readonly advice: string;
}

/** Where the library of a backend may be. */
export function placeOf(backend: BackendName): Place {
  const name = `libdeepep_${backend}.so`;
  const platform = `${process.platform}-${process.arch}`;
  const env = `DEEPEP_LIBRARY_${backend.toUpperCase()}`;
  const file = `${platform}/${name}`;
  return {
    name,
    platform,
    env,
    url: new URL(`../native/${file}`, import.meta.url),
    sha256: manifest.files[file]?.sha256,
    advice: `Set ${env} to the file, or build it in a checkout: bun scripts/build.ts --backend ${backend}`,
  };
}

/** An environment variable; undefined when it is unset, empty, or may not be read (Deno without --allow-env). */
function readEnv(name: string): string | undefined {
  try {
    return process.env[name] || undefined;
  } catch {
    return undefined;
  }
}

/** Whether a file exists; true when that may not be asked (Deno without --allow-read), since opening it will tell. */
function mayExist(path: string): boolean {
  try {
    return existsSync(path);
  } catch {
    return true;
  }
}

function sha256(bytes: Uint8Array): string {
  return createHash("sha256").update(bytes).digest("hex");
}

function reason(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}

/** The folder for a file of this hash. The hash is in the folder, so that the file keeps its real name. */
function cacheFolder(hash: string): string | undefined {
  const home = readEnv("HOME");
  const root = readEnv("XDG_CACHE_HOME") ?? (home && join(home, ".cache"));
  return root && join(root, "deepep", hash.slice(0, 16));
}

/** The cached file, or why there is none. */
async function fromCache(file: string, hash: string): Promise<{ path?: string; reason: string }> {
  try {
    const found = sha256(await readFile(file));
    return found === hash
      ? { path: file, reason: "" }
      : { reason: `its SHA-256 is ${found}, but the manifest says ${hash}` };
  } catch (error) {
    return { reason: (error as { code?: string }).code === "ENOENT" ? "no such file" : reason(error) };
  }
}

/** Throws when the file beside the package is not the one of this release: truncated, or of another version. */
async function checkBeside(place: Place, file: string): Promise<void> {
  let bytes: Uint8Array;
  try {
    bytes = await readFile(file);
  } catch {
    return; // Deno without --allow-read: it may be opened, but not looked at
  }
  const found = sha256(bytes);
  if (place.sha256 === undefined || found === place.sha256) return;
  throw new LibraryError(
    `Cannot use ${file}: its SHA-256 is ${found} (${bytes.length} bytes), but the manifest says ${place.sha256}; ` +
      `install the package again, rebuild it (scripts/build.ts), or name the file with ${place.env}`,
  );
}

/** Fetches a library, checks it, and puts it into the cache. */
async function download(place: Place, hash: string, folder: string): Promise<string> {
  const response = await fetch(place.url, { signal: AbortSignal.timeout(FETCH_MS) });
  if (!response.ok) throw new LibraryError(`status ${response.status}`);
  const bytes = new Uint8Array(await response.arrayBuffer());
  const found = sha256(bytes);
  if (found !== hash) {
    throw new LibraryError(
      `its SHA-256 is ${found} (${bytes.length} bytes), but the manifest says ${hash}; nothing was kept`,
    );
  }
  await mkdir(folder, { recursive: true });
  const file = join(folder, place.name);
  const temporary = `${file}.${process.pid}.${crypto.randomUUID()}.tmp`;
  try {
    await writeFile(temporary, bytes, { mode: 0o755 });
    await rename(temporary, file); // atomic: workers and processes that do the same at once agree
  } finally {
    await rm(temporary, { force: true });
  }
  return file;
}

/** Finds a file that its user named, and takes no other. */
function named(place: Place, path: string, by: string): string {
  if (mayExist(path)) return path;
  throw new LibraryError(`Cannot find ${place.name}: ${by} names ${path}, which does not exist`);
}

/**
 * Finds a library.
 *
 * @throws {LibraryError} listing what was tried, or naming the hash that is wrong
 */
export async function locate(place: Place, path?: string): Promise<string> {
  if (path !== undefined) return named(place, path, "the option library");
  const fromEnv = readEnv(place.env);
  if (fromEnv !== undefined) return named(place, fromEnv, place.env);
  const tried = ["the option library: not given", `${place.env}: not set`];

  if (place.url.protocol === "file:") {
    const beside = fileURLToPath(place.url.href);
    if (mayExist(beside)) {
      await checkBeside(place, beside);
      return beside;
    }
    tried.push(`${beside}: no such file`);
  }
  const hash = place.sha256;
  const folder = hash && cacheFolder(hash);
  if (hash === undefined) {
    tried.push(`the manifest of this release: no ${place.name} for ${place.platform}`);
  } else if (!folder) {
    tried.push("the cache: neither XDG_CACHE_HOME nor HOME is set, or may be read");
  } else {
    const cached = await fromCache(join(folder, place.name), hash);
    if (cached.path !== undefined) return cached.path;
    tried.push(`${join(folder, place.name)}: ${cached.reason}`);
    if (place.url.protocol !== "file:") {
      try {
        return await download(place, hash, folder);
      } catch (error) {
        tried.push(`${place.url}: ${reason(error)}`);
      }
    }
  }
  throw new LibraryError([`Cannot find ${place.name}, tried:`, ...tried, place.advice].join("\n  "));
}
