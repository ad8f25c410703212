/**
 * House style that no formatter checks.
 *
 * In: the files of the repository. Each source file opens with a comment that says what it is for; none has a forbidden
 * word; the lock file names no registry; the package's files have names that JSR takes; no test of CUDA is forgotten.
 */

import { readdirSync, readFileSync } from "node:fs";
import { join, relative } from "node:path";
import { test } from "node:test";
import { assertEquals } from "@std/assert";
import { root } from "./support/compile.ts";

const skipped = new Set(["node_modules", "build", ".git", ".device"]);

function filesIn(folder: string): string[] {
  return readdirSync(folder, { withFileTypes: true }).flatMap((entry) => {
    const path = join(folder, entry.name);
    if (skipped.has(entry.name)) return [];
    return entry.isDirectory() ? filesIn(path) : [relative(root, path)];
  });
}

const files = filesIn(root).filter((path) => !path.endsWith(".so") && !path.endsWith(".tmp"));
const read = (path: string): string => readFileSync(join(root, path), "utf8");
const sources = files.filter((path) => /\.(ts|cpp|hpp|h|c|cu|cuh)$/.test(path));

test("every source file opens with a comment", () => {
  const bare = sources.filter((path) => {
    const head = read(path).replace(/^#!.*\n/, "");
    const comment = /^\s*\/\*[\s\S]*?\*\//.exec(head)?.[0] ?? /^(\s*\/\/.*\n)+/.exec(head)?.[0] ?? "";
    return !/[a-z]{2,} [a-z]{2,}/i.test(comment);
  });
  assertEquals(bare, []);
});

test("no file has a forbidden word", () => {
  // Split, so that this file does not have them.
  const words = ["TO" + "DO", "FIX" + "ME", "XX" + "X", "HA" + "CK:", "/wo" + "rk/", "/ro" + "ot/", "Co-" + "Authored"]
    .map((word) => new RegExp(`(?<![A-Za-z])${word}`));
  const found = files.flatMap((path) =>
    read(path).split("\n").flatMap((line, i) =>
      words.filter((word) => word.test(line)).map((word) => `${path}:${i + 1} has ${word.source}`)
    )
  );
  assertEquals(found, []);
});

test("the check of a GPU machine runs every test of the CUDA backend", () => {
  const check = read("scripts/gpu_check.sh");
  const tests = files.filter((path) => /^tests\/cuda_\w+_test\.ts$|^tests\/cuda_test\.ts$/.test(path));
  assertEquals(tests.filter((path) => !check.includes(` ${path}`)), []);
  assertEquals(tests.length > 5, true);
});

test("the lock file names no host", () => {
  const lock = read("package-lock.json");
  assertEquals(/"resolved"/.test(lock), false);
  const packages = Object.values(JSON.parse(lock).packages as Record<string, Record<string, unknown>>);
  const values = packages.map(({ funding: _, ...rest }) => JSON.stringify(rest)).join("\n");
  assertEquals(values.match(/https?:\/\/[^"]*/g), null);
});

test("the library prints nothing and has no dependency", () => {
  const library = sources.filter((path) => path === "mod.ts" || path.startsWith("lib/"));
  const found = library.flatMap((path) => {
    const code = read(path).replace(/\/\*[\s\S]*?\*\//g, "").replace(/(^|\s)\/\/.*$/gm, "");
    const foreign = [...code.matchAll(/from "([^"]+)"/g)].map((m) => m[1]!)
      .filter((name) => !name.startsWith(".") && !name.startsWith("node:") && name !== "bun:ffi");
    const prints = /console\.(log|error|info|debug)/.test(code) ? ["console"] : [];
    return [...foreign, ...prints].map((what) => `${path} uses ${what}`);
  });
  assertEquals(found, []);
});

test("file names are snake_case, and none differs from another by case only", () => {
  const names = sources.filter((path) => !/^(\.|lib\/native)/.test(path));
  assertEquals(names.filter((path) => !/^[a-z0-9_/]+(\.[a-z]+)+$/.test(path)), []);
  assertEquals(new Set(files.map((path) => path.toLowerCase())).size, files.length);
});
