/**
 * The gate: every check of this repository, in one command.
 *
 * In: the working tree, on a machine with Node and npm; what needs g++ or nvcc is skipped without it. Out: a line for
 * each step with its time, for each step that fails what failed and why, in few lines, the same again at the end, and last
 * the one line `N passed, N failed, N skipped`, which counts the tests of all runners and the other steps. The exit status
 * is 1 if anything failed. Steps go one after another, but for compilers: these go beside the others, one after another too
 * and with low priority, since tests measure time. `npm test` runs this with Bun.
 */

import { spawn, spawnSync } from "node:child_process";
import { existsSync, mkdirSync, rmSync, writeFileSync } from "node:fs";
import { setPriority } from "node:os";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { type Counts, countsOf, digestOf, type Runner } from "./check/report.ts";
import { hasSources } from "./native/compile.ts";
import { recipes } from "./native/recipes.ts";
import { findToolkit } from "./native/toolkit.ts";

const root = fileURLToPath(new URL("..", import.meta.url));
const bin = (name: string): string => join(root, "node_modules/.bin", name);
const [bun, deno, tsc] = ["bun", "deno", "tsc"].map(bin) as [string, string, string];
const importMap = ["--import-map", "tests/support/import_map.json"];
/** Bun gives a test 5 s unless told otherwise, which a busy machine of two cores can need. */
const patience = ["--timeout", "60000"];
const rebuilt = join("build", "native");
/** The longest run of a step: only what hangs takes so long, even on a busy machine. Compilers get what the others leave. */
const PATIENCE_S = 600, COMPILER_PATIENCE_S = 1800;
/** Of compilers: what is not run by tests. */
const LOW_PRIORITY = 15;
/** Where the whole output of steps that fail is kept. */
const kept = join("build", "check");

interface Step {
  readonly name: string;
  readonly command: readonly string[];
  /** Whether the step is a test runner, whose tests are counted instead of the step. */
  readonly tests?: Runner;
  readonly env?: Readonly<Record<string, string>>;
  /** Why the step cannot be taken here. */
  readonly skip?: string | false;
  /** Whether it goes beside those that are no compilers. */
  readonly compiles?: true;
  /** The name of the compiler's step that must have ended before. */
  readonly after?: string;
}

const folders = ["mod.ts", "lib", "scripts", "tests", "examples"].filter((path) => existsSync(join(root, path)));

const gcc = spawnSync("g++", ["-dumpversion"], { encoding: "utf8" });
const noCompiler = gcc.status === 0 ? false : "there is no g++ here";
/** Newer compilers may warn about more than the sources were written for. */
const strict = parseInt(gcc.stdout) <= 12 ? ["--strict"] : [];

/** Why the CUDA library cannot be compiled here. */
function noCuda(): string | false {
  if (noCompiler) return noCompiler;
  if (!hasSources(recipes["cuda"]!)) return "cuda/host has no sources yet";
  const toolkit = findToolkit();
  return typeof toolkit === "string" && toolkit;
}

const steps: readonly Step[] = [
  { name: "types (tsc)", command: [tsc, "-p", "."] },
  { name: "types (deno check)", command: [deno, "check", ...importMap, ...folders] },
  { name: "lint", command: [deno, "lint"] },
  { name: "format", command: [deno, "fmt", "--check"] },
  { name: "C header is generated", command: [bun, "scripts/abi.ts", "--check"] },
  { name: "libraries are built from the sources", command: [bun, "scripts/build.ts", "--check"] },
  {
    name: "rebuild cpu",
    command: [bun, "scripts/build.ts", "--backend", "cpu", "--out", rebuilt, ...strict],
    compiles: true,
    skip: noCompiler,
  },
  {
    name: "compile cuda", // for one architecture: all of them take long
    command: [bun, "scripts/build.ts", "--backend", "cuda", "--arch", "sm_90", "--out", rebuilt, ...strict],
    compiles: true,
    skip: noCuda(),
  },
  { name: "tests (bun)", command: [bun, "test", ...patience], tests: "bun" },
  { name: "tests (deno)", command: [deno, "test", "-A", ...importMap], tests: "deno" },
  {
    name: "tests (bun, rebuilt cpu)",
    command: [bun, "test", ...patience, "cpu_test", "process_test"],
    tests: "bun",
    after: "rebuild cpu",
    skip: noCompiler,
    env: { DEEPEP_LIBRARY_CPU: join(root, rebuilt, "libdeepep_cpu.so") },
  },
  {
    name: "compile emulated cuda",
    command: [bun, "tests/emulator/build.ts", "--races"],
    compiles: true,
    skip: noCompiler,
  },
  {
    // The kernels themselves, on threads whose order is drawn; two that race end the run. Not all files, for the time they take.
    name: "tests (emulated cuda)",
    command: [
      bun,
      "test",
      ...patience,
      "cuda_test",
      "cuda_failure_test",
      "cuda_graph_test",
      "cuda_low_latency_graph",
      "cuda_order_test",
      "refusal_test",
    ],
    tests: "bun",
    after: "compile emulated cuda",
    skip: noCompiler,
    env: {
      DEEPEP_LIBRARY_CUDA: join(root, "build/emulated/libdeepep_cuda_races.so"),
      DEEPEP_CUDA_TURN_SCALES: "11",
      DEEPEP_TEST_RANDOM: "1",
      DEEPEP_TEST_REPLAYS: "10",
      EMULATED_SMS: "8",
      EMULATED_SEED: "1",
    },
  },
  { name: "examples in docs", command: [deno, "test", "-A", "--doc", ...importMap, "mod.ts"], tests: "deno" },
  { name: "examples in README", command: [deno, "check", "--doc-only", ...importMap, "README.md"] },
  { name: "docs", command: [deno, "doc", "--lint", "mod.ts"] },
  { name: "publish (dry run)", command: [deno, "publish", "--dry-run", "--allow-dirty"] },
];

/** The process groups of the steps that run. */
const running = new Set<number>();

function endRunning(groups: Iterable<number> = running): void {
  for (const group of groups) {
    try {
      process.kill(-group, "SIGKILL");
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code !== "ESRCH") throw error; // else it has just ended by itself
    }
  }
}

/** Runs a step; answers its exit status and output. Ends it, and what it started, when it takes too long. */
function run({ command, env, compiles }: Step): Promise<{ status: number; output: string }> {
  return new Promise((resolve) => {
    const [program, ...args] = command as [string, ...string[]];
    const child = spawn(program, args, {
      cwd: root,
      env: { ...process.env, NO_COLOR: "1", DENO_NO_UPDATE_CHECK: "1", DENO_NO_PROMPT: "1", ...env },
      stdio: ["ignore", "pipe", "pipe"],
      detached: true, // a group of its own, so that all of it can be ended
    });
    let output = "";
    const take = (data: Uint8Array): void => void (output += data);
    child.stdout.on("data", take);
    child.stderr.on("data", take);
    const { pid } = child; // none when it could not be started
    if (pid !== undefined) {
      running.add(pid);
      if (compiles) setPriority(pid, LOW_PRIORITY);
    }
    const seconds = compiles ? COMPILER_PATIENCE_S : PATIENCE_S;
    const timer = setTimeout(() => {
      output += `\nended after ${seconds} s\n`;
      if (pid !== undefined) endRunning([pid]);
    }, seconds * 1000);
    const end = (status: number, words = ""): void => {
      clearTimeout(timer);
      if (pid !== undefined) running.delete(pid);
      resolve({ status, output: output + words });
    };
    child.on("error", (error) => end(1, error.message));
    child.on("close", (status) => end(status ?? 1));
  });
}

/** Keeps the whole output of a step that failed; answers what to print of it. */
function failureOf(step: Step, output: string): string {
  mkdirSync(join(root, kept), { recursive: true });
  const file = join(kept, `${step.name.replace(/\W+/g, "_").replace(/_$/, "")}.txt`);
  writeFileSync(join(root, file), output);
  return [...digestOf(step.tests, output), `(all of it: ${file})`].map((line) => `    ${line}`).join("\n");
}

async function main(): Promise<number> {
  const total: Counts = { passed: 0, failed: 0, skipped: 0 };
  const failures: string[] = [];
  rmSync(join(root, kept), { recursive: true, force: true });
  const take = async (step: Step): Promise<void> => {
    if (step.skip) {
      total.skipped++;
      console.log(`skip             ${step.name}: ${step.skip}`);
      return;
    }
    const begin = performance.now();
    const { status, output } = await run(step);
    const seconds = ((performance.now() - begin) / 1000).toFixed(1);
    const counts = countsOf(step.tests, status, output);
    for (const key of ["passed", "failed", "skipped"] as const) total[key] += counts[key];
    const words = step.tests ? ` (${counts.passed} passed, ${counts.failed} failed, ${counts.skipped} skipped)` : "";
    console.log(`${counts.failed === 0 ? "ok    " : "FAILED"} ${seconds.padStart(6)} s  ${step.name}${words}`);
    if (counts.failed > 0) {
      const failure = failureOf(step, output);
      console.log(failure);
      failures.push(`FAILED ${step.name}\n${failure}`);
    }
  };
  const compiled = new Map<string, Promise<void>>();
  let compiling = Promise.resolve();
  for (const step of steps) {
    if (step.compiles) compiled.set(step.name, compiling = compiling.then(() => take(step)));
  }
  for (const step of steps) {
    if (step.compiles) continue;
    if (step.after !== undefined) await compiled.get(step.after);
    await take(step);
  }
  await compiling;
  for (const failure of failures) console.log(failure);
  console.log(`${total.passed} passed, ${total.failed} failed, ${total.skipped} skipped`);
  return total.failed === 0 ? 0 : 1;
}

for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
  process.on(signal, () => {
    endRunning();
    process.exit(1);
  });
}
const [asked] = process.argv.slice(2);
if (asked !== undefined) {
  console.log(
    "Usage: bun scripts/check.ts\n\nRuns every check of the repository, some ten minutes on two cores. It has no options.",
  );
  process.exitCode = asked === "--help" ? 0 : 2;
} else {
  process.exitCode = await main();
}
