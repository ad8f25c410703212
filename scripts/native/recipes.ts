/**
 * What each library is built from, and with which flags.
 *
 * In: nothing. Out: a recipe for each backend. All of it, and the content of the files that it names, is the backend's
 * source hash; where compilers and the CUDA toolkit are is not. `scripts/build.ts` and the files beside this one use it.
 */

/** How a backend is built. */
export interface Recipe {
  /** Folders and files whose .cpp and .cu files are compiled. The first one is the backend's own. */
  readonly sources: readonly string[];
  /** Folders and files that are included by them, too. */
  readonly includes: readonly string[];
  /** Flags of g++ for each .cpp file. */
  readonly cpp: readonly string[];
  /** More flags of g++ for single .cpp files. */
  readonly own?: Readonly<Record<string, readonly string[]>>;
  /** Flags of nvcc for each .cu file. A backend that has them is built with the CUDA toolkit. */
  readonly cu?: readonly string[];
  /** Architectures whose machine code is in the library, and those whose PTX is: the driver compiles it for later ones. */
  readonly machineCode?: readonly string[];
  readonly ptx?: readonly string[];
  /** Flags of g++ that links. */
  readonly link: readonly string[];
}

// No FMA contraction and no -march: every machine gives the same bits.
const cpp = ["-std=c++20", "-O3", "-ffp-contract=off", "-fPIC", "-fvisibility=hidden", "-fvisibility-inlines-hidden"]
  .concat(["-pthread", "-Wall", "-Wextra", "-ffile-prefix-map=.=", "-I."]);

/** `libraries` are named although new systems have them in libc: old ones do not. See cuda/compat/glibc.cpp. */
function link(...libraries: string[]): string[] {
  // nodelete: Deno unloads a worker's libraries when the worker ends, while native threads run.
  return ["-shared", "-pthread", "-s", "-static-libstdc++", "-static-libgcc", "-Wl,--exclude-libs,ALL"]
    .concat(["-Wl,--version-script=cuda/abi/exports.map", "-Wl,-z,nodelete", "-Wl,-z,relro,-z,now"])
    .concat(["-Wl,--no-undefined", "-Wl,--no-as-needed", ...libraries.map((name) => `-l:${name}`), "-Wl,--as-needed"])
    .concat(["-Wl,--build-id=none"]);
}

/** The recipes by backend. cuda/api is in all: its `#include "buffer.hpp"` is the backend's own, by the include path. */
export const recipes: Readonly<Record<string, Recipe>> = {
  cpu: {
    sources: ["cuda/cpu", "cuda/api", "cuda/common", "cuda/compat/glibc.cpp"],
    includes: ["cuda/abi", "cuda/compat/older.hpp"],
    cpp: [...cpp, "-Icuda/cpu"],
    link: link("libpthread.so.0"),
  },
  cuda: {
    sources: ["cuda/host", "cuda/kernels", "cuda/api", "cuda/common", "cuda/compat"],
    includes: ["cuda/abi"],
    cpp: [...cpp, "-Icuda/host"],
    // No FMA here either. ptxas tells registers and spills, which scripts/native/ptxas.ts shows. Compressed for size, the
    // device code takes an eighth of what it takes otherwise; every driver that this CUDA runtime runs on unpacks it.
    cu: ["-std=c++20", "-O3", "--fmad=false", "-I.", "-Icuda/host", "--compress-mode=size", "-Xptxas=-v", "--threads=0"]
      .concat(["-Xcompiler=-fPIC,-fvisibility=hidden,-fvisibility-inlines-hidden,-ffp-contract=off,-pthread"]),
    // Machine code runs on later GPUs of the same major version; PTX of 10.0 serves every major version from there on.
    machineCode: ["80", "90", "100"],
    ptx: ["100"],
    link: link("libpthread.so.0", "libdl.so.2", "librt.so.1"),
  },
};
