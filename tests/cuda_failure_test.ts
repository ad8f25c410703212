/** The CUDA backend when peers are late, silent or gone, memory is given back early, and programs do anything at all. */
import { spawnSync } from "node:child_process";
import process from "node:process";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { assert, assertEquals } from "@std/assert";
import { EpError } from "@deepep/deepep";
import { noCuda, noCudaLowLatency, notEmulated } from "./support/cuda.ts";
import { runFailureCases } from "./support/failure_cases.ts";
import { runMaskingCases } from "./support/masking_cases.ts";
import { runMixedCases } from "./support/mixed_cases.ts";
import { runOwnershipCases } from "./support/ownership_cases.ts";
import { ranksOf, reasonOf } from "./support/ranks.ts";
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

// On a GPU a stream makes the host wait before.
suite("cuda: operations that have not ended", notEmulated, () => {
  test("are at most so many", { timeout: 60_000 }, async () => {
    await ranksOf("cuda")(2, { timeoutMs: 30_000 }, async (b, rank, group) => {
      const barriers = (count: number) => Array.from({ length: count }, () => b.barrier());
      const first = rank === 0 ? barriers(2048) : [];
      const reason = rank === 0 ? await reasonOf(Promise.resolve().then(() => b.barrier())) : undefined;
      await group.barrier(); // one thread has both ranks
      await Promise.all(rank === 0 ? first : barriers(2048));
      await b.barrier();
      if (rank !== 0) return;
      assert(reason instanceof EpError && reason.code === "outOfMemory", String(reason));
      assert(reason.message.includes("2048 operations of the buffer have not ended yet"), reason.message);
    });
  });
});
