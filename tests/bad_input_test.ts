/**
 * What bad input gets: a typed error that names the values, on the rank that gave it and on the others where they are
 * concerned, with nothing corrupted and the buffer good for the next call. Peers that die or stay away are in
 * failure_test.ts and process_test.ts, calls that need more than there is in support/limit_cases.ts, strangers on the
 * rendezvous port in group_tcp_test.ts.
 */
import { existsSync } from "node:fs";
import process from "node:process";
import { describe, test } from "node:test";
import { assert, assertEquals, assertRejects, assertThrows } from "@std/assert";
import {
  type DispatchHandle,
  EpBuffer,
  EpError,
  type EpEvent,
  Group,
  launchPlan,
  LibraryError,
  type LowLatencyHandle,
  type Stream,
  Tensor,
} from "@deepep/deepep";
import { cudaCapabilities } from "./support/cuda.ts";
import { reasonOf, tiny, withRanks } from "./support/ranks.ts";

const cudaLibrary = new URL(`../lib/native/${process.platform}-${process.arch}/libdeepep_cuda.so`, import.meta.url);

const rows = (b: EpBuffer, n = 2) => b.tensor("bf16", [n, 16], new Float32Array(n * 16).fill(b.rank + 1));
const idx = (b: EpBuffer, values = [0, 7, 2, 3]) => b.tensor("i32", [values.length / 2, 2], Int32Array.from(values));

/** A dispatch and combine that must work, to show that the buffer is good. Every expert is the identity. */
async function works(b: EpBuffer): Promise<void> {
  using x = rows(b), topkIdx = idx(b, [0, 1, 6, 6]);
  using recv = await b.dispatch(x, { topkIdx });
  using out = await b.combine(recv.x, recv.handle);
  assertEquals([...await out.x.read()], [...await x.read()]);
}

describe("creation", () => {
  const cases: [string, Record<string, number>, string][] = [
    ["hidden not a multiple of 16 bytes", { hidden: 20 }, "hidden is 20"],
    ["no experts", { numExperts: 0 }, "numExperts is 0"],
    ["too many top-k", { numTopk: 33 }, "numTopk is 33"],
    ["too many tokens", { maxTokensPerRank: 65537 }, "maxTokensPerRank is 65537"],
    ["too many slots", { numSlots: 9 }, "numSlots is 9"],
    ["a fraction", { maxTokensPerRank: 1.5 }, "maxTokensPerRank is 1.5"],
  ];
  for (const [name, change, message] of cases) {
    test(name, async () => {
      const [group] = Group.local(1);
      await assertRejects(() => EpBuffer.create(group!, { ...tiny, ...change }), RangeError, message);
    });
  }
  test("a rank count beyond the limit", async () => {
    const group = { ...Group.local(1)[0]!, size: 65, rank: 0, allGather: (d: Uint8Array) => Promise.resolve([d]) };
    await assertRejects(() => EpBuffer.create(group as unknown as Group, tiny), RangeError, "numRanks is 65");
  });
  for (const [key, value] of Object.entries({ hidden: 32, numExperts: 16, maxTokensPerRank: 8, numTopk: 1 })) {
    test(`ranks that disagree about ${key} all hear which rank and which values`, async () => {
      const groups = Group.local(3);
      const reasons = await Promise.all(
        groups.map((g) => reasonOf(EpBuffer.create(g, { ...tiny, ...(g.rank === 2 ? { [key]: value } : {}) }))),
      );
      for (const reason of reasons) {
        assert(reason instanceof EpError, String(reason));
        assertEquals(reason.code, "mismatch");
        assert(
          reason.message.includes(key) && reason.message.includes("rank 2") && reason.message.includes(String(value)),
          reason.message,
        );
      }
    });
  }
  test("a rank that refuses its own options tells the others", async () => {
    const groups = Group.local(2);
    const [bad, good] = await Promise.all(
      groups.map((g) => reasonOf(EpBuffer.create(g, { ...tiny, ...(g.rank === 0 ? { numTopk: 99 } : {}) }))),
    );
    assert(bad instanceof RangeError && good instanceof EpError);
    assert(good.message.includes("rank 0") && good.message.includes("numTopk is 99"), good.message);
  });
  test("a rank that never joins is named within the deadline", async () => {
    const [first, , third] = Group.local(3);
    const began = performance.now();
    const reasons = await Promise.all(
      [first!, third!].map((g) => reasonOf(EpBuffer.create(g, { ...tiny, connectTimeoutMs: 200 }))),
    );
    assert(performance.now() - began < 5000);
    for (const reason of reasons) {
      assert(reason instanceof EpError && reason.code === "timeout", String(reason));
      assert(/\b1\b/.test(reason.message), reason.message);
    }
  });
  test("ranks that disagree about masking", async () => {
    const groups = Group.local(2);
    for (
      const reason of await Promise.all(
        groups.map((g) => reasonOf(EpBuffer.create(g, { ...tiny, maskOnTimeout: g.rank === 1 }))),
      )
    ) {
      assert(reason instanceof EpError && reason.code === "mismatch", String(reason));
      assert(reason.message.includes("maskOnTimeout is false on rank 0 and true on rank 1"), reason.message);
    }
  });
  for (const [key, value] of Object.entries({ timeoutMs: -1, numSms: 0.5, device: -1 })) {
    test(`${key} out of range`, async () => {
      const [group] = Group.local(1);
      await assertRejects(() => EpBuffer.create(group!, { ...tiny, [key]: value }), RangeError, `${key} is ${value}`);
    });
  }
  test("the library of another backend", async () => {
    const [group] = Group.local(1);
    const library = await withRanks(1, {}, (b) => Promise.resolve(b.core.device.path));
    const options = { ...tiny, library: library[0]! };
    await assertRejects(
      () => EpBuffer.create(group!, { ...options, backend: "cuda" }),
      LibraryError,
      "library of backend cpu, not of cuda",
    );
    await using b = await EpBuffer.create(Group.local(1)[0]!, { ...options, backend: "auto" });
    assertEquals(b.backend, "cpu");
    assert(b.backendReason.includes("not of cuda"), b.backendReason);
  });
  const unseen = cudaCapabilities ? "there is a GPU" : !existsSync(cudaLibrary) && "there is no cuda library";
  test("no GPU: creating a buffer says so, whether a device was named or not", { skip: unseen }, async () => {
    for (const options of [tiny, { ...tiny, device: 0 }]) {
      const reason = await reasonOf(EpBuffer.create(Group.local(1)[0]!, { ...options, backend: "cuda" }));
      assert(reason instanceof EpError && reason.op === "create", String(reason));
      assert(reason.message.startsWith("Cannot create a buffer: no "), reason.message);
    }
  });
  test("an unknown backend", async () => {
    const [group] = Group.local(1);
    await assertRejects(() => EpBuffer.create(group!, { ...tiny, backend: "tpu" as "cpu" }), RangeError, '"tpu"');
  });

  test("a launch plan's compute capability is in its unit, and low latency has experts", async () => {
    const plan = { rowBytes: 256, numRanks: 2, numTopk: 2, deviceSms: 132, computeCapability: 90 } as const;
    for (const computeCapability of [9, 90.5, -1]) {
      const wrong = launchPlan({ ...plan, op: "dispatch", computeCapability });
      await assertRejects(
        () => wrong,
        RangeError,
        `computeCapability is ${computeCapability}, needs 10 * major + minor`,
      );
    }
    await assertRejects(() => launchPlan({ ...plan, op: "lowLatencyDispatch" }), RangeError, "needs numExperts");
  });
});

describe("arguments", () => {
  test("wrong dtype and shape are TypeErrors before the border", async () => {
    await withRanks(1, {}, async (b) => {
      using x = rows(b),
        topkIdx = idx(b),
        f32 = b.tensor("f32", [2, 16]),
        floats = b.tensor("f32", [2, 2]),
        flat = b.tensor("bf16", [32]);
      using i64 = b.tensor("i64", [2, 3]), three = b.tensor("i32", [3, 2]);
      await assertRejects(() => b.dispatch(f32, { topkIdx }), TypeError, "f32 [2, 16]");
      await assertRejects(() => b.dispatch(flat, { topkIdx }), TypeError, "bf16 [32]");
      await assertRejects(() => b.dispatch(x, { topkIdx: floats }), TypeError, "f32 [2, 2]");
      await assertRejects(() => b.dispatch(x, { topkIdx: i64 }), RangeError, "3 entries");
      await assertRejects(() => b.dispatch(x, { topkIdx: three }), TypeError, "needs shape [3, any]");
      await assertRejects(() => b.dispatch(x, { topkIdx, topkWeights: f32 }), TypeError, "topkWeights is f32 [2, 16]");
      await assertRejects(
        () => b.dispatch(x, {}),
        TypeError,
        "needs a routing (topkIdx or dispatchLayout) or a handle, got neither",
      );
      using kept = await b.dispatch(x, { topkIdx });
      await assertRejects(() => b.dispatch(x, { topkIdx, handle: kept.handle }), TypeError, "or a handle, got both");
      await assertRejects(() => b.dispatch(undefined as unknown as Tensor, { topkIdx }), TypeError, "x is undefined");
      await assertRejects(() => b.dispatch(x, { topkIdx, layout: "row" as "rank" }), RangeError, '"row"');
      await assertRejects(() => b.dispatch(x, { topkIdx, expertAlignment: 0 }), RangeError, "expertAlignment is 0");
      await assertRejects(() => b.dispatch(x, { topkIdx, timeoutMs: -1 }), RangeError, "timeoutMs is -1");
      await works(b);
    });
  });
  test("streams, events and handles are not taken for each other", async () => {
    await withRanks(1, {}, async (b) => {
      using x = rows(b), topkIdx = idx(b), topkWeights = b.tensor("f32", [2, 2]);
      const stream = { address: 64n } as Stream, event = b.stream as unknown as EpEvent;
      await assertRejects(() => b.dispatch(x, { topkIdx, stream }), TypeError, "stream is no stream");
      await assertRejects(() => b.dispatch(x, { topkIdx, previousEvent: event }), TypeError, "no event");
      await assertRejects(() => b.dispatch(x, { topkIdx, numSms: 2 ** 40 }), RangeError, "numSms is 1099511627776");
      assertThrows(() => b.record(stream), TypeError, "stream is no stream");
      assertThrows(() => b.record().wait(stream), TypeError, "stream is no stream");
      await assertRejects(() => b.destroyStream(b.stream), RangeError, "the buffer's own");
      using recv = await b.dispatch(x, { topkIdx });
      using ll = b.lowLatencyDispatch(x, { topkIdx, fp8: false });
      const other = ll.handle as unknown as DispatchHandle;
      await assertRejects(() => b.combine(recv.x, other), TypeError, "no handle of a dispatch");
      await assertRejects(() => b.dispatch(x, { handle: other }), TypeError, "no handle of a dispatch");
      const handle = recv.handle as unknown as LowLatencyHandle;
      assertThrows(() => b.lowLatencyCombine(ll.x, { topkIdx, topkWeights, handle }), TypeError, "no handle of a low");
    });
  });
  test("an array of another type, which would be taken bit for bit", async () => {
    await withRanks(1, {}, (b) => {
      const floats = Float32Array.of(0, 1) as unknown as Int32Array;
      assertThrows(() => b.tensor("i32", [2], floats), TypeError, "tensor of i32 takes Int32Array, not Float32Array");
      const ints = Int32Array.of(0, 1) as unknown as BigInt64Array;
      assertThrows(() => b.tensor("i64", [1], ints), TypeError, "tensor of i64 takes BigInt64Array, not Int32Array");
      assertThrows(() => b.fill(b.tensor("u8", [1]), 256), RangeError, "value is 256");
      return Promise.resolve();
    });
  });
  test("more tokens than the buffer holds", async () => {
    await withRanks(1, {}, async (b) => {
      using x = rows(b, 5), topkIdx = idx(b, [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]);
      await assertRejects(() => b.dispatch(x, { topkIdx }), RangeError, "x has 5 tokens, the buffer holds 4 a rank");
      assertThrows(
        () => b.lowLatencyDispatch(x, { topkIdx }),
        RangeError,
        "topkIdx has 5 tokens, the buffer holds 4 a rank",
      );
    });
  });
  test("rows that are no multiple of 16 bytes, or too wide", async () => {
    await withRanks(1, {}, async (b) => {
      using narrow = b.tensor("bf16", [2, 12]), wide = b.tensor("bf16", [2, 24]), topkIdx = idx(b);
      await assertRejects(() => b.dispatch(narrow, { topkIdx }), RangeError, "24 bytes");
      await assertRejects(() => b.dispatch(wide, { topkIdx }), RangeError, "48 bytes");
    });
  });
  for (const bad of [-2, 8, 1 << 30]) {
    test(`expert index ${bad} fails on every rank, and the buffer stays good`, async () => {
      await withRanks(2, {}, async (b, rank) => {
        using x = rows(b), topkIdx = idx(b, rank === 1 ? [0, 1, 3, bad] : [0, 1, 2, 3]);
        const reason = await reasonOf(b.dispatch(x, { topkIdx }));
        assert(reason instanceof EpError, String(reason));
        if (rank === 1) {
          assertEquals(reason.code, "invalidArgument");
          assert(reason.message.includes(String(bad)), reason.message);
        } else {
          assertEquals([reason.code, reason.peer], ["aborted", 1]);
        }
        assertEquals(b.failed, false);
        await works(b);
      });
    });
  }
  test("expert index beyond the experts in low-latency mode", async () => {
    await withRanks(2, {}, async (b, rank) => {
      using x = rows(b), topkIdx = idx(b, rank === 0 ? [0, 9, 3, 4] : [0, 1, 2, 3]);
      using recv = b.lowLatencyDispatch(x, { topkIdx, fp8: false });
      const reason = await reasonOf(recv.received());
      assert(reason instanceof EpError && reason.code === (rank === 0 ? "invalidArgument" : "aborted"), String(reason));
    });
  });
  test("tensors and handles of another buffer", async () => {
    await withRanks(1, {}, async (a) => {
      await withRanks(1, {}, async (b) => {
        using foreign = rows(b), mine = rows(a), topkIdx = idx(a);
        await assertRejects(() => a.dispatch(foreign, { topkIdx }), TypeError, "belongs to");
        using recv = await a.dispatch(mine, { topkIdx });
        await assertRejects(() => b.combine(foreign, recv.handle), TypeError, "belongs to");
        await assertRejects(() => b.combine(recv.x, recv.handle), TypeError, "belongs to");
      });
    });
  });
});

describe("a call that one rank refuses", () => {
  // What rank 1 hands in, and the call; the others make the call as it should be.
  const calls: [string, (b: EpBuffer, bad: boolean) => Promise<unknown>, string][] = [
    ["dispatch", (b, bad) => {
      using x = rows(b, bad ? 5 : 2), topkIdx = bad ? b.tensor("i32", [5, 2]) : idx(b);
      return b.dispatch(x, { topkIdx });
    }, "x has 5 tokens"],
    ["combine", async (b, bad) => {
      using x = rows(b), topkIdx = idx(b);
      using recv = await b.dispatch(x, { topkIdx });
      using wrong = b.tensor("f32", [8, 16]);
      using out = await b.combine(bad ? wrong : recv.x, recv.handle);
      await out.event;
    }, "f32 [8, 16]"],
    ["low-latency dispatch", async (b, bad) => {
      using x = rows(b), topkIdx = idx(b), wrong = b.tensor("f32", [2, 2]);
      using recv = b.lowLatencyDispatch(x, { topkIdx: bad ? wrong : topkIdx, fp8: false });
      await recv.received();
    }, "f32 [2, 2]"],
    ["low-latency combine", async (b, bad) => {
      using x = rows(b), topkIdx = idx(b), topkWeights = b.tensor("f32", [2, 2], Float32Array.of(1, 1, 1, 1));
      using recv = b.lowLatencyDispatch(x, { topkIdx, fp8: false });
      const weights = bad ? topkIdx : topkWeights;
      using out = b.lowLatencyCombine(recv.x, { topkIdx, topkWeights: weights, handle: recv.handle });
      await out.received();
    }, "topkWeights is i32"],
    ["barrier", async (b, bad) => await b.barrier({ timeoutMs: bad ? -1 : 1000 }), "timeoutMs is -1"],
  ];
  for (const [name, call, words] of calls) {
    test(`${name}: the others hear at once which rank, and all can go on`, async () => {
      await withRanks(3, { timeoutMs: 20_000 }, async (b, rank) => {
        const began = performance.now(), reason = await reasonOf(call(b, rank === 1));
        assert(performance.now() - began < 5000);
        if (rank === 1) assert(reason.message.includes(words), String(reason));
        else assert(reason instanceof EpError && reason.code === "aborted" && reason.peer === 1, String(reason));
        assertEquals(b.failed, false);
        for (let i = 0; i < 3; i++) await works(b);
        for (let i = 0; i < 3; i++) {
          await call(b, false).then((held) => (held as Disposable | undefined)?.[Symbol.dispose]?.());
        }
      });
    });
  }
});

describe("life", () => {
  test("released results, handles and tensors say so", async () => {
    await withRanks(1, {}, async (b) => {
      const x = rows(b), topkIdx = idx(b);
      const recv = await b.dispatch(x, { topkIdx });
      recv.release();
      recv.release();
      await assertRejects(() => recv.x.read(), EpError, "given back by result.release()");
      await assertRejects(() => b.combine(recv.x, recv.handle), EpError, "released");
      assertThrows(() => recv.handle.expertOutput(), EpError, "released");
      x.release();
      x.release();
      await assertRejects(() => b.dispatch(x, { topkIdx }), EpError, "x was given back by tensor.release()");
      using y = rows(b);
      assertThrows(() => b.fill(x, 0), EpError, "given back by tensor.release()");
      assertThrows(() => b.copy(y, x), EpError, "the source was given back by tensor.release()");
      assertThrows(() => b.copy(x, y), EpError, "the destination was given back by tensor.release()");
      assertThrows(() => b.write(x, new Uint8Array(64)), EpError, "given back by tensor.release()");
      await assertRejects(() => b.read(x), EpError, "given back by tensor.release()");
      topkIdx.release();
      const ll = rows(b), llIdx = idx(b), sent = b.lowLatencyDispatch(ll, { topkIdx: llIdx, fp8: false });
      sent.release();
      using weights = b.tensor("f32", [2, 2]);
      assertThrows(
        () => b.lowLatencyCombine(sent.x as Tensor, { topkIdx: llIdx, topkWeights: weights, handle: sent.handle }),
        EpError,
        "released",
      );
      ll.release();
      llIdx.release();
    });
  });
  test("use after close", async () => {
    const [group] = Group.local(1);
    const b = await EpBuffer.create(group!, tiny), x = rows(b), topkIdx = idx(b);
    await b.close();
    await b.close();
    const closed = (e: Error) => assert(e instanceof EpError && e.code === "closed", String(e));
    closed(await reasonOf(b.dispatch(x, { topkIdx })));
    closed(assertThrows(() => b.lowLatencyDispatch(x, { topkIdx }), EpError));
    closed(assertThrows(() => b.tensor("f32", [1]), EpError));
    closed(assertThrows(() => b.createStream(), EpError));
    closed(assertThrows(() => b.barrier(), EpError));
    closed(await reasonOf(x.read()));
    x.release();
    topkIdx.release();
  });
  test("masks must name another rank", async () => {
    await withRanks(2, {}, (b, rank) => {
      assertThrows(() => b.maskRank(rank), RangeError, `rank ${rank}`);
      assertThrows(() => b.maskRank(2), RangeError, "rank 2");
      assertThrows(() => b.maskRank(0.5), RangeError, "rank 0.5");
      assertEquals(b.maskedRanks, []);
      return Promise.resolve();
    });
    await withRanks(2, {}, async (b, rank) => {
      for (const bad of [rank, 2, 70, -1]) {
        await assertRejects(() => b.recover({ masked: [bad] }), RangeError, `without rank ${bad}`);
      }
    });
  });
  test("low-latency calls need a buffer made for them", async () => {
    await withRanks(1, { maxLowLatencyTokensPerRank: 0 }, (b) => {
      using x = rows(b), topkIdx = idx(b);
      assertThrows(() => b.lowLatencyDispatch(x, { topkIdx }), EpError, "maxLowLatencyTokensPerRank");
      return Promise.resolve();
    });
  });
  test("foreign tensors are checked", () => {
    assertThrows(() => Tensor.from(0n, "f32", [1]), RangeError, "address is 0");
    assertThrows(() => Tensor.from(1 as unknown as bigint, "f32", [1]), TypeError, "number");
    assertThrows(() => Tensor.from(16n, "f16" as "f32", [1]), TypeError, "f16");
    assertThrows(() => Tensor.from(16n, "f32", [-1]), RangeError, "[-1]");
    assertThrows(() => Tensor.from(16n, "f32", [4], { strides: [1.5] }), RangeError, "strides are [1.5]");
    assertThrows(() => Tensor.from(16n, "f32", [4]).slice(1, 5), RangeError, "[1, 5)");
  });
});
