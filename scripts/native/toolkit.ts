/**
 * Finds the CUDA toolkit.
 *
 * In: a folder, or the environment: CUDA_HOME, CUDA_PATH, nvcc in PATH, /usr/local/cuda. Out: nvcc, the headers and the
 * static runtime, or why there is no toolkit to build with. `scripts/build.ts` and the gate call it.
 */

import { spawnSync } from "node:child_process";
import { existsSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";

/** nvcc before 13 knows fewer architectures and compresses worse. */
const MIN_NVCC = 13;

/** Where the parts of the toolkit are. */
export interface Toolkit {
  readonly nvcc: string;
  /** As nvcc prints it. */
  readonly version: string;
  /** The folder of cuda_runtime_api.h. */
  readonly include: string;
  /** libcudart_static.a. */
  readonly runtime: string;
}

/** The toolkit's folder by nvcc's own words, since nvcc in PATH can be a script that starts another one. */
function folderOfNvcc(): string | undefined {
  const told = spawnSync("nvcc", ["--dryrun", "-x", "cu", "-c", "/dev/null"], { encoding: "utf8" });
  return /^#\$ TOP=(.+)$/m.exec(told.stderr ?? "")?.[1];
}

/** The toolkit in a folder, or why there is none. */
function toolkitIn(folder: string): Toolkit | string {
  const first = (paths: readonly string[]): string | undefined =>
    paths.map((path) => join(folder, path)).find((path) => existsSync(path));
  const target = "targets/x86_64-linux";
  const nvcc = first(["bin/nvcc"]);
  const header = first(["include", `${target}/include`].map((path) => `${path}/cuda_runtime_api.h`));
  const runtime = first(["lib64", "lib", `${target}/lib`].map((path) => `${path}/libcudart_static.a`));
  if (!nvcc || !header || !runtime) {
    const missing = [[nvcc, "bin/nvcc"], [header, "cuda_runtime_api.h"], [runtime, "libcudart_static.a"]]
      .filter(([found]) => !found).map(([, name]) => name);
    return `${folder} has no ${missing.join(", no ")}`;
  }
  const version = spawnSync(nvcc, ["--version"], { encoding: "utf8" }).stdout ?? "";
  const release = /release (\d+)\.\d+, (V\S+)/.exec(version);
  if (!release) return `${nvcc} does not tell its version`;
  if (Number(release[1]) < MIN_NVCC) return `${nvcc} is ${release[2]}, nvcc ${MIN_NVCC} or later is needed`;
  return { nvcc, version: release[2]!, include: join(header, ".."), runtime };
}

/** The toolkit in `folder`, or by the environment; or why there is none, as a text. */
export function findToolkit(folder?: string): Toolkit | string {
  const named = folder ?? process.env["CUDA_HOME"] ?? process.env["CUDA_PATH"];
  if (named) return toolkitIn(named);
  const found = [folderOfNvcc(), "/usr/local/cuda"].filter((path) => path !== undefined && existsSync(path))
    .map((path) => toolkitIn(path!));
  return found.find((toolkit) => typeof toolkit !== "string") ?? found[0] ??
    "there is no CUDA toolkit here: nvcc is not in PATH, CUDA_HOME is not set";
}
