/**
 * Compiles small C programs and libraries for tests.
 *
 * In: C source and flags. Out: a file in a folder of this process, which is removed when the process ends. `noCompiler`
 * is the reason to skip a test where there is no C compiler, else false, as node:test wants it.
 */

import { execFileSync, spawnSync } from "node:child_process";
import { mkdtempSync, rmSync, writeFileSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";

/** The root of the repository. */
export const root: string = fileURLToPath(new URL("../..", import.meta.url));

/** Why C cannot be compiled here, or false. */
export const noCompiler: string | false = spawnSync("gcc", ["--version"]).status === 0 ? false : "there is no gcc here";

let shelf: string | undefined;

/** A fresh folder, removed when this process ends. */
export function temporaryFolder(): string {
  if (shelf === undefined) {
    const folder = shelf = mkdtempSync(join(tmpdir(), "deepep-test-"));
    process.on("exit", () => rmSync(folder, { recursive: true, force: true }));
  }
  return mkdtempSync(join(shelf, "folder-"));
}

/** Compiles `source` to a program, or with `-shared` among the flags to a library. Throws with the compiler's words. */
export function compile(source: string, name: string, flags: readonly string[] = []): string {
  const folder = temporaryFolder();
  const from = join(folder, "source.c");
  const to = join(folder, name);
  writeFileSync(from, source);
  execFileSync(
    "gcc",
    ["-std=gnu11", "-Wall", "-Wextra", "-Werror", "-pthread", `-I${root}`, from, "-o", to, ...flags],
    {
      stdio: ["ignore", "pipe", "pipe"],
    },
  );
  return to;
}
