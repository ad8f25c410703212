/**
 * `--processes`: the same demo, a process for each rank, started by `scripts/launch.ts`. In: the command line. Out: the exit
 * code of the job; the ranks' output goes where this process's goes. Called by `scripts/demo.ts`.
 */
import { spawn } from "node:child_process";
import process from "node:process";
import { fileURLToPath } from "node:url";
import type { DemoOptions } from "./options.ts";

/** Set for the ranks: which of their outputs end at a terminal, as they themselves only see a pipe. */
const TERMINAL = "DEEPEP_DEMO_TERMINAL";

/** Whether standard output or standard error is seen on a terminal, perhaps through the launcher. */
export function onTerminal(stream: "stdout" | "stderr"): boolean {
  return process[stream].isTTY === true || (process.env[TERMINAL] ?? "").includes(stream);
}

/** Starts the ranks and waits for them. */
export function runProcesses(options: DemoOptions, args: readonly string[]): Promise<number> {
  const path = (name: string) => fileURLToPath(new URL(`../${name}`, import.meta.url));
  const deno = "Deno" in globalThis ? ["run", "-A"] : [];
  const streams = (["stdout", "stderr"] as const).filter(onTerminal).join(",");
  const launch = ["--ranks", String(options.ranks), "--no-prefix", path("demo.ts"), ...args];
  const child = spawn(process.execPath, [...deno, path("launch.ts"), ...launch], {
    stdio: "inherit",
    env: { ...process.env, [TERMINAL]: streams },
  });
  process.on("SIGINT", () => {}); // a terminal sends it to the launcher too, which ends the ranks
  process.on("SIGTERM", () => child.kill("SIGTERM"));
  return new Promise((resolve, reject) => {
    child.once("error", reject);
    child.once("exit", (code, signal) => resolve(code ?? (signal === "SIGINT" ? 130 : 143)));
  });
}
