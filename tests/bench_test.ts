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
import { referenceDispatch, referenceLowLatencyDispatch } from "../lib/reference/mod.ts";
import { goalsOf } from "../scripts/bench/gpu/goals.ts";
import { placesOf } from "../scripts/bench/gpu/low_latency/checks.ts";
import { type GpuFigure, Report } from "../scripts/bench/gpu/report.ts";
import { busiestLink, makeRouting } from "../scripts/bench/gpu/routes.ts";
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
  const gpu = [["--only", "ceiling,floor"], ["--size-limit", "0"], ["--compare-tokens", "x"], ["--sms", "16,x"], [
    "--sweep-tokens",
    "0",
  ]];
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
    const flags = ["--gpu-bench", "--sms", "4,2", "--sweep-tokens", "2,8,16", "--compare-tokens", "8"]
      .concat(["--sweep-sms", "2", "--sweep-ranks", "1,2", "--quick", "--limit", "150"]);
    const { code, stdout, stderr, lines } = await bench(...flags);
    assertEquals(code, 0, stderr);
    const all = lines as GpuLine[], figures = all.filter(({ phase }) => phase !== undefined);
    const troubles = all.filter(({ op }) => op === "trouble").map(({ message }) => message);
    assertEquals(troubles, ["ceiling: Cannot measure copies: the cpu backend has no copy kernel"]);
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
    const forms = (
      op: string,
    ): string[] => [
      ...new Set(figures.filter((figure) => figure.phase === "main" && figure.op === op).map(({ form }) => form)),
    ];
    assertEquals([forms("dispatch_cached"), forms("dispatch_awaited")], [["chain", "launched"], ["launched"]]);
    assertEquals(opsOf("tokens"), ["dispatch_cached", "combine", "dispatch_full", "dispatch_awaited"]);
    const launched = figures.filter(({ phase, form }) => phase === "tokens" && form === "launched");
    assertEquals([...new Set(launched.map(({ tokens }) => tokens))], [8]); // only sizes that are compared
    for (const phase of ["sms", "ranks"]) assertEquals(opsOf(phase), ["dispatch_cached", "dispatch_fp8", "combine"]);
    assertEquals(opsOf("graphs"), []); // the cpu backend has none
    const lowLatency = ["ll_dispatch", "ll_combine", "ll_barrier"];
    for (const phase of ["", "_alone", "_sms", "_ranks", "_tokens"]) {
      assertEquals(opsOf(`low_latency${phase}`), lowLatency);
    }
    const options = ["", "wait_stats", "expert_stats", "row_major_scales", "round_scale", "ue8m0", "hook", "bf16"];
    assertEquals(opsOf("low_latency_options"), [
      ...options.map((option) => `ll_dispatch${option && "_"}${option}`),
      ...["ll_combine", "ll_combine_wait_stats", "ll_combine_hook", "ll_combine_copy", "ll_combine_copy_fp8"],
      ...["ll_dispatch_mask_on_timeout", "ll_combine_mask_on_timeout"],
    ]);
    assertEquals(
      opsOf("low_latency_overlap"),
      ["work", "dispatch", "dispatch_combine", "serial", "overlapped"].map((op) => `ll_${op}`),
    );
    assertEquals(
      opsOf("low_latency_host"),
      ["ll_dispatch", "ll_combine", "ll_dispatch_halves"].flatMap((op) => [`host_${op}_busy`, `host_${op}_idle`]),
    );
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
    assertMatch(stdout, /^\S+ +host cost of a call, device busy, (bun|deno) \d/m);
    assertMatch(stdout, /^graphs: .*\n +the backend has no graphs$/m);
    assertMatch(stdout, /^\S+ +dispatch BF16, cached, 4 SMs +>= 92 % of the bound/m);
  },
);

test("GPU bench: a wrong result is not timed, and the others go on", bounded, async () => {
  const { code, lines } = await bench("--gpu-bench", "--only", "main,low_latency", "--sms", "4", "--corrupt");
  const figures = (lines as GpuLine[]).filter(({ message }) => message === undefined);
  // No result stands behind these.
  assertEquals(
    figures.filter(({ op }) => !/^ll_barrier|^host_ll_/.test(op)).map(({ op }) => op),
    [],
  );
  const messages = (lines as GpuLine[]).map(({ message }) => message ?? "").filter((message) => message !== "");
  assertEquals([code, messages.filter((message) => message.startsWith("main: ")).length], [1, 6]);
  for (const message of messages) assertMatch(message, /^(main|low_latency\w*): .* differs from the reference: byte/);
});

/** A report with made-up figures. */
function reportOf(figures: readonly Partial<GpuFigure>[]): Report {
  const machine = {
    backend: "cuda",
    gpu: "none",
    numDevices: 1,
    driver: "none",
    commit: "",
    runtime: "bun 1",
    date: "",
  };
  const report = new Report(parseOptions([])!, machine);
  const facts = {
    phase: "main",
    form: "chain",
    ranks: 8,
    numSms: 16,
    tokens: 4096,
    dtype: "bf16",
    layout: "rank",
  } as const;
  for (const figure of figures) report.figures.push({ ...facts, op: "", us: at(1), ...figure });
  return report;
}
const at = (median: number) => ({ median, min: median, max: median });

test("GPU bench: shares are judged by the fastest kernel that moves rows as the call does", () => {
  const gbs = (us: number) => ({ us: at(us), bytes: 1e9 });
  const report = reportOf([
    { phase: "ceiling", op: "plain_scatter", ...gbs(360) },
    { phase: "ceiling", op: "plain_scatter", ...gbs(350) },
    { phase: "ceiling", op: "plain_scatter", dtype: "fp8", layout: "expert", ...gbs(380) },
    { phase: "ceiling", op: "plain_pull", ...gbs(320) },
    { op: "dispatch_cached", ...gbs(400) },
    { op: "combine", ...gbs(340) },
    { op: "ll_dispatch", dtype: "fp8", layout: "low_latency", ...gbs(400) },
  ]);
  const copy = (numSms: number | undefined, speed: number) => ({ numSms, gbs: at(speed), us: at(1), traffic: 1 });
  report.ceilings = [copy(132, 2500), copy(undefined, 3125)];
  const shares = (op: string) => report.shares(report.find({ op })!)!;
  assertAlmostEquals(shares("dispatch_cached").bound, 87.5, 1e-9); // of the faster scatter, not of the copy
  assertAlmostEquals(shares("dispatch_cached").memcpy, 80, 1e-9);
  assertEquals(shares("dispatch_cached").of.map(({ name }) => name), ["copy", "scatter"]);
  assertAlmostEquals(shares("combine").bound, 100 * 320 / 340, 1e-9);
  assertEquals(shares("combine").of.map(({ name }) => name), ["copy", "scatter", "pull"]);
  assertAlmostEquals(report.boundUs(report.find({ op: "ll_dispatch" })!)!, 380, 1e-9);
  const goal = (what: RegExp) => goalsOf(report).find((one) => what.test(one.what))!;
  assertEquals(goal(/dispatch BF16, cached, 16/).met, false);
  assertMatch(goal(/dispatch BF16, cached, 16/).reached, /87\.5 % .*copy 100\.0, scatter 87\.5.* 80\.0 % of memcpy/);
  assertEquals(goal(/combine BF16, 16/).met, false);
});

test("GPU bench: between devices the busiest link counts, and shares are of what links carry", () => {
  // Ranks 0 and 1 are on device 0, rank 2 on device 1. Two tokens of each rank, to every rank but those that are -1.
  const rankOf = [[0, 1, 2, 0, -1, -1], [0, 1, 2, 0, 1, 2], [0, 1, 2, -1, -1, 2]].map((all) => Int32Array.from(all));
  const route = { layout: "rank", width: 3, rankOf, rowOf: rankOf, sources: [], rows: 13 } as const;
  assertEquals(busiestLink(route, [0, 0, 1]), 3); // device 0 sends three rows, and gets two
  assertEquals(busiestLink(route, [0, 0, 0]), 0);
  assertEquals(busiestLink({ ...route, rankOf: [rankOf[2]!, rankOf[2]!, rankOf[1]!] }, [0, 0, 1]), 4); // it gets four
  const report = reportOf([
    { phase: "ceiling", op: "plain_scatter", us: at(100), bytes: 1e9, linkBytes: 3e7 },
    { op: "dispatch_cached", us: at(120), bytes: 1e9, linkBytes: 3e7, rankBytes: 6e7 },
  ]);
  report.links = { memcpy: 400, kernel: 350 };
  const figure = report.find({ op: "dispatch_cached" })!, shares = report.shares(figure)!;
  assertAlmostEquals(shares.bound, 62.5, 1e-9); // 3e7 bytes take 75 us at 400 GB/s
  assertAlmostEquals(shares.memcpy, 62.5, 1e-9);
  assertEquals(shares.of.map(({ name, percent }) => [name, Math.round(percent)]), [["link", 63], ["scatter", 83]]);
  const goal = goalsOf(report).find(({ what }) => what.startsWith("dispatch BF16"))!;
  assertEquals([goal.goal, goal.met], [">= 90 % of the bound", false]);
});

test("GPU bench: goals compare like with like", () => {
  const report = reportOf([
    { op: "dispatch_cached", us: at(1000) },
    { op: "dispatch_cached", form: "launched", us: at(1100) },
    { op: "dispatch_full", us: at(1030) },
    { op: "dispatch_awaited", form: "launched", us: at(1150) },
    { op: "dispatch_full_until_end", form: "host", us: at(1240) },
    { op: "dispatch_cached_until_end", form: "host", us: at(1200) },
  ]);
  const full = goalsOf(report).filter(({ what }) => what.startsWith("full dispatch"));
  assertEquals(full.map(({ met }) => met), [true, false, true]);
  assertEquals(full.map(({ reached }) => reached.split(" us")[0]), ["cached + 30.0", "cached + 50.0", "cached + 40.0"]);
});

test("GPU bench: the naive way must lose at every size, to every kind of call", () => {
  const sizes = Array.from({ length: 13 }, (_, i) => 2 ** i);
  const series = (op: string, us: (tokens: number) => number, form: GpuFigure["form"] = "launched") =>
    sizes.map((tokens) => ({ phase: "tokens", op, form, tokens, us: at(us(tokens)) }));
  const figures = [
    ...series("naive_dispatch", () => 50),
    ...series("dispatch_cached", () => 25),
    ...series("dispatch_awaited", (tokens) => tokens < 4 ? 80 : 40),
    ...series("naive_combine", () => 50),
    ...series("combine", () => 25).slice(1),
    ...series("naive_ll_dispatch", () => 50, "graph").slice(0, 4),
    ...series("ll_dispatch", () => 10, "graph").slice(0, 4),
  ];
  const rows = goalsOf(reportOf(figures)).filter(({ what }) => what.startsWith("against"));
  const found = Object.fromEntries(rows.map(({ what, met, reached }) => [what.split(", ")[1], [met, reached]]));
  assertEquals(found, {
    "launched: dispatch_cached": [true, "wins at 1 … 4096 (2.00 to 2.00 times as fast)"],
    "launched: dispatch_awaited": [
      false,
      "wins at 4 … 4096 (1.25 to 1.25 times as fast); loses at 1 (80.0 against 50.0 us); loses at 2 (80.0 against 50.0 us)",
    ],
    "launched: combine": [undefined, "wins at 2 … 4096 (2.00 to 2.00 times as fast); not measured: 1"],
    "graph: ll_dispatch": [true, "wins at 1 … 8 (5.00 to 5.00 times as fast)"],
  });
});

test("GPU bench: low-latency goals", () => {
  const figure = (op: string, tokens: number, us: number) =>
    ({ phase: "low_latency", form: "graph", op, tokens, us: at(us), more: { marginal: us - 1 } }) as const;
  const report = reportOf([
    figure("ll_dispatch", 128, 31),
    figure("ll_combine", 128, 52),
    { ...figure("ll_dispatch", 8, 9), ranks: 4 },
    { phase: "low_latency_host", form: "host", op: "host_ll_dispatch_busy", us: at(7.5) },
    { phase: "low_latency_host", form: "host", op: "host_ll_dispatch_halves_busy", us: at(20) },
  ]);
  const rows = goalsOf(report).filter(({ what }) => what.startsWith("low latency"));
  assertEquals(
    rows.map(({ met }) => met),
    [true, false, ...[undefined, undefined, undefined, undefined], true, undefined],
  );
  assertMatch(rows[0]!.reached, /^31\.0 us .* graph; 30\.0 us for one more call in the graph/);
});

test("GPU bench: low-latency rows are where the reference puts them", () => {
  for (const ranks of [1, 3, 8]) {
    const shape = { ranks, tokens: 7, topk: 3, experts: 10 }, routing = makeRouting(shape, 5);
    const want = referenceLowLatencyDispatch(
      routing.topkIdx.map((topkIdx) => ({ numTokens: 7, x: bytesOf(new Uint16Array(7 * 8)), rowBytes: 16, topkIdx })),
      { numExperts: 10, numTopk: 3, maxTokensPerRank: 7, fp8: false },
    );
    placesOf(routing).forEach(({ count, layoutRange, begins }, r) => {
      assertEquals([...count], [...want[r]!.numTokensPerExpert]);
      assertEquals([...layoutRange], [...want[r]!.layoutRange]);
      want[r]!.experts.forEach(({ srcInfo }, e) => {
        const sources = routing.expert.sources[r]!.subarray(begins[e], begins[e]! + count[e]!);
        assertEquals([...sources].map((source) => source % 7), [...srcInfo]);
      });
    });
  }
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
