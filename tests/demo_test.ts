/**
 * scripts/demo.ts as users run it: every mode on a real text, one process and many, the check that must find a wrong byte,
 * and flags that make no sense. Small sizes; the layer is the real one.
 */
import { test } from "node:test";
import { assert, assertEquals, assertMatch } from "@std/assert";
import { tokenize } from "../scripts/demo/text.ts";
import { bounded, startChild } from "./support/group_worlds.ts";

const TEXT = new URL("../lib/ffi/abi.ts", import.meta.url).pathname;

interface Report {
  mode: string;
  ok: boolean;
  checksum: string;
  processes: number;
  tokens: number;
  rowsMoved: number;
  rowsPulled: number;
  bytesMoved: number;
  wrongTokens: number;
  firstWrong: { rank: number; token: number; word: string } | null;
  loadPerExpert: number[];
  traffic: number[][];
}

async function demo(...flags: string[]): Promise<{ code: number | null; stdout: string; stderr: string }> {
  const child = startChild("scripts/demo.ts", ["--text", TEXT, "--backend", "cpu", "--hidden", "128", ...flags]);
  const { code } = await child.ended;
  return { code, ...child.output };
}

const reportsOf = (stdout: string): Report[] =>
  stdout.trim().split("\n").filter((line) => line !== "").map((line) => JSON.parse(line) as Report);
const total = (numbers: number[]): number => numbers.reduce((a, b) => a + b, 0);

test("demo: every mode gives the dense layer's bits", bounded, async () => {
  const run = await demo("--json", "--ranks", "4", "--tokens", "24");
  assertEquals([run.code, run.stderr], [0, ""]);
  const reports = reportsOf(run.stdout);
  assertEquals(reports.map(({ mode }) => mode), ["bf16", "fp8", "low-latency"]);
  for (const report of reports) {
    assert(report.ok);
    assertEquals([report.tokens, report.wrongTokens, report.firstWrong], [96, 0, null]);
    assertEquals(total(report.loadPerExpert), 96 * 8);
    assertEquals(total(report.traffic.flat()), report.rowsMoved);
  }
  const [bf16, fp8, lowLatency] = reports as [Report, Report, Report];
  assert(bf16.rowsMoved < fp8.rowsMoved, "the rank layout sends a token once for each rank");
  assertEquals(bf16.bytesMoved, bf16.rowsMoved * 2 * 128);
  assertEquals([fp8.rowsMoved, lowLatency.rowsMoved], [96 * 8, 96 * 8]);
  assertEquals(fp8.bytesMoved, fp8.rowsMoved * (128 + 4));
  assertEquals(fp8.checksum, lowLatency.checksum, "both cast alike and sum alike");
});

test("demo: processes give the same as one process", bounded, async () => {
  const sizes = ["--json", "--ranks", "2", "--tokens", "12"];
  const [one, many] = [await demo(...sizes), await demo(...sizes, "--processes")];
  assertEquals([one.code, many.code, many.stderr], [0, 0, ""]);
  const of = (run: { stdout: string }) => reportsOf(run.stdout).map(({ mode, ok, checksum }) => [mode, ok, checksum]);
  assertEquals(of(many), of(one));
  assertEquals(reportsOf(many.stdout).map(({ processes }) => processes), [2, 2, 2]);
});

test("demo: experts that do not divide, ranks with different numbers of tokens", bounded, async () => {
  const run = await demo("--json", "--ranks", "3", "--tokens", "11", "--hidden", "144");
  assertEquals([run.code, reportsOf(run.stdout).every(({ ok }) => ok)], [0, true]);
});

test("demo: a wrong byte is found, in every mode", bounded, async () => {
  const run = await demo("--json", "--ranks", "2", "--tokens", "8", "--corrupt");
  assertEquals(run.code, 1);
  for (const { ok, wrongTokens, firstWrong } of reportsOf(run.stdout)) {
    assertEquals(ok, false);
    assert(wrongTokens >= 1 && wrongTokens <= 2, "each of two ranks received one wrong row");
    assertEquals(typeof firstWrong?.word, "string");
  }
  assertMatch(run.stderr, /Normal BF16, rank layout is wrong, first at token \d+ of rank \d/);
});

test("demo: people see times, load, traffic, and which token is wrong", bounded, async () => {
  const run = await demo("--mode", "bf16", "--ranks", "2", "--tokens", "8", "--corrupt");
  assertEquals(run.code, 1);
  assertMatch(run.stdout, /time +dispatch +[\d.]+ m?s +experts +[\d.]+ m?s +combine/);
  assertMatch(run.stdout, /wrong +\d wrong tokens?, first token \d+ of rank \d \(".+"\): channel \d+ is \S+, must be/);
  assertMatch(run.stdout, /224-255 {2}[ ▁▂▃▄▅▆▇█]{32} /);
  assertMatch(run.stdout, /from 1 {2}[░▒▓█]{2} +\d+/);
  assert(!run.stdout.includes("\x1b"), "no colours in a pipe");
  assert(run.stdout.split("\n").every((line) => line.length <= 120));
});

test("demo: flags that make no sense end with 2 and say why", bounded, async () => {
  const cases: [string[], RegExp][] = [
    [["--mode", "fp4"], /--mode is "fp4", needs bf16, fp8, low-latency or all/],
    [["--ranks", "0"], /--ranks is "0", needs a whole number from 1 to 64/],
    [["--hidden", "100"], /--hidden is 100, needs a multiple of 16/],
    [["--text", "nowhere.txt"], /--text: cannot read nowhere.txt/],
    [["--frobnicate"], /frobnicate/],
  ];
  for (const [flags, message] of cases) {
    const run = await demo(...flags);
    assertEquals([run.code, run.stdout], [2, ""]);
    assertMatch(run.stderr, message);
  }
  const help = await demo("--help");
  assertEquals(help.code, 0);
  assertMatch(help.stdout, /--processes/);
});

test("demo: text becomes words, numbers and signs", () => {
  assertEquals(tokenize("Zwei  Wörter, x_1 (€5)!\n"), ["Zwei", "Wörter", ",", "x_1", "(", "€", "5", ")", "!"]);
  assertEquals(tokenize(" \n"), []);
});
