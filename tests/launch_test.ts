/** scripts/launch.ts: variables, output, exit codes, signals, and that nothing stays behind. */
import process from "node:process";
import { test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { bounded, type Child, startChild, until } from "./support/group_worlds.ts";

const RANK = new URL("support/group_child.ts", import.meta.url).pathname;
const launch = (ranks: number, args: string[], options: string[] = [], env: Record<string, string> = {}): Child =>
  startChild("scripts/launch.ts", ["--ranks", `${ranks}`, ...options, RANK, ...args], env);
const linesOf = (text: string): string[] => text.split("\n").filter((line) => line !== "");

/** The ranks' process ids, when all have said "ready". */
async function readyPids(job: Child, ranks: number): Promise<number[]> {
  const pids = (): number[] => [...job.output.stdout.matchAll(/ready (\d+)/g)].map((match) => Number(match[1]));
  await until(() => pids().length === ranks, `${ranks} ranks to be ready: ${job.output.stdout}${job.output.stderr}`);
  return pids();
}

const isAlive = (pid: number): boolean => {
  try {
    return process.kill(pid, 0);
  } catch {
    return false;
  }
};

test("launch: ranks find each other through the environment", bounded, async () => {
  const job = launch(4, ["join", "gather"]);
  assertEquals(await job.ended, { code: 0, signal: null });
  const said = linesOf(job.output.stdout).filter((line) => line.includes("local")).sort();
  assertEquals(said, [0, 1, 2, 3].map((rank) => `[${rank}] rank ${rank} of 4, local ${rank}: 0,1,2,3`));
  assertEquals(job.output.stderr, "");
});

test("launch: variables, arguments and options of the runtime are passed on", bounded, async () => {
  const names = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
  ];
  const outer = { TORCHELASTIC_RUN_ID: "x", DEEPEP_PORT: "5", DEEPEP_SECRET: "kept" };
  const job = launch(
    1,
    ["env", ...names, "DEEPEP_PORT", "DEEPEP_SECRET"],
    ["--master-port=4321", "--no-prefix"],
    outer,
  );
  await job.ended;
  assertEquals(linesOf(job.output.stdout).map((line) => line.split("=")[1]!), [
    ..."0 1 0 1 127.0.0.1 4321".split(" "),
    "",
    "",
    "kept",
  ]);
  const secrets = launch(2, ["env", "DEEPEP_SECRET"], ["--no-prefix"]);
  await secrets.ended;
  const [one, two, ...rest] = linesOf(secrets.output.stdout);
  assert(one === two && rest.length === 0 && /^DEEPEP_SECRET=[0-9a-f]{64}$/.test(one!), secrets.output.stdout);
  const flag = "Bun" in globalThis ? "--smol" : "--no-prompt";
  const args = launch(1, ["args", "--ranks", "9", "", "a b"], ["--runtime-arg", flag]);
  await args.ended;
  assertEquals(args.output.stdout, '[0] ["--ranks","9","","a b"]\n');
});

test("launch: output comes by whole lines, on the stream it was written to", bounded, async () => {
  const job = launch(2, ["lines"]);
  assertEquals((await job.ended).code, 0);
  for (const rank of [0, 1]) {
    const mine = linesOf(job.output.stdout).filter((line) => line.startsWith(`[${rank}]`));
    assertEquals(mine, ["one", "two", "", "ü", "end"].map((text) => `[${rank}] ${text}`));
  }
  assertEquals(linesOf(job.output.stderr).sort(), ["[0] to stderr", "[1] to stderr"]);
  const bare = launch(1, ["lines"], ["--no-prefix"]);
  await bare.ended;
  assertEquals(bare.output.stdout, "one\ntwo\n\nü\nend");
});

test("launch: much output of many ranks is complete and unmixed", bounded, async () => {
  const job = launch(12, ["many", "x".repeat(40)]);
  assertEquals((await job.ended).code, 0);
  const next = new Array<number>(12).fill(0);
  for (const line of linesOf(job.output.stdout)) {
    const match = /^\[(\d+)\] x{40} (\d+)$/.exec(line);
    const rank = Number(match?.[1] ?? -1);
    assertEquals(Number(match?.[2]), next[rank], line);
    next[rank] = next[rank]! + 1;
  }
  assertEquals(next, new Array<number>(12).fill(20_000));
  assertEquals(job.output.stderr, "");
});

test("launch: the first rank to fail ends the others, is named, and gives the exit code", bounded, async () => {
  const cases: [string, number, string][] = [
    ["7", 7, "it exited with code 7"],
    ["SIGKILL", 137, "it was ended by SIGKILL"],
    ["SIGABRT", 134, "it was ended by SIGABRT"],
  ];
  for (const [how, code, text] of cases) {
    const job = launch(3, ["fail", "1", how]);
    const said = `launch: rank 1 failed first: ${text}; ending 2 others\n`;
    await until(() => job.output.stderr.includes(said), `the launcher to say so: ${job.output.stderr}`);
    const failed = performance.now();
    assertEquals(await job.ended, { code, signal: null });
    assert(performance.now() - failed < 4500, "the others were not ended by SIGTERM");
  }
});

test("launch: a rank that does not end by SIGTERM is killed five seconds later", bounded, async () => {
  const job = launch(2, ["stubborn"]);
  const pids = await readyPids(job, 2);
  const started = performance.now();
  process.kill(pids[0]!, "SIGKILL");
  assertEquals((await job.ended).code, 137);
  const took = performance.now() - started;
  assert(took > 4500 && took < 9000, `${took} ms`);
  assertEquals(pids.map(isAlive), [false, false]);
});

test("launch: signals are passed on to every rank, once", bounded, async () => {
  for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
    const job = launch(2, ["signals"]);
    await readyPids(job, 2);
    process.kill(job.process.pid!, signal); // Deno's ChildProcess.kill would report the signal as the end
    const { code, signal: ended } = await job.ended;
    assert(code === 40 || code === 41, `${signal}: ${code} ${ended}\n${job.output.stdout}${job.output.stderr}`);
    for (const rank of [0, 1]) {
      const got = linesOf(job.output.stdout).filter((line) => line === `[${rank}] got ${signal}`);
      assertEquals(got.length, 1, job.output.stdout);
    }
  }
});

test("launch: no rank outlives a launcher that is killed", bounded, async () => {
  const job = launch(2, ["signals"]);
  const pids = await readyPids(job, 2);
  job.process.kill("SIGKILL");
  await until(() => !pids.some(isAlive), "the ranks to end");
});

test("launch: a command line that makes no sense, a script that is not there, and --help", bounded, async () => {
  const run = async (...args: string[]): Promise<[number | null, Child["output"]]> => {
    const child = startChild("scripts/launch.ts", args);
    return [(await child.ended).code, child.output];
  };
  const wrong: [string[], string][] = [
    [[], "--ranks is missing"],
    [["--ranks", "0", "x.ts"], '--ranks is "0", expected a whole number from 1 to 4096'],
    [["-n", "2"], "the script is missing"],
    [["-n"], "-n needs a value"],
    [["-n", "1", "--runtime", "node", "x.ts"], '--runtime is "node", expected bun or deno'],
    [["--master-port", "70000"], '--master-port is "70000"'],
    [["--what"], "--what is not an option"],
  ];
  for (const [args, text] of wrong) {
    const [code, { stderr }] = await run(...args);
    assertEquals(code, 2);
    assert(stderr.startsWith(`launch: ${text}`) && stderr.includes("Usage: launch.ts"), stderr);
  }
  const [code, { stdout }] = await run("--help");
  assert(code === 0 && stdout.startsWith("Usage: launch.ts --ranks N"));
  const [missing, { stderr }] = await run("-n", "2", "no_such_script.ts");
  assert(missing === 1 && stderr.includes("failed first"), stderr);
});
