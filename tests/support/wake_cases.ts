/**
 * Wake-up by callback from end to end: operations that take longer than polling lasts end for their waiters all the same,
 * sooner than timers would tell, and neither keep the process alive nor end it too early. In: a backend.
 * Out: tests.
 */
import { spawnSync } from "node:child_process";
import process from "node:process";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { assertEquals } from "@std/assert";
import { inject, ranksOf } from "./ranks.ts";
import { type BackendSubject, suite } from "./suite.ts";
import { runArgs } from "./transport.ts";

/** Registers the cases. */
export function runWakeCases({ name, backend, skip }: BackendSubject): void {
  suite(`${name}: waking`, skip, () => {
    for (const wake of ["poll", "callback"] as const) {
      test(`long operations end for those who wait (${wake})`, async () => {
        const turns = Array.from({ length: 5 }, () => Promise.withResolvers<void>());
        await ranksOf(backend)(2, { wake }, async (b, rank) => {
          for (const turn of turns) {
            if (rank === 1) await turn.promise;
            inject(b, "BARRIER", "NOTIFY", "DELAY", 10_000);
            const event = b.barrier();
            if (rank === 0) assertEquals(event.done, false); // rank 1 has not even called
            turn.resolve();
            await event;
            assertEquals(event.done, true);
          }
        });
      });
      test(`the process ends with its work, not before and not never (${wake})`, () => {
        const file = fileURLToPath(new URL("./wake_child.ts", import.meta.url));
        const run = spawnSync(process.execPath, [...runArgs(file), wake, backend], {
          encoding: "utf8",
          timeout: 60_000,
        });
        assertEquals([run.status, run.stdout.trim()], [0, "waited"], run.stderr);
      });
    }
  });
}
