/**
 * What ranks hear when a call needs more than there is, of rows or of slots: who needs how much of what, in fields and in words,
 * with the buffer good for the next call. In: buffers of a backend. Out: tests. Called by failure_cases.ts.
 */
import { test } from "node:test";
import { assert, assertEquals, assertMatch, assertStringIncludes } from "@std/assert";
import { type EpBuffer, EpError } from "@deepep/deepep";
import { constants } from "../../lib/ffi/abi.ts";
import { type ranksOf, reasonOf } from "./ranks.ts";

const rows = (b: EpBuffer) => b.tensor("bf16", [2, 16], new Float32Array(32).fill(b.rank + 1));
const topk = (b: EpBuffer, ...entries: number[]) => b.tensor("i32", [2, 2], Int32Array.from(entries));

/** One token of each of three ranks to an expert of its own, which must work. Rank r owns experts 3r to 3r + 2, of 8. */
async function fits(b: EpBuffer): Promise<void> {
  assertEquals([b.firstLocalExpert, b.numLocalExperts], [3 * b.rank, [3, 3, 2][b.rank]]);
  using x = rows(b), topkIdx = topk(b, b.firstLocalExpert, -1, -1, -1);
  using recv = await b.dispatch(x, { topkIdx });
  assertEquals([b.failed, recv.numTokens], [false, 1]);
}

/** Asserts the code, the rank, what it needs and what it has, and the words. */
function assertLimit(
  reason: Error,
  { seen, expected, words }: { seen: number; expected: number; words: string },
): void {
  assert(reason instanceof EpError, String(reason));
  assertEquals([reason.code, reason.peer, reason.seen, reason.expected], ["capacity", 1, seen, expected]);
  assertStringIncludes(reason.message, words);
}

/** Registers the cases. */
export function limitCases(ranks: ReturnType<typeof ranksOf>, lowLatency: boolean): void {
  // Three ranks' tokens to experts 3 and 4, then 3: as rows 6 tokens, or groups of 6 and 3, padded to 8 and 4.
  for (const [layout, need] of [["rank", 6], ["expert", 12]] as const) {
    for (const cpuSync of [true, false]) {
      test(`a rank that would receive more than it holds is named by all, ${layout} layout, cpuSync ${cpuSync}`, async () => {
        await ranks(3, { maxRecvTokens: need - 1 }, async (b) => {
          using x = rows(b), topkIdx = topk(b, 3, 4, 3, -1);
          const call = async () => {
            using recv = await b.dispatch(x, { topkIdx, layout, cpuSync, expertAlignment: 4 });
            await recv.event;
          };
          const words = `Cannot dispatch: rank 1 would receive ${need} rows, a buffer holds ${need - 1}`;
          assertLimit(await reasonOf(call()), { seen: need, expected: need - 1, words });
          await fits(b);
        });
      });
    }
  }

  if (lowLatency) {
    test("a rank whose expert would receive more than it holds is named by all", async () => {
      await ranks(3, { maxLowLatencyTokensPerRank: 2 }, async (b, rank) => {
        using x = rows(b), topkIdx = topk(b, 4, 4, 4, rank === 2 ? 4 : 5);
        using recv = b.lowLatencyDispatch(x, { topkIdx, fp8: false });
        const words = "rank 1 would receive 10 rows for expert 4, a buffer holds 6 an expert";
        assertLimit(await reasonOf(recv.received()), { seen: 10, expected: 6, words });
        await fits(b);
      });
    });
  }

  for (const layout of ["rank", "expert"] as const) {
    test(`a combine of fewer rows than were received, where the host does not know how many, reads none, ${layout} layout`, async () => {
      await ranks(3, {}, async (b, rank) => {
        using x = rows(b), topkIdx = topk(b, 3, 4, 3, -1); // all to rank 1
        using topkWeights = b.tensor("f32", [2, 2], new Float32Array(4).fill(1));
        using recv = await b.dispatch(x, { topkIdx, topkWeights, layout, cpuSync: false });
        const need = layout === "rank" ? 6 : 9;
        const y = (n: number) => b.tensor("bf16", [n, 16], new Float32Array(n * 16).fill(1));
        const weights = (n: number) =>
          b.tensor(
            "f32",
            layout === "rank" ? [n, 2] : [n],
            new Float32Array(n * 2).fill(1).subarray(0, layout === "rank" ? 2 * n : n),
          );
        for (const [numY, numWeights] of [[need - 1, 0], [need, need - 1], [1, need]] as const) {
          using few = y(numY), w = weights(Math.max(1, numWeights));
          const short = rank === 1, { handle } = recv;
          using enough = y(need), all = weights(need);
          using out = await b.combine(
            short ? few : enough,
            handle,
            numWeights > 0 ? { topkWeights: short ? w : all } : {},
          );
          const reason = await reasonOf(out.event);
          assert(reason instanceof EpError, String(reason));
          if (short) {
            const seen = numWeights > 0 ? Math.min(numY, numWeights) : numY;
            assertEquals([reason.code, reason.seen, reason.expected], ["invalidArgument", seen, need]);
            assertStringIncludes(reason.message, `x or topk_weights have ${seen} rows, the dispatch received ${need}`);
          } else {
            assertEquals([reason.code, reason.peer], ["aborted", 1]);
            assertStringIncludes(reason.message, "rank 1 refused call");
            assertStringIncludes(reason.message, "(its error: INVALID_ARGUMENT)");
          }
        }
        using none = b.tensor("bf16", [0, 16]);
        assertMatch(String(await reasonOf(b.combine(none, recv.handle))), /y is .*\[0, 16\].*not known/);
        using enough = y(need);
        using out = await b.combine(enough, recv.handle);
        await out.event;
        assertEquals(b.failed, false);
      });
    });
  }

  if (lowLatency) {
    test("a combine that is refused forgets nobody who still reads the slot", async () => {
      await ranks(2, {}, async (b, rank, group) => {
        const y = (n: number, value: number) => b.tensor("bf16", [n, 16], new Float32Array(n * 16).fill(value));
        using x = y(4, 1), topkIdx = b.tensor("i32", [4, 2], Int32Array.from([0, -1, 0, -1, 0, -1, 0, -1])); // all to rank 0
        using topkWeights = b.tensor("f32", [4, 2], new Float32Array(8).fill(1));
        using first = b.lowLatencyDispatch(x, { topkIdx, fp8: false });
        const { handle } = first, { shape } = handle.expertOutput();
        using threes = b.tensor("bf16", shape, new Float32Array(shape[0]! * shape[1]! * 16).fill(3));
        using sums = b.lowLatencyCombine(threes, { topkIdx, topkWeights, handle, recvHook: true });
        if (rank === 0) {
          await sums.received();
          first.release(); // and the slot is taken again, while rank 1 has yet to read it
        }
        using recv = await b.dispatch(x, { topkIdx, cpuSync: false });
        using few = y(rank === 0 ? 1 : 8, 5), enough = y(8, 7);
        using refused = await b.combine(few, recv.handle);
        assert((await reasonOf(refused.event)) instanceof EpError);
        const copies = async () => {
          using out = await b.combine(enough, recv.handle);
          await out.event;
        };
        if (rank === 0) {
          const copied = copies(); // waits for rank 1
          await group.barrier();
          await copied;
        } else {
          await new Promise((resolve) => setTimeout(resolve, 200));
          await sums.received();
          assertEquals([...new Set(await sums.x.read() as Uint16Array)], [0x4040]); // 3
          await group.barrier();
          await copies();
        }
      });
    });
  }

  if (lowLatency) {
    test("a combine that others do not make forgets nobody who still reads what was announced before", async () => {
      await ranks(3, {}, async (b, rank, group) => {
        using x = b.tensor("bf16", [4, 16], new Float32Array(64).fill(1));
        using topkIdx = b.tensor("i32", [4, 2], Int32Array.from([0, -1, 0, -1, 0, -1, 0, -1])); // all to rank 0
        using topkWeights = b.tensor("f32", [4, 2], new Float32Array(8).fill(1));
        using recv = b.lowLatencyDispatch(x, { topkIdx, fp8: false });
        const { handle } = recv,
          fill = (bits: number) => {
            const y = handle.expertOutput(); // waits for readers
            b.write(y, new Uint16Array(y.shape.reduce((p, c) => p * c)).fill(bits));
            return y;
          };
        const y = fill(0x4040); // 3
        using sums = b.lowLatencyCombine(y, { topkIdx, topkWeights, handle, recvHook: true });
        if (rank !== 2) await sums.received();
        await group.barrier();
        if (rank === 0) {
          using again = b.lowLatencyCombine(y, { topkIdx, topkWeights, handle });
          const done = reasonOf(again.received());
          await group.barrier();
          const reason = await done;
          assert(reason instanceof EpError && reason.code === "mismatch", String(reason));
          fill(0x40e0); // 7
          await group.barrier();
        } else {
          const other = rank === 1 ? reasonOf(b.barrier()) : undefined;
          await group.barrier();
          if (rank === 2) {
            await new Promise((resolve) => setTimeout(resolve, 200));
            await sums.received();
            assertEquals([...new Set(await sums.x.read() as Uint16Array)], [0x4040]);
          }
          assert((await (other ?? reasonOf(b.barrier()))) instanceof EpError);
          await group.barrier();
        }
      });
    });
  }

  test("what no program can mean is refused at the border", async () => {
    await ranks(1, {}, async (b) => {
      const { core } = b, far = 2n ** 64n - 16n;
      using x = rows(b), topkIdx = topk(b, 0, 1, 2, 3);
      const refused = async (call: () => unknown, words: string) => {
        const reason = await reasonOf((async () => await call())());
        assert(reason instanceof EpError && reason.code === "invalidArgument", String(reason));
        assertStringIncludes(reason.message, words);
      };
      const copy = (dst: bigint, src: bigint, bytes: number) => () => core.copy(dst, src, bytes);
      await refused(copy(far, x.address, 32), "dst is at address 0xfffffffffffffff0, from where 32 bytes go past");
      await refused(copy(x.address, far, 32), "src is at address 0xfffffffffffffff0, from where 32 bytes go past");
      await refused(copy(0n, x.address, 32), "dst is 0");
      await refused(copy(x.address + 16n, x.address, 32), "overlap");
      copy(x.address, x.address, 0)();
      copy(x.address + 32n, x.address, 32)();
      const { launch } = core;
      const altered = (change: object, flags = 0) => {
        core.launch = (name, args, values, operation) => {
          const fields = { ...operation.fields, flags: operation.fields.flags | flags };
          launch.call(core, name, args, [...values, change as unknown as typeof values[0]], { ...operation, fields });
        };
      };
      const dispatch = () => b.dispatch(x, { topkIdx });
      for (const stride of [2n ** 60n, 2n ** 64n - 16n]) {
        altered({ x_stride: stride });
        await refused(dispatch, `2 rows, ${stride} bytes apart, go past the end of the address space`);
      }
      altered({}, constants.FLAG.ZERO_PADDING[0]);
      await refused(dispatch, "ZERO_PADDING belongs to the expert layout");
      altered({}, constants.FLAG.NO_CPU_SYNC[0]);
      await refused(dispatch, "but NO_CPU_SYNC leaves the counts on the device");
      core.launch = launch;
      using again = await dispatch();
      assertEquals(again.numTokens, 2);
    });
  });

  test("counts per expert beside topkIdx, and a layout, are not looked at", async () => {
    await ranks(2, {}, async (b) => {
      using x = rows(b), topkIdx = topk(b, 0, 4, 5, -1), zeros = b.tensor("i32", [8], new Int32Array(8));
      using isTokenInRank = b.tensor("bool", [2, 2], new Uint8Array(4));
      const { core } = b, { launch } = core;
      core.launch = (name, args, values, operation) => {
        const given = name === "deepep_dispatch" ? [{ num_tokens_per_expert: zeros.address }] : [];
        launch.call(core, name, args, [...values, ...given as unknown as typeof values], operation);
      };
      const dispatchLayout = { isTokenInRank, numTokensPerExpert: zeros };
      using recv = await b.dispatch(x, { topkIdx, dispatchLayout, layout: "expert" });
      assertEquals([...recv.numTokensPerExpert], b.rank === 0 ? [2, 0, 0, 0] : [2, 2, 0, 0]);
    });
  });

  test("a rank without a free slot hears who holds them", async () => {
    await ranks(1, { numSlots: 2 }, async (b) => {
      using x = rows(b), topkIdx = topk(b, 0, 7, 2, 3);
      using _first = await b.dispatch(x, { topkIdx });
      using second = lowLatency ? b.lowLatencyDispatch(x, { topkIdx }) : await b.dispatch(x, { topkIdx });
      const mode = lowLatency ? "low-latency " : "";
      const refused = async (words: RegExp) => {
        const reason = await reasonOf(b.dispatch(x, { topkIdx }));
        assert(reason instanceof EpError && reason.code === "noFreeSlot", String(reason));
        assertMatch(reason.message, words);
      };
      await refused(new RegExp(`all 2 slots are held by dispatch #\\d+ and ${mode}dispatch #\\d+`));
      // The library would find it as well.
      const { core } = b, { wantSlot } = core;
      core.wantSlot = () => -1;
      await refused(new RegExp(`all slots are held .*\\(slot 0 by a dispatch of .*, slot 1 by a ${mode}dispatch of `));
      core.wantSlot = wantSlot;
      second.release();
      using again = await b.dispatch(x, { topkIdx });
      assertEquals(again.numTokens, 2);
    });
  });
}
