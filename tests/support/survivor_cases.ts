/**
 * What survivors need to go on with each other: after one that they mask because it ended a call, and when one that they had
 * masked comes back. In: a backend. Out: tests.
 */
import { test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { type EpBuffer, EpError } from "@deepep/deepep";
import { struct } from "../../lib/ffi/struct.ts";
import { inject, ranksOf, reasonOf } from "./ranks.ts";
import { input, lowLatencyLayer, normalLayer, NUM_TOKENS, route } from "./small_layers.ts";
import { type BackendSubject, suite } from "./suite.ts";

const recoverStruct = struct("deepep_buffer_recover_args");

/** When the receive half of the combine that was sent before the failure is asked for. */
type Asked = "while it fails" | "after the mask" | "never";

/** A dispatch, then one of another batch and the first one's combine, both in halves: rank 2 is silent in the second dispatch. */
async function overlapped(b: EpBuffer, asked: Asked, told: () => Promise<void>): Promise<void> {
  using x = input(b), topkIdx = b.tensor("i32", [NUM_TOKENS, 2], route(b.rank));
  using topkWeights = b.tensor("f32", [NUM_TOKENS, 2], new Float32Array(2 * NUM_TOKENS).fill(1));
  const first = b.lowLatencyDispatch(x, { topkIdx, fp8: false });
  await first.received();
  if (b.rank === 2) inject(b, "LOW_LATENCY_DISPATCH", "SEND", "STALL");
  const second = b.lowLatencyDispatch(x, { topkIdx, fp8: false, recvHook: true, timeoutMs: 500 });
  const { handle } = first;
  using out = b.lowLatencyCombine(first.x, { topkIdx, topkWeights, handle, recvHook: true });
  if (b.rank !== 2) {
    const failing = [reasonOf(second.received())];
    if (asked === "while it fails") failing.push(reasonOf(out.received()));
    for (const reason of await Promise.all(failing)) {
      assert(reason instanceof EpError && reason.peer === 2, String(reason));
    }
    await told();
    if (asked === "never") first.release();
    b.maskRank(2);
    assertEquals(b.failed, false);
    if (asked === "after the mask") {
      const reason = await reasonOf(out.received());
      assert(reason instanceof EpError && reason.code === "aborted", String(reason));
      assert(reason.message.includes("was given up"), reason.message);
    }
  }
  first.release();
  second.release();
}

/** Registers the cases. */
export function runSurvivorCases({ name, backend, skip, skipLowLatency }: BackendSubject): void {
  const ranks = ranksOf(backend);
  suite(`${name}: survivors go on with each other, low latency`, skip || skipLowLatency, () => {
    for (const asked of ["while it fails", "after the mask", "never"] as const) {
      test(`a combine was sent before the failure, and is asked for ${asked}`, async () => {
        let failing = 2;
        const all = Promise.withResolvers<void>();
        const told = (): Promise<void> => {
          if (--failing === 0) all.resolve();
          return all.promise;
        };
        await ranks(3, { timeoutMs: 3000 }, async (b, rank) => {
          await overlapped(b, asked, told);
          if (rank === 2) return;
          // Each copies into regions that the peer may have read: in both slots, twice.
          for (let i = 0; i < 4; i++) await copyingLayer(b, [2]);
          for (let i = 0; i < 4; i++) await normalLayer(b, [2]);
        });
      });
    }
  });

  suite(`${name}: survivors go on with each other`, skip, () => {
    test("a peer that made as many calls alone is taken in again without a recovery", async () => {
      await ranks(2, { timeoutMs: 3000, numSlots: 1 }, async (b, rank, group) => {
        await normalLayer(b);
        b.maskRank(1 - rank);
        await normalLayer(b, [1 - rank]);
        await group.barrier();
        b.unmaskRank(1 - rank);
        for (let i = 0; i < 2; i++) await normalLayer(b);
        if (!skipLowLatency) { for (let i = 0; i < 2; i++) await copyingLayer(b, []); }
        assertEquals(b.stats().numFailures, 0);
      });
    });

    test("a late peer is waited for after a recovery far ahead", async () => {
      await ranks(2, {}, async (b, rank, group) => {
        for (let i = 0; i < 20; i++) await b.barrier();
        const epoch = 20n + 2n ** 32n - 2n ** 21n - 1n; // the last that is not refused
        b.core.call("deepep_buffer_recover", recoverStruct.pack({ epoch }), "recover");
        await group.barrier();
        if (rank === 1) await new Promise((resolve) => setTimeout(resolve, 200));
        for (let i = 0; i < 3; i++) await b.barrier();
        assertEquals(b.stats().numFailures, 0);
      });
    });
  });
}

/** A low-latency layer whose expert outputs lie elsewhere, so that they are copied in. */
async function copyingLayer(b: EpBuffer, gone: readonly number[]): Promise<void> {
  await lowLatencyLayer(b, gone, { recvHook: true, cast: true });
}
