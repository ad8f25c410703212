/**
 * The C ABI from C: tests/c/two_ranks.c is compiled against the header alone and drives the CPU library with two ranks in
 * two processes. What it checks is written there.
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

test("a C program drives the library through the header", { skip: compiler ? false : "no gcc here" }, () => {
  const folder = mkdtempSync(join(tmpdir(), "deepep-c-"));
  try {
    const program = join(folder, "two_ranks");
    const flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-I", at("../cuda/abi")];
    execFileSync(compiler!, [...flags, at("./c/two_ranks.c"), "-o", program, "-ldl"]);
    const library = process.env["DEEPEP_LIBRARY_CPU"] ?? at("../lib/native/linux-x64/libdeepep_cpu.so");
    const run = spawnSync(program, [library], { encoding: "utf8", timeout: 90_000 });
    assertEquals([run.status, run.stdout.trim(), run.stderr.trim()], [0, "ok", ""]);
  } finally {
    rmSync(folder, { recursive: true });
  }
});
