/** scripts/soak.ts as it is run: steps that are right, a belief that makes the first one wrong, flags that make no sense. */
import { test } from "node:test";
import { assertEquals, assertMatch } from "@std/assert";
import { bounded, startChild } from "./support/group_worlds.ts";

const SHAPE = [
  "--backend",
  "cpu",
  "--ranks",
  "3",
  "--tokens",
  "5",
  "--hidden",
  "144",
  "--experts",
  "13",
  "--topk",
  "3",
];

async function soak(...flags: string[]) {
  const child = startChild("scripts/soak.ts", [...SHAPE, ...flags]);
  const { code } = await child.ended;
  return { code, ...child.output };
}

test("soak: every step is checked, and a line of JSON says so", bounded, async () => {
  for (const flags of [[], ["--halves"]]) {
    const run = await soak("--steps", "300", "--seed", "5", ...flags);
    assertEquals([run.code, run.stderr], [0, ""]);
    const { soak: how, backend, halves, steps, wanted, seed, ranks } = JSON.parse(run.stdout);
    assertEquals([how, backend, halves, steps, wanted], ["passed", "cpu", flags.length === 1, 300, 300]);
    assertEquals([seed, ranks], [5, 3]);
  }
});

test("soak: the first mismatch ends it, with its step, rank and token", bounded, async () => {
  const run = await soak("--corrupt");
  assertEquals(run.code, 1);
  assertMatch(run.stderr, /^step 0, rank \d: token \d is wrong$/m);
  const { soak: how, step, rank, token } = JSON.parse(run.stdout);
  assertEquals([how, step, typeof rank, typeof token], ["failed", 0, "number", "number"]);
});

test("soak: a limit of time ends it well; flags that make no sense end it with 1", bounded, async () => {
  const run = await soak("--seconds", "1"), report = JSON.parse(run.stdout);
  assertEquals([run.code, report.soak, report.steps < report.wanted], [0, "passed", true]);
  const bad = await soak("--steps", "0");
  assertEquals([bad.code, bad.stdout], [1, ""]);
  assertMatch(bad.stderr, /--steps is 0, needs a whole number from 1/);
});
