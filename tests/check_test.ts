/**
 * What the gate says of a step that fails (scripts/check/report.ts): the runners themselves run tests that fail in every way,
 * so that a runner that begins to write otherwise is seen here. Output that no runner gives at will is written out.
 */
import { spawnSync } from "node:child_process";
import { existsSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { countsOf, digestOf, type Runner } from "../scripts/check/report.ts";
import { root, temporaryFolder } from "./support/compile.ts";

const program = `import { describe, test } from "node:test";
console.log("said before");
describe("outer", () => {
  test("passes", () => {});
  test("is left out", { skip: true }, () => {});
  describe("inner", () => test("fails", () => Promise.reject(new Error("two\\nlines"))));
});
test("fails too", () => { throw new TypeError("no such thing"); });
test("passes too", () => {});
`;

/** Runs test files; answers the exit status and the output. */
function run(runner: Runner, files: Record<string, string>): { status: number; output: string } {
  const cwd = temporaryFolder();
  for (const [name, text] of Object.entries(files)) writeFileSync(join(cwd, name), text);
  const args = runner === "deno" ? ["test", "-A", "--no-lock", "--no-check"] : ["test"];
  const env = { ...process.env, NO_COLOR: "1" };
  const command = join(root, "node_modules/.bin", runner);
  const { status, stdout, stderr } = spawnSync(command, args, { cwd, env, encoding: "utf8", timeout: 50_000 });
  return { status: status ?? 1, output: stdout + stderr };
}

for (const runner of ["bun", "deno"] as const) {
  const missing = existsSync(join(root, "node_modules/.bin", runner)) ? false : `there is no ${runner}`;
  const options = { skip: missing, timeout: 60_000 };

  test(`the digest of ${runner} names what failed, then says why`, options, () => {
    const { status, output } = run(runner, { "a_test.ts": program });
    // Deno counts the two suites too, one of them a step, both with the test that fails in them.
    assertEquals(
      countsOf(runner, status, output),
      { passed: 2, failed: runner === "deno" ? 4 : 2, skipped: 1 },
      output,
    );
    const lines = digestOf(runner, output), between = runner === "deno" ? " ... " : " > ";
    const name = ["outer", "inner", "fails"].join(between);
    assertEquals(lines.slice(0, 3), [`failed: ${name}`, "failed: fails too", `${name}:`]);
    assert(lines.length <= 30 && lines.every((line) => !line.includes("said before")), lines.join("\n"));
    const text = lines.join("\n");
    assert(/two\n +lines\n[^]*fails too:\n.*TypeError: no such thing\n[^]* at .*a_test\.ts:8:/.test(text), text);
  });

  test(`the digest of ${runner} says which file cannot be loaded`, options, () => {
    const { status, output } = run(runner, { "b_test.ts": 'import "./nowhere.ts";\n' });
    assertEquals(countsOf(runner, status, output), { passed: 0, failed: 1, skipped: 0 }, output);
    const text = digestOf(runner, output).join("\n");
    assert(/b_test\.ts/.test(text) && /nowhere\.ts/.test(text), text);
  });
}

test("many failures are named, up to ten, and still fit", () => {
  const one = (i: number) => `error: number ${i}\n${"  more\n".repeat(50)}(fail) test ${i} [1.00ms]\n`;
  const output = `a_test.ts:\n${
    Array.from({ length: 12 }, (_, i) => one(i)).join("")
  }\n12 tests failed:\n(fail) test 0\n\n 0 pass\n 12 fail\n`;
  const lines = digestOf("bun", output);
  assertEquals([lines.length, lines[0], lines[10]], [30, "failed: test 0", "and 2 more"]);
  assertEquals(lines.slice(11, 14), ["test 0:", "  error: number 0", "    more"]);
});

test("a runner that was ended is known by its last words, and counts as a failure", () => {
  const output = `running 2 tests\n${"one ... ok\n".repeat(100)}two ...\nended after 300 s\n`;
  assertEquals(countsOf("deno", 1, output), { passed: 0, failed: 1, skipped: 0 });
  const lines = digestOf("deno", output);
  assertEquals([lines.length, ...lines.slice(-2)], [30, "two ...", "ended after 300 s"]);
  const failed = digestOf("deno", output.replace("one ... ok", "one ... FAILED (3ms)"));
  assertEquals([failed[0], failed.at(-1)], ["failed: one", "ended after 300 s"]);
  const begun = digestOf("bun", "error: bad\n(fail) one [2ms]\n(pass) two\nended after 300 s\n");
  assertEquals(begun.slice(0, 2), ["failed: one", "  error: bad"]);
  assertEquals(begun.at(-1), "ended after 300 s");
});

test("of other programs the beginning and the end", () => {
  assertEquals(digestOf(undefined, "Check a.ts\none\n\ntwo\n"), ["one", "two"]);
  const lines = digestOf(undefined, Array.from({ length: 100 }, (_, i) => `line ${i}`).join("\n"));
  assertEquals([lines.length, lines[0], lines[10], lines[29]], [30, "line 0", "…", "line 99"]);
  assertEquals(countsOf(undefined, 2, ""), { passed: 0, failed: 1, skipped: 0 });
  assertEquals(countsOf(undefined, 0, ""), { passed: 1, failed: 0, skipped: 0 });
});
