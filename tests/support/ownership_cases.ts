/**
 * Who owns what, and until when: memory that a pending operation uses is not handed out again, whatever stream it was
 * released on; receiving halves use only what is still there; what a buffer did can be asked after it was closed. In: a
 * backend. Out: tests.
 */
import { test } from "node:test";
import { setTimeout as sleep } from "node:timers/promises";
import { assert, assertEquals, assertRejects, assertThrows } from "@std/assert";
import { type EpBuffer, EpError, type OperationOptions, Tensor } from "@deepep/deepep";
import { ranksOf, reasonOf } from "./ranks.ts";
import { type BackendSubject, suite } from "./suite.ts";

const topk = (b: EpBuffer) => b.tensor("i32", [2, 2], Int32Array.of(0, 7, 2, 5));
const rows = (b: EpBuffer, value: number) => b.tensor("bf16", [2, 16], new Float32Array(32).fill(value));
const ones = (b: EpBuffer) => b.tensor("f32", [2, 2], new Float32Array(4).fill(1));
const ONE = 0x3f80;

/** A dispatch of either mode: its first row, once it is there, if there is one. */
type Send = (b: EpBuffer, x: Tensor, topkIdx: Tensor, call: OperationOptions) => () => Promise<number | undefined>;

const sendNormal: Send = (b, x, topkIdx, call) => {
  const sent = b.dispatch(x as Tensor<"bf16">, { topkIdx, cpuSync: false, ...call });
  return async () => {
    using recv = await sent;
    await recv.event;
    const [count] = await recv.counts.numRows.read();
    return count! > 0 ? (await recv.x.read())[0] : undefined;
  };
};

const sendLowLatency: Send = (b, x, topkIdx, call) => {
  const sent = b.lowLatencyDispatch(x, { topkIdx, fp8: false, ...call });
  return async () => {
    using recv = sent;
    await recv.received();
    const [first] = await recv.count.read();
    return first! > 0 ? (await (recv.x as Tensor<"bf16">).read())[0] : undefined;
  };
};

/** Rank 0 releases its rows while their dispatch waits for rank 1, and writes to all memory that it can get. */
async function releasedEarly(
  buffers: EpBuffer[],
  send: Send,
  options: (b: EpBuffer) => OperationOptions,
): Promise<void> {
  const received: ReturnType<Send>[] = [];
  for (const b of buffers) { // one rank after the other: the first one's barrier holds its dispatch up
    const call = options(b), x = rows(b, 1), topkIdx = topk(b);
    await b.record();
    b.barrier(call);
    received.push(send(b, x, topkIdx, call));
    x.release();
    topkIdx.release();
    const others = Array.from({ length: 16 }, () => [rows(b, 2), topk(b)]).flat();
    await sleep(20); // for the writes: the buffer's stream itself may stand behind the barrier
    for (const tensor of others) tensor.release();
  }
  for (const [rank, result] of received.entries()) {
    const first = await result();
    assert(first !== undefined || rank > 0);
    if (first !== undefined) assertEquals(first, ONE, `rank ${rank} received rows of a tensor that came after`);
  }
}

/** Registers the cases. */
export function runOwnershipCases({ name, backend, skip, skipLowLatency }: BackendSubject): void {
  const ranks = ranksOf(backend);
  suite(`${name}: memory of a pending dispatch`, skip, () => pendingCases(ranks, sendNormal));
  suite(`${name}: what outlives what`, skip, () => otherCases(ranks));
  suite(
    `${name}: memory of a pending low-latency dispatch`,
    skip || skipLowLatency,
    () => pendingCases(ranks, sendLowLatency),
  );
  suite(`${name}: receiving halves`, skip || skipLowLatency, () => receiveCases(ranks));
}

type Ranks = ReturnType<typeof ranksOf>;

function pendingCases(ranks: Ranks, send: Send): void {
  const ways: [string, (b: EpBuffer) => OperationOptions][] = [
    ["on the buffer's stream", () => ({})],
    ["with asyncFinish", () => ({ asyncFinish: true })],
    ["on another stream", (b) => ({ stream: b.createStream() })],
  ];
  for (const [name, options] of ways) {
    test(`is not handed out again: ${name}`, async () => {
      const buffers: EpBuffer[] = [];
      const all = Promise.withResolvers<void>(), done = Promise.withResolvers<void>();
      const world = ranks(2, {}, async (b) => {
        buffers[b.rank] = b;
        if (buffers.filter(Boolean).length === 2) all.resolve();
        await done.promise;
      });
      try {
        await all.promise;
        await releasedEarly(buffers, send, options);
      } finally {
        done.resolve();
        await world;
      }
    });
  }
}

function receiveCases(ranks: Ranks): void {
  test("a refused hook stays refused", async () => {
    await ranks(1, {}, async (b) => {
      using x = rows(b, 1), topkIdx = topk(b);
      const sent = b.lowLatencyDispatch(x, { topkIdx, recvHook: true });
      sent.release();
      assertThrows(() => sent.hook(), EpError, "it was released");
      await assertRejects(() => sent.received(), EpError, "it was released");
    });
  });
  test("of results that were released are not those of who has the slot now", async () => {
    await ranks(1, { numSlots: 1 }, async (b) => {
      using x = rows(b, 1), topkIdx = topk(b), topkWeights = ones(b);
      const dispatch = () => b.lowLatencyDispatch(x, { topkIdx, recvHook: true, fp8: false });
      const combine = ({ handle }: ReturnType<typeof dispatch>) =>
        b.lowLatencyCombine(handle.expertOutput(), { topkIdx, topkWeights, handle, recvHook: true });
      const gone = dispatch();
      gone.release();
      using here = dispatch();
      await assertRejects(() => gone.received(), EpError, "it was released");
      await here.received();
      assertEquals((await here.x.read())[0], ONE);
      here.release();
      const before = dispatch();
      await before.received();
      b.fill(before.handle.expertOutput(), 0);
      using lost = combine(before);
      before.release();
      using after = dispatch();
      await after.received();
      b.fill(after.handle.expertOutput(), 0);
      using found = combine(after);
      await assertRejects(() => lost.received(), EpError, "the dispatch's result was released");
      await found.received();
      assertEquals((await found.x.read())[0], 0);
    });
  });
  test("use no tensor that was released before", async () => {
    await ranks(1, {}, async (b) => {
      for (const gone of ["out", "topkIdx", "topkWeights"] as const) {
        using x = rows(b, 1), topkIdx = topk(b), topkWeights = ones(b);
        using recv = b.lowLatencyDispatch(x, { topkIdx, fp8: false });
        const { handle } = recv;
        const back = b.lowLatencyCombine(recv.x as Tensor, { topkIdx, topkWeights, handle, recvHook: true });
        ({ out: back.x, topkIdx, topkWeights })[gone].release();
        await assertRejects(() => back.received(), EpError, `${gone} was given back by tensor.release()`);
        back[Symbol.dispose]();
      }
    });
  });
  test("are what the result's event marks", async () => {
    await ranks(1, {}, async (b) => {
      using x = rows(b, 1), topkIdx = topk(b);
      using sent = b.lowLatencyDispatch(x, { topkIdx, recvHook: true });
      const half = sent.event;
      const arrived = sent.hook();
      assert(arrived !== half);
      assertEquals(sent.event === arrived, true);
      await sent.event;
    });
  });
}

function otherCases(ranks: Ranks): void {
  test("a cached dispatch after a mask has counts of its own, and leaves what its handle has received before", async () => {
    await ranks(3, { numExperts: 6, numTopk: 1, numSlots: 3 }, async (b, rank, group) => {
      using x = b.tensor("bf16", [2, 16], Float32Array.from({ length: 32 }, (_, i) => 10 * rank + (i >> 4) + 1));
      using topkIdx = b.tensor("i32", [2, 1], Int32Array.of(4, 5)); // of rank 2
      using first = await b.dispatch(x, { topkIdx });
      await group.barrier();
      if (rank === 0) return;
      b.maskRank(0);
      {
        using again = await b.dispatch(x, { handle: first.handle });
        assertEquals(again.handle.counts!.numTokensPerRank, rank === 2 ? [0, 2, 2] : [0, 0, 0]);
        assertEquals([first.x.shape[0], again.x.shape[0]], rank === 2 ? [6, 4] : [0, 0]);
        using back = await b.combine(again.x, again.handle);
        assertEquals(await back.x.read(), await x.read());
      }
      using back = await b.combine(first.x, first.handle);
      assertEquals(await back.x.read(), await x.read());
    });
  });
  test("combines of a kept handle take a slot in turn, however many are enqueued", async () => {
    await ranks(2, { numSlots: 2 }, async (b) => {
      using x = rows(b, 1), topkIdx = topk(b), out = rows(b, 0);
      const first = await b.dispatch(x, { topkIdx }), handle = first.handle.keep(), numRows = first.x.shape[0]!;
      using y = b.tensor("bf16", [numRows, 16], new Float32Array(numRows * 16).fill(1));
      first.release();
      for (let i = 0; i < 20; i++) await b.combine(y, handle, { out });
      using again = await b.dispatch(x, { handle });
      assertEquals(again.x.shape[0], numRows);
      assertEquals((await out.read())[0], 0x4000);
      handle.release();
    });
  });
  test("a low-latency dispatch that fails leaves no counts of the one before", async () => {
    await ranks(1, { numSlots: 1 }, async (b) => {
      using x = rows(b, 1), good = topk(b), bad = b.tensor("i32", [2, 2], Int32Array.of(0, 7, 99, 5));
      for (const recvHook of [false, true]) {
        using sent = b.lowLatencyDispatch(x, { topkIdx: good });
        await sent.received();
        assertEquals((await sent.count.read()).reduce((a, n) => a + n, 0), 4);
        sent.release();
        using failed = b.lowLatencyDispatch(x, { topkIdx: bad, recvHook });
        await reasonOf(failed.received());
        const { count, layoutRange } = failed;
        const seen = [
          Tensor.from(count.address, "i32", count.shape),
          Tensor.from(layoutRange.address, "i64", layoutRange.shape),
        ];
        for (const tensor of seen) assertEquals((await b.read(tensor)).every((n) => Number(n) === 0), true);
      }
    });
  });
  test("a tensor's shape is its own", async () => {
    await ranks(1, {}, async (b) => {
      const shape = [2, 16];
      using tensor = b.tensor("bf16", shape, new Uint16Array(32));
      shape[0] = 100_000;
      assertEquals([tensor.byteLength, (await tensor.read()).length], [64, 32]);
    });
  });
  test("a cached dispatch that waits for its counts gives them to its handle", async () => {
    await ranks(1, {}, async (b) => {
      using x = rows(b, 1), topkIdx = topk(b);
      using blind = await b.dispatch(x, { topkIdx, cpuSync: false });
      assertEquals(blind.handle.counts, undefined);
      using known = await b.dispatch(x, { handle: blind.handle });
      assertEquals(known.handle.counts?.numTokens, 2);
      using short = b.tensor("bf16", [1, 16]);
      await assertRejects(() => b.combine(short, known.handle), RangeError, "received 2 rows");
    });
  });

  test("a routing is filled anew when nobody uses it any more, and not before", async () => {
    await ranks(2, { numSlots: 4 }, async (b) => {
      using x = rows(b, 1), toBoth = topk(b), toFirst = b.tensor("i32", [2, 2], Int32Array.of(0, 1, -1, -1));
      type Received = Awaited<ReturnType<typeof blind>>;
      const blind = (topkIdx: Tensor) => b.dispatch(x as Tensor<"bf16">, { topkIdx, cpuSync: false });
      const sums = async ({ x: y, handle }: Received) => {
        using out = await b.combine(y, handle);
        return [...await out.x.read()].filter((_, i) => i % 16 === 0);
      };
      const TWO = 0x4000, both = [TWO, TWO], first = [ONE, 0];
      for (let round = 0; round < 3; round++) {
        const early = await blind(toBoth);
        const pending = b.dispatch(x as Tensor<"bf16">, { handle: early.handle }); // waits for its counts
        early.release();
        using between = await blind(toFirst);
        using late = await pending;
        assertEquals([await sums(late), await sums(between)], [both, first]);
        late.release();
        using again = await blind(toBoth), other = await blind(toFirst);
        assertEquals([await sums(again), await sums(other), await sums(between)], [both, first, first]);
      }
      // A failed dispatch leaves no routing to who fills its handle next.
      for (const topkIdx of [toBoth, toFirst]) {
        using bad = b.tensor("i32", [2, 2], Int32Array.of(0, 99, 0, 0));
        using failed = await blind(bad);
        assert(await reasonOf(failed.event) instanceof EpError);
        failed.release();
        using next = await blind(topkIdx);
        assertEquals(await sums(next), topkIdx === toBoth ? both : first);
      }
    });
  });

  test("a dispatch's options may be changed while it is awaited", async () => {
    await ranks(2, { numSlots: 4 }, async (b) => {
      using x = rows(b, 1), toBoth = topk(b), toFirst = b.tensor("i32", [2, 2], Int32Array.of(0, 1, -1, -1));
      using both = await b.dispatch(x, { topkIdx: toBoth, cpuSync: false });
      using first = await b.dispatch(x, { topkIdx: toFirst, cpuSync: false });
      const options = { handle: both.handle };
      const one = b.dispatch(x, options);
      options.handle = first.handle;
      const two = b.dispatch(x, options);
      const sums = async (recv: Awaited<typeof one>) => {
        using out = await b.combine(recv.x, recv.handle);
        return [...await out.x.read()].filter((_, i) => i % 16 === 0);
      };
      using late = await one, later = await two;
      assertEquals([await sums(late), await sums(later)], [[0x4000, 0x4000], [ONE, 0]]);
    });
  });

  test("what was recorded on a stream ends in its order, however it is asked for", async () => {
    const turn = Promise.withResolvers<void>();
    await ranks(2, {}, async (b, rank) => {
      await b.record();
      const before = b.record();
      await b.record();
      if (rank === 1) await turn.promise;
      const barrier = b.barrier();
      if (rank === 0) { // whose stream stands behind the barrier, since rank 1 has not called
        using source = rows(b, 3), freed = rows(b, 1);
        freed.release();
        const copied = source.read(), after = b.record();
        await before;
        assertEquals([before.done, after.done], [true, false]);
        turn.resolve();
        assertEquals((await copied)[0], 0x4040);
        await after;
      }
      await barrier;
    });
  });

  test("a failure that is asked for after close keeps its code", async () => {
    await ranks(2, { timeoutMs: 100 }, async (b, rank) => {
      if (rank === 1) return;
      const event = b.barrier();
      await b.close();
      const reason = await reasonOf(event);
      assert(reason instanceof EpError && reason.code === "timeout", String(reason));
    });
  });
}
