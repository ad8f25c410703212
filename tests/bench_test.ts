/**
 * scripts/bench.ts as users run it, at sizes that take no time: every op gives a well-formed JSON line, a wrong result is never
 * timed, and flags that make no sense are refused.
 */
import { existsSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { assert, assertAlmostEquals, assertEquals, assertMatch } from "@std/assert";
import { OPS, parseOptions } from "../scripts/bench/options.ts";
import { spreadOf } from "../scripts/bench/timing.ts";
import { makeBenchWorld, sum } from "../scripts/bench/world.ts";
import { startChild } from "./support/group_worlds.ts";

const bounded = { timeout: 180_000 };
const tiny = [
  "--backend",
  "cpu",
  "--ranks",
  "3",
  "--tokens",
  "8",
  "--ll-tokens",
  "1,4",
  "--hidden",
  "128",
  "--topk",
  "2",
]
  .concat(["--experts", "8", "--chain-ms", "2", "--repetitions", "2"]);

/** A line of `--json`. */
interface Line {
  op: string;
  backend: string;
  gpu: string;
  driver: string;
  commit: string;
  runtime: string;
  ranks: number;
  numSms: number;
  tokens: number;
  hidden: number;
  topk: number;
  experts: number;
  dtype: string;
  layout: string;
  usMedian: number;
  usMin: number;
  usMax: number;
  bytes: number;
  boundUs: number;
  ratio: number;
  naiveUs: number | null;
}

async function bench(
  ...flags: string[]
): Promise<{ code: number | null; stdout: string; stderr: string; lines: Line[] }> {
  const folder = mkdtempSync(join(tmpdir(), "deepep-bench-")), file = join(folder, "lines.jsonl");
  try {
    const child = startChild("scripts/bench.ts", [...tiny, "--json", file, ...flags]);
    const { code } = await child.ended;
    const text = existsSync(file) ? readFileSync(file, "utf8") : "";
    const lines = text.split("\n").filter((line) => line !== "").map((line) => JSON.parse(line) as Line);
    return { code, ...child.output, lines };
  } finally {
    rmSync(folder, { recursive: true });
  }
}

test("bench: every op gives a figure, its bound and the naive way beside it", bounded, async () => {
  const { code, stdout, stderr, lines } = await bench();
  assertEquals(code, 0, stderr);
  const normal = ["dispatch", "dispatch_cached", "dispatch_fp8", "dispatch_expert", "combine", "combine_copy"];
  const calls = ["dispatch", "dispatch_cached", "combine", "ll_dispatch", "ll_combine"];
  const host = [...calls.flatMap((name) => [`host_${name}`, `host_${name}_idle`]), "wake", "wake_late"];
  const expected = [...normal, "ll_dispatch", "ll_combine", "ll_dispatch", "ll_combine", ...host];
  assertEquals(lines.map(({ op }) => op), expected);
  for (const line of lines) {
    assertEquals([line.backend, line.numSms, line.hidden, line.topk, line.experts], ["cpu", 0, 128, 2, 8]);
    assertMatch(line.runtime, /^(bun|deno) \d/);
    assert(line.gpu.length > 0 && line.driver.length > 0);
    assert(line.usMin <= line.usMedian && line.usMedian <= line.usMax && line.usMin > 0, line.op);
    assertAlmostEquals(line.ratio * line.usMedian / line.boundUs, 1, 1e-3, line.op);
    const aboutTheHost = host.includes(line.op);
    assertEquals(line.ranks, aboutTheHost ? 1 : 3);
    assertEquals(line.bytes > 0, !aboutTheHost, line.op);
    assertEquals(line.naiveUs !== null, !aboutTheHost, line.op);
    assertMatch(stdout, new RegExp(`^${line.op} `, "m"));
  }
  const world = makeBenchWorld({ ranks: 3, tokens: 8, hidden: 128, topk: 2, experts: 8 });
  assertEquals(lines[0]!.bytes, (24 + sum(world.rankRows)) * 256);
  assertEquals(sum(world.expertRows), 3 * 8 * 2);
});

test("bench: a wrong result is not timed", bounded, async () => {
  for (const ops of ["dispatch", "dispatch_expert", "combine", "ll_dispatch", "ll_combine"]) {
    const { code, stderr, lines } = await bench("--ops", ops, "--corrupt");
    assertEquals([code, lines], [1, []]);
    assertMatch(stderr, /^Refused to time a wrong result: .* differs from the reference: byte/m);
  }
});

test("bench: flags that make no sense are refused", () => {
  for (const flags of [["--ranks", "0"], ["--ops", "fly"], ["--backend", "tpu"], ["--topk", "9", "--experts", "8"]]) {
    let message = "";
    try {
      parseOptions(flags);
    } catch (error) {
      assert(error instanceof RangeError);
      message = error.message;
    }
    assertMatch(message, /^Cannot bench: /);
  }
  assertEquals(parseOptions(["--help"]), undefined);
  assertEquals([...parseOptions([])!.ops], [...OPS]);
});

test("bench: medians", () => {
  assertEquals(spreadOf([3, 1, 2]), { median: 2, min: 1, max: 3 });
  assertEquals(spreadOf([4, 1, 2, 3]), { median: 2.5, min: 1, max: 4 });
});
