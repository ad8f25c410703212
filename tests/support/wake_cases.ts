/**
 * Wake-up by callback from end to end: operations that take longer than polling lasts end for their waiters all the same,
 * sooner than timers would tell, and neither keep the process alive nor end it too early.
 */
import { spawnSync } from "node:child_process";
import process from "node:process";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { assertEquals } from "@std/assert";
import { constants } from "../lib/ffi/abi.ts";
import { struct } from "../lib/ffi/struct.ts";
import { withRanks } from "./support/ranks.ts";
import { runArgs } from "./support/transport.ts";

const injectStruct = struct("deepep_inject_args");

for (const wake of ["poll", "callback"] as const) {
  test(`long operations end for those who wait (${wake})`, async () => {
    await withRanks(2, { wake }, async (b) => {
      for (let i = 0; i < 5; i++) {
        injectStruct.pack({
          op: constants.OP.BARRIER[0],
          phase: constants.PHASE.NOTIFY[0],
          action: constants.INJECT.DELAY[0],
          delay_us: 10_000,
          count: 1,
        });
        b.core.call("deepep_inject", injectStruct, "inject");
        const event = b.barrier();
        assertEquals(event.done, false);
        await event;
        assertEquals(event.done, true);
      }
    });
  });
  test(`the process ends with its work, not before and not never (${wake})`, () => {
    const file = fileURLToPath(new URL("./support/wake_child.ts", import.meta.url));
    const run = spawnSync(process.execPath, [...runArgs(file), wake], { encoding: "utf8", timeout: 30_000 });
    assertEquals([run.status, run.stdout.trim()], [0, "waited"], run.stderr);
  });
}
