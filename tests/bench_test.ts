/**
 * scripts/bench.ts as users run it, at sizes that take no time: every op gives a well-formed JSON line, a wrong result is never
 * timed, and flags that make no sense are refused. The bench of a GPU runs on the cpu backend, without what that lacks.
 */
import { existsSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { test } from "node:test";
import { assert, assertAlmostEquals, assertEquals, assertMatch } from "@std/assert";
import { bytesOf } from "../lib/dtype.ts";
import { referenceDispatch } from "../lib/reference/mod.ts";
import { makeRouting } from "../scripts/bench/gpu/routes.ts";
import { fitted } from "../scripts/bench/gpu/sweeps.ts";
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

/** A line of `--json` of a GPU's bench. */
interface GpuLine extends Line {
  phase: string;
  form: string;
  date: string;
  message?: string;
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
  const gpu = [["--only", "ceiling,floor"], ["--compare-tokens", "x"], ["--sms", "16,x"], ["--sweep-tokens", "0"]];
  for (
    const flags of [...gpu, ["--ranks", "0"], ["--ops", "fly"], ["--backend", "tpu"], ["--topk", "9", "--experts", "8"]]
  ) {
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

test(
  "GPU bench: every phase gives figures on whatever backend, and goes on without what it lacks",
  bounded,
  async () => {
    const flags = ["--gpu-bench", "--sms", "4,2", "--sweep-tokens", "2,8", "--sweep-sms", "2", "--sweep-ranks", "1,2"];
    const { code, stdout, stderr, lines } = await bench(...flags);
    assertEquals(code, 0, stderr);
    const all = lines as GpuLine[], figures = all.filter(({ phase }) => phase !== undefined);
    const troubles = all.filter(({ op }) => op === "trouble").map(({ message }) => message);
    assertEquals(troubles, new Array(2).fill("ceiling: Cannot measure copies: the cpu backend has no copy kernel"));
    const opsOf = (
      wanted: string,
    ): string[] => [...new Set(figures.filter(({ phase }) => phase === wanted).map(({ op }) => op))];
    const dispatches = ["dispatch_cached", "dispatch_full", "dispatch_awaited"];
    assertEquals(opsOf("main"), [
      ...dispatches,
      "dispatch_own_stream",
      ...["dispatch_full", "dispatch_cached"].flatMap((op) => [`${op}_until_promise`, `${op}_until_end`]),
      ...["dispatch_fp8", "combine", "combine_copy", "dispatch_expert", "combine_expert"],
    ]);
    assertEquals(opsOf("tokens"), ["dispatch_cached", "combine", "dispatch_full", "dispatch_awaited"]);
    const launched = figures.filter(({ phase, form }) => phase === "tokens" && form === "launched");
    assertEquals([...new Set(launched.map(({ tokens }) => tokens))], [8]); // only sizes that are compared
    for (const phase of ["sms", "ranks"]) assertEquals(opsOf(phase), ["dispatch_cached", "dispatch_fp8", "combine"]);
    assertEquals(opsOf("graphs"), []); // the cpu backend has none
    const calls = ["dispatch", "dispatch_cached", "combine"];
    assertEquals(opsOf("host"), [
      ...[...calls, ...calls.map((op) => `${op}_async`), "release"].flatMap((
        op,
      ) => [`host_${op}_busy`, `host_${op}_idle`]),
      ...calls.map((op) => `heap_${op}`),
    ]);
    assertEquals(
      opsOf("wake"),
      [
        ...["observed", "asked", "observed_after_500_us", "observed_after_3_ms"],
        ...["turn", "ask", "barrier_awaited", "barrier_asked"],
      ].map((op) => `wake_${op}`),
    );
    for (const line of figures) {
      assertMatch(line.runtime, /^(bun|deno) \d/);
      assertMatch(line.date, /^\d{4}-\d\d-\d\dT/);
      assert(line.usMin <= line.usMedian && line.usMedian <= line.usMax, line.op);
      assertEquals([line.backend, line.hidden, line.topk, line.experts], ["cpu", 128, 2, 8]);
    }
    assertMatch(stdout, /^graphs: .*\n +the backend has no graphs$/m);
    assertMatch(stdout, /^\S+ +dispatch BF16, cached, 4 SMs +>= 92 % of the bound/m);
  },
);

test("GPU bench: a wrong result is not timed, and the others go on", bounded, async () => {
  const { code, lines } = await bench("--gpu-bench", "--only", "main", "--sms", "4", "--corrupt");
  const messages = (lines as GpuLine[]).map(({ message }) => message ?? "");
  assertEquals([code, messages.length], [1, 6]);
  for (const message of messages) assertMatch(message, /^main: .* differs from the reference: byte/);
});

test("GPU bench: rows go where the reference puts them", () => {
  for (const ranks of [1, 3, 8]) {
    const shape = { ranks, tokens: 7, topk: 3, experts: 10 };
    const routing = makeRouting(shape, 5);
    const inputs = routing.topkIdx.map((topkIdx, r) => ({
      numTokens: 7,
      x: bytesOf(new Uint16Array(7 * 8)),
      rowBytes: 16,
      topkIdx,
      topkWeights: routing.topkWeights[r]!,
    }));
    for (const layout of ["rank", "expert"] as const) {
      const route = routing[layout];
      const want = referenceDispatch(inputs, {
        numExperts: 10,
        numTopk: 3,
        maxTokensPerRank: 7,
        maxRecvTokens: 1000,
        layout,
      });
      want.ranks.forEach(({ srcIdx, numTokensPerExpert }, r) => {
        assertEquals([...route.sources[r]!], [...srcIdx]);
        assertEquals([...routing.perExpert[r]!], [...numTokensPerExpert]);
      });
      for (let s = 0; s < ranks; s++) {
        route.rankOf[s]!.forEach((rank, hop) => {
          if (rank < 0) return;
          assertEquals(route.sources[rank]![route.rowOf[s]![hop]!], s * 7 + Math.floor(hop / route.width));
        });
      }
    }
  }
});

test("GPU bench: a line is fitted", () => {
  const { fixed, perMb, worst } = fitted([1, 10, 100].map((mb) => ({ mb, us: 5 + 2 * mb })));
  assertAlmostEquals(fixed, 5, 1e-9);
  assertAlmostEquals(perMb, 2, 1e-9);
  assertAlmostEquals(worst, 0, 1e-9);
});
