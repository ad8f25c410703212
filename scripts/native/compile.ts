/**
 * Compiles and links a library.
 *
 * In: a recipe, the toolkit where it wants one. Out: the library, and what ptxas said. Objects are kept in
 * `build/<backend>` and made again only when something that they are made of has changed: the command, the compiler, the
 * file, a file that it includes, or the set of files that there are (an include could mean another file then). Bytes do
 * not depend on where the tree is, nor on when it is built. `scripts/build.ts` calls this.
 */

import { execFile, execFileSync } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readdirSync, readFileSync, renameSync, rmSync, statSync, writeFileSync } from "node:fs";
import { availableParallelism } from "node:os";
import { join, relative, resolve } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { elfProblems, readElf } from "./elf.ts";
import type { Recipe } from "./recipes.ts";
import type { Toolkit } from "./toolkit.ts";

/** The root of the repository. */
export const root: string = fileURLToPath(new URL("../..", import.meta.url));

/** SHA-256 in hex. */
export const sha256 = (data: string | Uint8Array): string => createHash("sha256").update(data).digest("hex");

const run = promisify(execFile);

/** What differs between builds of one recipe. */
export interface Options {
  /** Warnings are errors. */
  readonly strict: boolean;
  /** Only the machine code of these architectures, as in `sm_90`; for checks, since it is faster. */
  readonly archs?: readonly string[] | undefined;
  /** Where nvcc is; a recipe with .cu files needs it. */
  readonly toolkit?: Toolkit | undefined;
}

/** A file that is compiled by one command. */
interface Unit {
  readonly source: string;
  readonly command: readonly string[];
  readonly version: string;
  /** Without extension, in the folder of objects. */
  readonly object: string;
}

/** All files of a folder that exists, or the file itself, sorted, as paths from the root. */
export function filesOf(path: string): string[] {
  if (!existsSync(join(root, path))) return [];
  if (!statSync(join(root, path)).isDirectory()) return [path];
  return readdirSync(join(root, path), { recursive: true, withFileTypes: true })
    .filter((entry) => entry.isFile())
    .map((entry) => relative(root, join(entry.parentPath, entry.name)))
    .sort();
}

const isUnit = (path: string): boolean => /\.(cpp|cu)$/.test(path);

/** Whether there are sources of the backend's own. */
export function hasSources(recipe: Recipe): boolean {
  return filesOf(recipe.sources[0]!).some(isUnit);
}

/** SHA-256 of each file that a recipe compiles or includes. */
function inputsOf(recipe: Recipe): Map<string, string> {
  const paths = [...recipe.sources, ...recipe.includes].flatMap(filesOf)
    .filter((path) => /\.(cpp|hpp|h|cu|cuh|map)$/.test(path)).sort();
  return new Map(paths.map((path) => [path, sha256(readFileSync(join(root, path)))]));
}

/** SHA-256 of what a backend is built from: the sorted inputs with their names, and the flags. */
export function sourceHash(recipe: Recipe): string {
  const { cpp, cu, machineCode, ptx, link } = recipe;
  const flags = JSON.stringify([cpp, cu, machineCode, ptx, link]);
  return sha256([flags, ...[...inputsOf(recipe)].map(([path, hash]) => `${path} ${hash}`)].join("\n"));
}

/** nvcc's flags for the architectures. */
function archFlags(recipe: Recipe, only?: readonly string[]): string[] {
  const machineCode = only?.map((arch) => arch.replace(/^sm_/, "")) ?? recipe.machineCode ?? [];
  const ptx = only ? [] : recipe.ptx ?? [];
  return [
    ...machineCode.map((arch) => `-gencode=arch=compute_${arch},code=sm_${arch}`),
    ...ptx.map((arch) => `-gencode=arch=compute_${arch},code=compute_${arch}`),
  ];
}

/** The compilers that make a backend's library, as they name themselves. */
export function compilersOf(toolkit?: Toolkit): string {
  const line = (program: string): string =>
    execFileSync(program, ["--version"], { encoding: "utf8" }).split("\n", 1)[0]!.trim();
  return [line("g++"), line("ld"), ...(toolkit ? [`nvcc ${toolkit.version}`] : [])].join(", ");
}

/** The commands of a recipe, those of nvcc first: they take longest. */
function unitsOf(backend: string, recipe: Recipe, { strict, archs, toolkit }: Options): Unit[] {
  const version = compilersOf(toolkit);
  const include = toolkit ? ["-isystem", toolkit.include] : [];
  const cpp = ["g++", ...recipe.cpp, ...include, ...(strict ? ["-Werror"] : [])];
  const cu = toolkit &&
    [toolkit.nvcc, ...recipe.cu ?? [], ...archFlags(recipe, archs), ...(strict ? ["-Werror=all-warnings"] : [])];
  const unit = (source: string): Unit => {
    const isKernel = source.endsWith(".cu");
    if (isKernel && !cu) throw new Error(`Cannot compile ${source} without nvcc`);
    // nvcc names what has internal linkage by the absolute path and a random number, unless it is told both.
    const names = isKernel ? ["-Xcudafe", `--orig_src_path_name=${source}`, `-frandom-seed=${source}`] : [];
    const command = [...(isKernel ? cu! : cpp), ...(recipe.own?.[source] ?? []), ...names, "-c", source];
    const variant = sha256(JSON.stringify(command)).slice(0, 8);
    const object = join(root, "build", backend, `${source.replaceAll("/", "_")}.${variant}`);
    return { source, command, object, version };
  };
  const sources = recipe.sources.flatMap(filesOf).filter(isUnit);
  const isKernel = (path: string): number => path.endsWith(".cu") ? 0 : 1;
  return sources.sort((a, b) => isKernel(a) - isKernel(b)).map(unit);
}

/** Files of this repository that an object was made of, by what the compiler has written. */
function dependencies(unit: Unit): string[] {
  const words = readFileSync(`${unit.object}.d`, "utf8").replace(/^[^:]*:/, "").split(/[\s\\]+/);
  const paths = words.filter(Boolean).map((path) => relative(root, resolve(root, path)));
  return [...new Set(paths)].filter((path) => !path.startsWith("..")).sort();
}

/** SHA-256 of everything that an object is made of. Throws when a file is none of the recipe's. */
function keyOf(unit: Unit, inputs: ReadonlyMap<string, string>): string {
  const made = dependencies(unit).map((path) => {
    const hash = inputs.get(path);
    if (!hash) throw new Error(`${unit.source} includes ${path}, which its recipe does not name`);
    return [path, hash];
  });
  return sha256(JSON.stringify([unit.command, unit.version, [...inputs.keys()], made]));
}

/** Whether the object that is there is the one that a compiler would make. */
function isFresh(unit: Unit, inputs: ReadonlyMap<string, string>): boolean {
  try {
    return existsSync(`${unit.object}.o`) && readFileSync(`${unit.object}.key`, "utf8") === keyOf(unit, inputs);
  } catch {
    return false; // never compiled, or one of its files is gone
  }
}

/** Compiles a unit. Files appear at once and whole, as other builds may run. */
async function compile(unit: Unit, inputs: ReadonlyMap<string, string>): Promise<void> {
  const made = `${unit.object}.${process.pid}`;
  const [program, ...args] = [...unit.command, "-MMD", "-MF", `${made}.d`, "-o", `${made}.o`];
  const { stderr } = await run(program!, args, { cwd: root, maxBuffer: 1 << 26 });
  const warnings = stderr.split("\n").filter((line) => /warning/.test(line));
  if (warnings.length > 0) console.error(warnings.join("\n"));
  writeFileSync(`${made}.log`, stderr);
  for (const kind of ["d", "log", "o"]) renameSync(`${made}.${kind}`, `${unit.object}.${kind}`);
  writeFileSync(`${unit.object}.key`, keyOf(unit, inputs));
}

/** Compiles and links a backend to `file`; answers what ptxas said about each .cu file. */
export async function build(backend: string, recipe: Recipe, file: string, options: Options): Promise<string[]> {
  const inputs = inputsOf(recipe);
  const hash = sourceHash(recipe);
  const units = unitsOf(backend, recipe, options);
  mkdirSync(join(root, "build", backend), { recursive: true });
  mkdirSync(join(file, ".."), { recursive: true });
  const queue = units.filter((unit) => !isFresh(unit, inputs));
  const worker = async (): Promise<void> => {
    for (let unit = queue.shift(); unit; unit = queue.shift()) await compile(unit, inputs);
  };
  await Promise.all(Array.from({ length: availableParallelism() }, worker));

  const made = `${file}.${process.pid}.tmp`;
  const archives = recipe.cu && options.toolkit ? [options.toolkit.runtime] : [];
  await run("g++", [...units.map((unit) => `${unit.object}.o`), ...archives, ...recipe.link, "-o", made], {
    cwd: root,
  });
  const wrong = elfProblems(readElf(readFileSync(made))).map((words) => `${file} ${words}`);
  if (sourceHash(recipe) !== hash) wrong.push(`the sources of ${backend} have changed while they were compiled`);
  if (wrong.length > 0) {
    rmSync(made);
    throw new Error(wrong.join("\n"));
  }
  renameSync(made, file); // a process that has the old one open keeps it
  return units.filter(({ source }) => source.endsWith(".cu")).map(({ object }) =>
    readFileSync(`${object}.log`, "utf8")
  );
}
