/**
 * The CPU backend with each rank in a process: the same cases over really shared memory, and what happens to the others
 * when a rank is killed in the middle of a call.
 */
import { existsSync, readdirSync } from "node:fs";
import { describe, test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { EpError } from "@deepep/deepep";
import { runCombineCases, runDispatchCases, runLowLatencyCases } from "./support/cases.ts";
import { freePort, processWorlds } from "./support/drivers.ts";
import { processRank } from "./support/transport.ts";

const subject = { name: "cpu in processes", newWorld: processWorlds("cpu"), numRandom: 1 };
runDispatchCases(subject);
runCombineCases(subject);
runLowLatencyCases(subject);

const options = { numRanks: 3, hidden: 16, numExperts: 6, numTopk: 2, maxTokensPerRank: 2, backend: "cpu" as const };
const input = (rank: number) => ({
  numTokens: 2,
  rowBytes: 32,
  x: new Uint8Array(64).fill(rank),
  topkIdx: Int32Array.of(0, 2, 4, 1), // every token goes to two of the three ranks
});

describe("a process that is killed", () => {
  for (const phase of ["notify", "send", "arrive"] as const) {
    test(`in ${phase} of a dispatch: the others are told who, at once; nothing is left behind`, async () => {
      const before = existsSync("/dev/shm") ? readdirSync("/dev/shm").length : 0;
      const port = await freePort(), secret = crypto.randomUUID();
      const ranks = await Promise.all(
        [0, 1, 2].map((rank) => processRank({ rank, size: 3, port, secret, options })),
      );
      await Promise.all(ranks.map((r, rank) => r.call("dispatch", [0, input(rank), { numTopk: 2 }, -1])));
      await Promise.all(ranks.map((r) => r.call("release", [0])));
      // Late enough in the phase for the others to be waiting, then gone as kill -9 makes it.
      await ranks[1]!.call("delay", [{ op: "dispatch", phase, delayUs: 2_000_000 }]);
      const calls = ranks.map((r, rank) =>
        r.call("dispatch", [1, input(rank), { numTopk: 2 }, -1]).then(() => null, (e) => e)
      );
      setTimeout(() => ranks[1]!.process.kill("SIGKILL"), 300);
      const began = performance.now(), reasons = await Promise.all(calls);
      // The deadline of the waits is 20 s; a dead process is seen long before it.
      assert(performance.now() - began < 10_000);
      if (phase === "arrive") {
        // It had pushed its rows and said so: this call needs nothing more of it, the next one does.
        assertEquals([reasons[0], reasons[2]], [null, null]);
        await Promise.all([0, 2].map((rank) => ranks[rank]!.call("release", [1])));
        const next = [0, 2].map((rank) =>
          ranks[rank]!.call("dispatch", [3, input(rank), { numTopk: 2 }, -1]).then(() => null, (e) => e)
        );
        [reasons[0], reasons[2]] = await Promise.all(next);
      }
      for (const rank of [0, 2]) {
        const reason = reasons[rank];
        assert(reason instanceof EpError, `rank ${rank}: ${reason}`);
        assert(reason.code === "peerLost" || reason.code === "aborted", reason.code);
        assertEquals(reason.peer, 1, reason.message);
      }
      const rest = [ranks[0]!, ranks[2]!];
      await Promise.all(rest.map((r) => r.call("recover", [[1]])));
      const again = await Promise.all(
        [0, 2].map((rank) =>
          ranks[rank]!.call("dispatch", [2, input(rank), { numTopk: 2 }, -1]) as Promise<
            { output: { numTokensPerRank: Int32Array } }
          >
        ),
      );
      for (const { output } of again) assertEquals(output.numTokensPerRank[1], 0);
      await Promise.all(rest.map((r) => r.close()));
      if (existsSync("/dev/shm")) assertEquals(readdirSync("/dev/shm").length, before);
    });
  }
});
