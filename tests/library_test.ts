/**
 * The native libraries as files: what they need from a system, what they show to it.
 *
 * In: the libraries of the manifest, read as ELF. They export the functions of the ABI and nothing else, need nothing but
 * glibc 2.28, and stay loaded. Small libraries show that the reader finds what is wrong.
 */

import { existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import { describe, test } from "node:test";
import { assertEquals, assertStringIncludes, assertThrows } from "@std/assert";
import { functions } from "../lib/ffi/abi.ts";
import { manifest } from "../lib/native/manifest.ts";
import { elfProblems, readElf } from "../scripts/native/elf.ts";
import { kernelUses, ptxasTable } from "../scripts/native/ptxas.ts";
import { findToolkit } from "../scripts/native/toolkit.ts";
import { compile, noCompiler, root, temporaryFolder } from "./support/compile.ts";

describe("the libraries of this release", () => {
  for (const name of Object.keys(manifest.files)) {
    const file = join(root, "lib/native", name);
    test(`${name} runs on glibc 2.28 and exports the ABI only`, {
      skip: existsSync(file) ? false : "it is not here",
    }, () => {
      const elf = readElf(readFileSync(file));
      assertEquals(elfProblems(elf), []);
      assertEquals(elf.exports, Object.keys(functions).sort());
    });
  }

  test("every backend of the manifest has a library, sources and compilers", () => {
    const backends = Object.keys(manifest.files).map((name) => /libdeepep_(\w+)\.so$/.exec(name)?.[1]);
    assertEquals(Object.keys(manifest.sourceHash).sort(), backends.sort());
    assertEquals(Object.keys(manifest.compilers).sort(), backends);
  });
});

describe("a library that should not be published", { skip: noCompiler }, () => {
  const shared = ["-shared", "-fPIC"];

  test("exports more than the ABI, and can be unloaded", () => {
    const source = "void deepep_a(void);\nvoid deepep_a(void) {}\nint other;\nstatic int hidden;\n" +
      "int* deepep_b(void);\nint* deepep_b(void) { return &hidden; }\n";
    const elf = readElf(readFileSync(compile(source, "more.so", shared)));
    assertEquals(elf.exports, ["deepep_a", "deepep_b", "other"]);
    assertEquals(elfProblems(elf), [
      "exports other",
      "can be unloaded while its threads run: link it with -z nodelete",
    ]);
    assertEquals(elfProblems(readElf(readFileSync(compile(source, "stays.so", [...shared, "-Wl,-z,nodelete"])))), [
      "exports other",
    ]);
  });

  test("needs a library that not every system has", () => {
    const folder = compile("void far(void);\nvoid far(void) {}\n", "libfar.so", [...shared, "-Wl,-soname,libfar.so.3"]);
    const source = "void far(void);\nvoid deepep_a(void);\nvoid deepep_a(void) { far(); }\n";
    const elf = readElf(readFileSync(compile(source, "near.so", [...shared, "-Wl,-z,nodelete", folder])));
    assertEquals(elf.imports.includes("far"), true);
    assertEquals(elfProblems(elf), ["needs libfar.so.3, which not every system has"]);
  });

  test("needs a newer glibc", () => {
    const elf = { needed: ["libc.so.6"], imports: ["a@GLIBC_2.2.5", "b@GLIBC_2.28", "c@GLIBC_2.34"], exports: [] };
    assertEquals(elfProblems({ ...elf, stays: true }), [
      "needs c@GLIBC_2.34, at most glibc 2.28 is wanted: see cuda/compat",
    ]);
    const source = "#include <stdlib.h>\nvoid* deepep_a(void);\nvoid* deepep_a(void) { return malloc(1); }\n";
    const { imports } = readElf(readFileSync(compile(source, "versions.so", shared)));
    assertEquals(imports.filter((name) => name.startsWith("malloc")).length, 1);
  });

  test("is no library", () => {
    assertThrows(() => readElf(new TextEncoder().encode("#!/bin/sh\n".repeat(10))), Error, "not a 64-bit");
  });
});

test("what ptxas says about kernels becomes a table", () => {
  const log = `ptxas info    : 8 bytes gmem
ptxas info    : Compiling entry function '_ZN6deepep11copy_kernelILi512EEEvPvPKvm' for 'sm_90'
ptxas info    : Function properties for _ZN6deepep11copy_kernelILi512EEEvPvPKvm
    24 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 22 registers, used 1 barriers, 8192 bytes smem
ptxas info    : Compiling entry function '_ZN6deepep11copy_kernelILi512EEEvPvPKvm' for 'sm_80'
ptxas info    : Function properties for _ZN6deepep11copy_kernelILi512EEEvPvPKvm
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
`;
  const uses = kernelUses([log]);
  assertEquals(uses.map(({ kernel: _, ...use }) => use), [
    { arch: "sm_80", registers: 255, spills: 0, stack: 0, shared: 0 },
    { arch: "sm_90", registers: 22, spills: 24, stack: 24, shared: 8192 },
  ]);
  const lines = ptxasTable(uses).split("\n");
  assertEquals(lines.length, 3);
  assertEquals(lines[0]?.split(/ +/), ["kernel", "arch", "registers", "spills", "stack", "smem"]);
  assertStringIncludes(lines[1]!, "copy_kernel");
});

describe("the CUDA toolkit", () => {
  /** A folder with a script in the place of nvcc. */
  function toolkit(version: string, files: readonly string[]): string {
    const folder = temporaryFolder();
    for (const path of ["bin", "include", "lib"]) mkdirSync(join(folder, path));
    for (const path of files) writeFileSync(join(folder, path), "");
    writeFileSync(join(folder, "bin/nvcc"), `#!/bin/sh\necho "Cuda compilation tools, ${version}"\n`, { mode: 0o755 });
    return folder;
  }
  const files = ["include/cuda_runtime_api.h", "lib/libcudart_static.a"];

  test("is found in a folder", () => {
    const folder = toolkit("release 13.1, V13.1.2", files);
    assertEquals(findToolkit(folder), {
      nvcc: join(folder, "bin/nvcc"),
      version: "V13.1.2",
      include: join(folder, "include"),
      runtime: join(folder, "lib/libcudart_static.a"),
    });
  });

  test("is refused with the reason", () => {
    const bare = toolkit("release 13.1, V13.1.2", []);
    assertEquals(findToolkit(bare), `${bare} has no cuda_runtime_api.h, no libcudart_static.a`);
    const old = toolkit("release 12.4, V12.4.1", files);
    assertEquals(findToolkit(old), `${join(old, "bin/nvcc")} is V12.4.1, nvcc 13 or later is needed`);
  });
});
