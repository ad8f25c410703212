/**
 * Builds the CUDA backend for an emulated device: its own host code and its own kernels, compiled by g++, on the CPU.
 *
 * In: `cuda/`, and the runtime and device language of this folder. Out: a library in place of libdeepep_cuda.so, for tests
 * on machines without a GPU: `DEEPEP_LIBRARY_CUDA=build/emulated/libdeepep_cuda.so` in the environment makes them load it.
 *
 *   bun tests/emulator/build.ts
 *   bun tests/emulator/build.ts --races   build/emulated/libdeepep_cuda_races.so, which looks for races (races.hpp)
 */
import { cpSync, mkdirSync, rmSync } from "node:fs";
import { join, relative } from "node:path";
import process from "node:process";
import { build, root } from "../../scripts/native/compile.ts";
import type { Recipe } from "../../scripts/native/recipes.ts";

const here = "tests/emulator";
/** Where the sources are as the kernels see them: beside another primitives.cuh. */
const copy = "build/emulated/src";

const recipe: Recipe = {
  sources: [here, "cuda/host", "cuda/api", "cuda/common", "cuda/compat/glibc.cpp"],
  includes: ["cuda/abi", "scripts/decode/decode.cu", "cuda/compat/older.hpp", "cuda/kernels", copy],
  cpp: ["-std=c++20", "-O2", "-g1", "-ffp-contract=off", "-fno-strict-aliasing", "-fPIC", "-pthread"]
    .concat(["-fvisibility=hidden", "-fvisibility-inlines-hidden", "-fno-extern-tls-init"])
    .concat(["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-maybe-uninitialized"])
    .concat(["-DDEEPEP_MOST_CAPTURED_KEPT=2"])
    .concat([`-I${here}/include`, `-I${copy}`, "-Icuda/host", `-I${here}`]),
  link: ["-shared", "-pthread", "-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL"]
    .concat(["-Wl,--version-script=cuda/abi/exports.map", "-Wl,-z,nodelete", "-Wl,--no-undefined"])
    .concat(["-Wl,--no-as-needed", "-l:libpthread.so.0"]),
};

/** The kernels call a function before every access to memory. */
const races: Recipe = {
  ...recipe,
  own: { [`${here}/kernels.cpp`]: ["-fsanitize=thread", "--param", "tsan-instrument-func-entry-exit=0", "-Wno-tsan"] },
};

/** Builds it; answers the file. */
export async function buildEmulated(looksForRaces = false): Promise<string> {
  rmSync(join(root, copy), { recursive: true, force: true });
  mkdirSync(join(root, copy), { recursive: true });
  for (const folder of ["abi", "common", "host", "kernels"]) {
    cpSync(join(root, "cuda", folder), join(root, copy, "cuda", folder), {
      recursive: true,
      filter: (path) => !path.endsWith(".cpp"),
    });
  }
  cpSync(join(root, here, "primitives.cuh"), join(root, copy, "cuda/kernels/primitives.cuh"));
  const file = join(root, `build/emulated/libdeepep_cuda${looksForRaces ? "_races" : ""}.so`);
  await build("emulated", looksForRaces ? races : recipe, file, { strict: true });
  return file;
}

if (import.meta.main) {
  try {
    console.log(relative(process.cwd(), await buildEmulated(process.argv.includes("--races"))));
  } catch (error) {
    const { stderr, message } = error as Error & { stderr?: string };
    console.error(stderr || message); // the compiler's words
    process.exitCode = 1;
  }
}
