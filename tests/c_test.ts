/**
 * The C ABI from C: the programs of tests/c are compiled against the header alone and drive the CPU library, with two ranks
 * in two processes and in one. What they check is written there.
 */
import { execFileSync, spawnSync } from "node:child_process";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { assertEquals } from "@std/assert";

const at = (path: string) => fileURLToPath(new URL(path, import.meta.url));
const compiler = spawnSync("gcc", ["--version"]).status === 0 ? "gcc" : undefined;

for (const name of ["two_ranks", "out_of_order"]) {
  test(`a C program drives the library through the header: ${name}`, { skip: compiler ? false : "no gcc here" }, () => {
    const folder = mkdtempSync(join(tmpdir(), "deepep-c-"));
    try {
      const program = join(folder, name);
      const flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-I", at("../cuda/abi")];
      execFileSync(compiler!, [...flags, at(`./c/${name}.c`), "-o", program, "-ldl"]);
      const library = process.env["DEEPEP_LIBRARY_CPU"] ?? at("../lib/native/linux-x64/libdeepep_cpu.so");
      const run = spawnSync(program, [library], { encoding: "utf8", timeout: 90_000 });
      assertEquals([run.status, run.stdout.trim(), run.stderr.trim()], [0, "ok", ""]);
    } finally {
      rmSync(folder, { recursive: true });
    }
  });
}
