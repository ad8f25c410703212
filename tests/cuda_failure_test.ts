/** The CUDA backend when peers are late, silent or gone, memory is given back early, and programs do anything at all. */
import { spawnSync } from "node:child_process";
import process from "node:process";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { assertEquals } from "@std/assert";
import { noCuda, noCudaLowLatency, notEmulated } from "./support/cuda.ts";
import { runFailureCases } from "./support/failure_cases.ts";
import { runMaskingCases } from "./support/masking_cases.ts";
import { runMixedCases } from "./support/mixed_cases.ts";
import { runOwnershipCases } from "./support/ownership_cases.ts";
import { suite } from "./support/suite.ts";
import { runSurvivorCases } from "./support/survivor_cases.ts";
import { runArgs } from "./support/transport.ts";
import { runWakeCases } from "./support/wake_cases.ts";

const subject = { name: "cuda", backend: "cuda", skip: noCuda, skipLowLatency: noCudaLowLatency } as const;
runFailureCases(subject);
runMaskingCases(subject);
runMixedCases(subject);
runOwnershipCases(subject);
runSurvivorCases(subject);
runWakeCases(subject);

suite("cuda: no room", notEmulated, () => {
  test("is found before anything is said to the peers, where several blocks send", { timeout: 60_000 }, () => {
    const child = fileURLToPath(new URL("./support/room_child.ts", import.meta.url));
    const env = { ...process.env, EMULATED_SMS: "8", EMULATED_LATE_MS: "1000" };
    const run = spawnSync(process.execPath, runArgs(child), { encoding: "utf8", timeout: 50_000, env });
    assertEquals(run.status, 0, run.stderr);
    const refused = "Cannot dispatch: only 1 of its 4 blocks were running after T: other work fills the device";
    const rank = [
      `10: timeout, ${refused}, failed: false`,
      "2: 4 rows",
      `64: timeout, ${refused}, failed: false`,
      "2: 4 rows",
    ];
    assertEquals(run.stdout.trim().split("\n"), [...rank, ...rank]);
  });
});
