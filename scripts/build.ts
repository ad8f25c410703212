/**
 * Builds the native libraries, and checks the committed ones.
 *
 * In: the sources in `cuda/`. Out: `lib/native/linux-x64/libdeepep_<backend>.so` and `lib/native/manifest.ts`, which says
 * what they were built from; with `--out DIR` only the libraries, there. Without `--backend`, those that can be built here.
 * `--arch` builds for some architectures only, and `--ptxas` shows what the kernels use. `--check` builds nothing: it
 * fails when a library is stale, is not the manifest's, or makes the package too large to publish.
 *
 *   bun scripts/build.ts [--backend cpu] [--out DIR] [--strict] [--cuda DIR] [--arch sm_90] [--ptxas] [--check]
 */

import { existsSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join, relative } from "node:path";
import process from "node:process";
import { parseArgs } from "node:util";
import { ABI_VERSION } from "../lib/ffi/abi.ts";
import { manifest } from "../lib/native/manifest.ts";
import { build, compilersOf, filesOf, hasSources, root, sha256, sourceHash } from "./native/compile.ts";
import { kernelUses, ptxasTable } from "./native/ptxas.ts";
import { type Recipe, recipes } from "./native/recipes.ts";
import { findToolkit, type Toolkit } from "./native/toolkit.ts";

const platform = "linux-x64";
const nativeFolder = "lib/native";

/** The registry refuses more; a margin is left for its own files. */
const MAX_PACKAGE_BYTES = 20_000_000;

const libraryName = (backend: string): string => `libdeepep_${backend}.so`;

/** A library that has just been built. */
interface Built {
  readonly file: string;
  /** Its source hash. */
  readonly hash: string;
  readonly compilers: string;
}

/** The text of the manifest, from its present self and what has just been built. */
function manifestText(built: Readonly<Record<string, Built>>): string {
  const hashes: Record<string, string> = { ...manifest.sourceHash };
  const builtBy: Record<string, string> = { ...manifest.compilers };
  const files: Record<string, { sha256: string; bytes: number }> = { ...manifest.files };
  for (const [backend, { hash, file, compilers }] of Object.entries(built)) {
    const bytes = readFileSync(file);
    hashes[backend] = hash;
    builtBy[backend] = compilers;
    files[`${platform}/${libraryName(backend)}`] = { sha256: sha256(bytes), bytes: bytes.length };
  }
  const sorted = <T>(record: Record<string, T>): [string, T][] => Object.entries(record).sort();
  const head = readFileSync(join(root, nativeFolder, "manifest.ts"), "utf8").split("export const manifest")[0];
  return `${head}export const manifest: Manifest = {
  abiVersion: ${ABI_VERSION},
  sourceHash: {
${sorted(hashes).map(([name, hash]) => `    ${name}: "${hash}",\n`).join("")}  },
  compilers: {
${sorted(builtBy).map(([name, compilers]) => `    ${name}: "${compilers}",\n`).join("")}  },
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
    if (!hasSources(recipe)) continue;
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

/** Throws when the same compilers have made other bytes of the same sources than those that are committed. */
function checkReproduced(backend: string, { file, hash, compilers }: Built): void {
  const committed = manifest.files[`${platform}/${libraryName(backend)}`]?.sha256;
  if (!committed || manifest.sourceHash[backend] !== hash || manifest.compilers[backend] !== compilers) return;
  const found = sha256(readFileSync(file));
  if (found === committed) return;
  throw new Error(`${file} has SHA-256 ${found}, but the committed one of the same sources and compilers ${committed}`);
}

/** The backends to build: those that are wanted, or all that can be built here, with a word about each other one. */
function backendsFor(wanted: readonly string[] | undefined, toolkit: Toolkit | string): [string, Recipe][] {
  if (wanted) {
    return wanted.map((backend) => {
      const recipe = recipes[backend];
      if (!recipe) throw new RangeError(`Cannot build ${backend}: there are ${Object.keys(recipes).join(", ")}`);
      if (recipe.cu && typeof toolkit === "string") throw new Error(`Cannot build ${backend}: ${toolkit}`);
      return [backend, recipe];
    });
  }
  return Object.entries(recipes).filter(([backend, recipe]) => {
    const reason = !hasSources(recipe)
      ? `${recipe.sources[0]} has no sources yet`
      : recipe.cu && typeof toolkit === "string" && toolkit;
    if (reason) console.log(`${libraryName(backend)} is not built: ${reason}`);
    return !reason;
  });
}

const usage = `Usage: build.ts [options]

Builds the native libraries from the sources in cuda/, and the manifest that says so.

  --backend NAME            cpu or cuda; may be given more than once. Default: those that can be built here
  --out DIR                 only the libraries, there; the manifest stays as it is
  --strict                  warnings are errors
  --cuda DIR                the CUDA toolkit
  --arch NAME               of cuda, with --out: only this architecture, as sm_90; may be given more than once
  --ptxas                   also prints what the kernels use
  --check                   builds nothing: fails where a library is stale, not the manifest's, or the package too large
  --help                    this text
`;

async function main(): Promise<number> {
  const { values } = parseArgs({
    options: {
      help: { type: "boolean", default: false },
      backend: { type: "string", multiple: true },
      out: { type: "string" },
      strict: { type: "boolean", default: false },
      check: { type: "boolean", default: false },
      cuda: { type: "string" },
      arch: { type: "string", multiple: true },
      ptxas: { type: "boolean", default: false },
    },
  });
  if (values.help) {
    console.log(usage);
    return 0;
  }
  if (values.check) {
    const found = problems();
    for (const line of found) console.error(line);
    if (found.length === 0) {
      console.log(`The libraries are those of the sources; the package has ${packageBytes()} bytes`);
    }
    return found.length === 0 ? 0 : 1;
  }
  if (values.arch && values.out === undefined) {
    throw new RangeError("--arch leaves architectures out: say with --out where such a library shall be");
  }
  const toolkit = findToolkit(values.cuda);
  const built: Record<string, Built> = {};
  for (const [backend, recipe] of backendsFor(values.backend, toolkit)) {
    const hash = sourceHash(recipe);
    const file = join(values.out ?? join(root, nativeFolder, platform), libraryName(backend));
    const used = recipe.cu && typeof toolkit !== "string" ? toolkit : undefined;
    const logs = await build(backend, recipe, file, { strict: values.strict, archs: values.arch, toolkit: used });
    built[backend] = { hash, file, compilers: compilersOf(used) };
    // nvcc writes its options into the library, so that only those of a release make its bytes.
    const release = !used || !(values.strict || values.arch);
    if (values.out !== undefined && release) checkReproduced(backend, built[backend]);
    if (values.ptxas && recipe.cu) console.log(ptxasTable(kernelUses(logs)));
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
