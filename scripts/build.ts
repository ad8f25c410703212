/**
 * Builds the native libraries, and checks the committed ones.
 *
 * In: the sources in `cuda/`. Out: `lib/native/linux-x64/libdeepep_<backend>.so` and `lib/native/manifest.ts`, which says
 * what they were built from; with `--out DIR` only the library, there. `--check` builds nothing: it fails when a library
 * is stale, is not the manifest's, or makes the package too large to publish.
 *
 *   bun scripts/build.ts [--backend cpu] [--out DIR] [--strict] [--check]
 */

import { execFile } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { availableParallelism } from "node:os";
import { join, relative } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { parseArgs, promisify } from "node:util";
import { ABI_VERSION } from "../lib/ffi/abi.ts";
import { manifest } from "../lib/native/manifest.ts";

const root = fileURLToPath(new URL("..", import.meta.url));
const platform = "linux-x64";
const nativeFolder = "lib/native";

/** The oldest glibc that the libraries run on, 2.x. */
const MAX_GLIBC = 28;

/** The registry refuses more; a margin is left for its own files. */
const MAX_PACKAGE_BYTES = 20_000_000;

/** How a backend is built. Everything here is part of its source hash. */
interface Recipe {
  readonly compiler: string;
  /** Folders whose .cpp and .cu files are compiled. */
  readonly sources: readonly string[];
  /** Folders and files that are included by them, too. */
  readonly includes: readonly string[];
  readonly compile: readonly string[];
  readonly link: readonly string[];
}

const recipes: Readonly<Record<string, Recipe>> = {
  cpu: {
    compiler: "g++",
    // cuda/api is shared with the CUDA backend: its `#include "buffer.hpp"` is this backend's, by the include path.
    sources: ["cuda/cpu", "cuda/api", "cuda/common", "cuda/compat"],
    includes: ["cuda/abi"],
    // No FMA contraction and no -march: every machine gives the same bits.
    compile: ["-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
      .concat(["-pthread", "-Wall", "-Wextra", "-ffile-prefix-map=.=", "-I.", "-Icuda/cpu"]),
    // nodelete: Deno unloads a worker's libraries when the worker ends, while native threads run.
    // libpthread is named although new systems have it in libc: old ones do not. See cuda/compat/glibc.cpp.
    link: ["-shared", "-pthread", "-s", "-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL"]
      .concat(["-Wl,--version-script=cuda/abi/exports.map", "-Wl,-z,nodelete", "-Wl,-z,relro,-z,now"])
      .concat([
        "-Wl,--no-undefined",
        "-Wl,--no-as-needed",
        "-l:libpthread.so.0",
        "-Wl,--as-needed",
        "-Wl,--build-id=none",
      ]),
  },
};

const run = promisify(execFile);
const sha256 = (data: string | Uint8Array): string => createHash("sha256").update(data).digest("hex");
const libraryName = (backend: string): string => `libdeepep_${backend}.so`;

/** All files of a folder that exists, or the file itself, sorted, as paths from the root. */
function filesOf(path: string): string[] {
  if (!existsSync(join(root, path))) return [];
  if (!statSync(join(root, path)).isDirectory()) return [path];
  return readdirSync(join(root, path), { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => relative(root, join(entry.parentPath, entry.name)))
    .sort();
}

/** SHA-256 of what a backend is built from: the sorted inputs with their names, and the flags. */
function sourceHash(recipe: Recipe): string {
  const inputs = [...recipe.sources, ...recipe.includes].flatMap(filesOf)
    .filter((path) => /\.(cpp|hpp|h|cu|cuh|map)$/.test(path)).sort();
  const flags = JSON.stringify([recipe.compiler, recipe.compile, recipe.link]);
  return sha256([flags, ...inputs.map((path) => `${path} ${sha256(readFileSync(join(root, path)))}`)].join("\n"));
}

/** Compiles and links a backend into `folder`; answers the file. */
async function build(backend: string, recipe: Recipe, folder: string, strict: boolean): Promise<string> {
  const objects = join(root, "build", backend);
  mkdirSync(objects, { recursive: true });
  mkdirSync(folder, { recursive: true });
  const units = recipe.sources.flatMap(filesOf).filter((path) => /\.(cpp|cu)$/.test(path))
    .map((source) => ({ source, object: join(objects, `${source.replaceAll("/", "_")}.o`) }));
  const compile = [...recipe.compile, ...(strict ? ["-Werror"] : [])];
  const queue = [...units];
  const worker = async (): Promise<void> => {
    for (let unit = queue.shift(); unit; unit = queue.shift()) {
      await run(recipe.compiler, [...compile, "-c", unit.source, "-o", unit.object], { cwd: root });
    }
  };
  await Promise.all(Array.from({ length: availableParallelism() }, worker));
  const file = join(folder, libraryName(backend));
  await run(recipe.compiler, [...units.map((unit) => unit.object), ...recipe.link, "-o", file], { cwd: root });
  const needs = glibcOf(file);
  if (needs > MAX_GLIBC) {
    throw new Error(`${file} needs glibc 2.${needs}, at most 2.${MAX_GLIBC} is wanted: see cuda/compat/glibc.cpp`);
  }
  return file;
}

/** The newest glibc 2.x whose symbols a library needs, by the version names in its string table. */
function glibcOf(file: string): number {
  const names = readFileSync(file, "latin1").matchAll(/\0GLIBC_2\.(\d+)(?=[.\0])/g);
  return Math.max(0, ...[...names].map((match) => Number(match[1])));
}

/** The text of the manifest, from its present self and what has just been built. */
function manifestText(built: Readonly<Record<string, { hash: string; file: string }>>): string {
  const hashes: Record<string, string> = { ...manifest.sourceHash };
  const files: Record<string, { sha256: string; bytes: number }> = { ...manifest.files };
  for (const [backend, { hash, file }] of Object.entries(built)) {
    const bytes = readFileSync(file);
    hashes[backend] = hash;
    files[`${platform}/${libraryName(backend)}`] = { sha256: sha256(bytes), bytes: bytes.length };
  }
  const sorted = <T>(record: Record<string, T>): [string, T][] => Object.entries(record).sort();
  const head = readFileSync(join(root, nativeFolder, "manifest.ts"), "utf8").split("export const manifest")[0];
  return `${head}export const manifest: Manifest = {
  abiVersion: ${ABI_VERSION},
  sourceHash: {
${sorted(hashes).map(([name, hash]) => `    ${name}: "${hash}",\n`).join("")}  },
  files: {
${
    sorted(files).map(([name, file]) =>
      `    "${name}": {\n      sha256: "${file.sha256}",\n      bytes: ${file.bytes},\n    },\n`
    ).join("")
  }  },
};
`;
}

/** Bytes of everything that is published. */
function packageBytes(): number {
  const { publish } = JSON.parse(readFileSync(join(root, "deno.json"), "utf8")) as { publish: { include: string[] } };
  return publish.include.filter((path) => existsSync(join(root, path))).flatMap(filesOf)
    .reduce((sum, path) => sum + statSync(join(root, path)).size, 0);
}

/** What is wrong with the committed libraries. */
function problems(): string[] {
  const found: string[] = [];
  const fix = (backend: string): string => `; run: bun scripts/build.ts --backend ${backend}`;
  if (manifest.abiVersion !== ABI_VERSION) {
    found.push(`the manifest is of ABI version ${manifest.abiVersion}, lib/ffi/abi.ts of ${ABI_VERSION}${fix("cpu")}`);
  }
  for (const [backend, recipe] of Object.entries(recipes)) {
    const hash = sourceHash(recipe);
    if (manifest.sourceHash[backend] !== hash) {
      found.push(
        `${libraryName(backend)} was built from other sources (${manifest.sourceHash[backend]}, now ${hash})${
          fix(backend)
        }`,
      );
    }
    if (!manifest.files[`${platform}/${libraryName(backend)}`]) {
      found.push(`${libraryName(backend)} is not in the manifest${fix(backend)}`);
    }
  }
  for (const [name, { sha256: wanted }] of Object.entries(manifest.files)) {
    const file = join(root, nativeFolder, name);
    const hash = existsSync(file) ? sha256(readFileSync(file)) : "missing";
    if (hash !== wanted) found.push(`${nativeFolder}/${name} is ${hash}, but the manifest says ${wanted}`);
  }
  const libraries = filesOf(nativeFolder).filter((path) => path.endsWith(".so"));
  for (const path of libraries) {
    if (!manifest.files[relative(nativeFolder, path)]) found.push(`${path} is not in the manifest`);
  }
  const bytes = packageBytes();
  if (bytes > MAX_PACKAGE_BYTES) {
    found.push(`the package has ${bytes} bytes, at most ${MAX_PACKAGE_BYTES} can be published`);
  }
  return found;
}

async function main(): Promise<number> {
  const { values } = parseArgs({
    options: {
      backend: { type: "string", multiple: true, default: Object.keys(recipes) },
      out: { type: "string" },
      strict: { type: "boolean", default: false },
      check: { type: "boolean", default: false },
    },
  });
  if (values.check) {
    const found = problems();
    for (const line of found) console.error(line);
    if (found.length === 0) {
      console.log(`The libraries are those of the sources; the package has ${packageBytes()} bytes`);
    }
    return found.length === 0 ? 0 : 1;
  }
  const built: Record<string, { hash: string; file: string }> = {};
  for (const backend of values.backend) {
    const recipe = recipes[backend];
    if (!recipe) throw new RangeError(`Cannot build ${backend}: there are ${Object.keys(recipes).join(", ")}`);
    const hash = sourceHash(recipe);
    const file = await build(backend, recipe, values.out ?? join(root, nativeFolder, platform), values.strict);
    built[backend] = { hash, file };
    console.log(`${relative(process.cwd(), file)}: ${statSync(file).size} bytes`);
  }
  if (values.out === undefined) writeFileSync(join(root, nativeFolder, "manifest.ts"), manifestText(built));
  return 0;
}

if (import.meta.main) {
  process.exitCode = await main().catch((error: Error & { stderr?: string }) => {
    console.error(error.stderr || error.message); // the compiler's words
    return 1;
  });
}
