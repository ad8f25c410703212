/**
 * Compiles a CUDA source of the scripts, which is not part of the package, into a library.
 *
 * In: the source, nvcc. Out: a file in build/, whose name has the hash of the source: one that was carried from another machine
 * is of this source. Called by scripts/decode/kernels.ts.
 */
import { spawnSync } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, mkdirSync, readFileSync, renameSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { findToolkit } from "./toolkit.ts";

const build = fileURLToPath(new URL("../../build", import.meta.url));
const architectures = ["80", "90", "100"];

// No FMA: products are rounded, as the library's are. nodelete: Deno unloads a worker's libraries when the worker ends.
const flags = ["-shared", "-Xcompiler", "-fPIC,-fvisibility=hidden", "-Xlinker", "-z,nodelete", "-O3", "-std=c++17"]
  .concat(["--fmad=false", "--threads=0", "-cudart", "static"])
  .concat(architectures.map((sm) => `-gencode=arch=compute_${sm},code=sm_${sm}`))
  .concat("-gencode=arch=compute_100,code=compute_100");

/** Compiles `source` unless that is done; answers the library's path. @throws {Error} saying why there is none */
export function compileKernels(name: string, source: string): string {
  const hash = createHash("sha256").update(readFileSync(source)).digest("hex").slice(0, 12);
  const folder = join(build, name), path = join(folder, `lib${name}-${hash}.so`);
  if (existsSync(path)) return path;
  const toolkit = findToolkit();
  if (typeof toolkit === "string") throw new Error(toolkit);
  mkdirSync(folder, { recursive: true });
  const made = `${path}.${process.pid}.tmp`;
  const { status, stderr } = spawnSync(toolkit.nvcc, [...flags, "-o", made, source], {
    encoding: "utf8",
    timeout: 120_000,
  });
  if (status !== 0) throw new Error(`nvcc failed: ${stderr?.split("\n").slice(0, 5).join("\n")}`);
  renameSync(made, path);
  return path;
}
