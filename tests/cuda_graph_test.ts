/**
 * CUDA graphs: a dispatch and a combine captured once on every rank and replayed with new routing and rows in the same
 * tensors; every replay is compared with the reference. And what graphs do beside eager calls, and when a peer stays away.
 */
import { test } from "node:test";
import { assert, assertEquals, assertThrows } from "@std/assert";
import {
  type BufferOptions,
  type DispatchResult,
  EpBuffer,
  EpError,
  type EpEvent,
  Group,
  type Recorder,
  type Tensor,
} from "@deepep/deepep";
import { bytesOf } from "../lib/dtype.ts";
import { constants } from "../lib/ffi/abi.ts";
import { struct } from "../lib/ffi/struct.ts";
import { type RankOutput, referenceCombine, referenceDispatch, type RowLayout } from "../lib/reference/mod.ts";
import { assertCombined, assertDispatched } from "./support/compare.ts";
import { noCudaGraphs, noCudaLowLatency } from "./support/cuda.ts";
import { layer } from "./support/order_cases.ts";
import { Random, runSeed } from "./support/random.ts";
import { ranksOf, reasonOf, tiny } from "./support/ranks.ts";
import { replayCount, suite } from "./support/suite.ts";
import { makeWorld, type TestWorld, type WorldSpec } from "./support/worlds.ts";

const eventStruct = struct("deepep_event_args");
const spec: WorldSpec = {
  name: "replayed",
  numRanks: 4,
  numExperts: 8,
  numTopk: 3,
  hidden: 64,
  tokens: [8, 5, 0, 7],
  routing: "mixed",
  dropped: 0.1,
};
const ALIGNMENT = 4;
const MAX_ROWS = 8 * 4 * 3 + 2 * ALIGNMENT;
const options: BufferOptions = {
  backend: "cuda",
  hidden: spec.hidden,
  numExperts: spec.numExperts,
  numTopk: spec.numTopk,
  maxTokensPerRank: 8,
  maxRecvTokens: MAX_ROWS,
  timeoutMs: 20_000,
};
const ranks = ranksOf("cuda");

/** A rank with its captured layer: dispatch, identity experts, combine with the weights' way back. */
function captured(b: EpBuffer, layout: RowLayout) {
  const numTokens = spec.tokens[b.rank]!, entries = [numTokens, spec.numTopk];
  const x = b.tensor("bf16", [numTokens, spec.hidden]), topkIdx = b.tensor("i32", entries);
  const topkWeights = b.tensor("f32", entries);
  const graph = b.capture(b.stream, (operations) => {
    const expertAlignment = layout === "expert" ? ALIGNMENT : 1;
    const recv = operations.dispatch(x, { topkIdx, topkWeights, layout, expertAlignment });
    const weights = recv.topkWeights!;
    return { recv, out: operations.combine(recv.x, recv.handle, { topkWeights: weights }) };
  });
  return {
    write(world: TestWorld): void {
      const input = world.inputs[b.rank]!;
      b.write(x, input.x);
      b.write(topkIdx, input.topkIdx!);
      b.write(topkWeights, input.topkWeights!);
    },
    graph,
    end(): void {
      graph.results.recv.release();
      graph.results.out[Symbol.dispose]();
      [x, topkIdx, topkWeights].forEach((tensor) => tensor.release());
      graph.release();
    },
  };
}

async function output(recv: DispatchResult<Tensor<"bf16">>, layout: RowLayout): Promise<RankOutput> {
  const [numTokens, inUse] = await recv.counts.numRows.read() as unknown as [number, number];
  const numRows = layout === "expert" ? inUse : numTokens;
  const [x, weights, srcIdx, perExpert, perRank, topkIdx] = await Promise.all([
    recv.x.slice(0, numRows).read(),
    recv.topkWeights!.slice(0, numRows).read(),
    recv.srcIdx.slice(0, numRows).read(),
    recv.counts.numTokensPerExpert.read(),
    recv.counts.numTokensPerRank.read(),
    recv.topkIdx?.read(),
  ]);
  return {
    numTokens,
    numRows,
    x: bytesOf(x),
    ...(topkIdx && { topkIdx: topkIdx as Int32Array }),
    topkWeights: weights,
    srcIdx,
    numTokensPerExpert: perExpert,
    numTokensPerRank: perRank,
    expertStats: new Int32Array(2),
  };
}

type Captured = ReturnType<typeof captured>;

/** One replay on every rank, checked bit for bit. */
async function replay(all: readonly Captured[], layout: RowLayout, world: TestWorld): Promise<void> {
  for (const rank of all) {
    rank.write(world);
    rank.graph.launch();
  }
  const numRanks = spec.numRanks, { hidden, numTopk } = world;
  const call = { numTopk, layout, expertAlignment: layout === "expert" ? ALIGNMENT : 1, noCpuSync: true };
  const shape = { ...options, numRanks, maxRecvTokens: MAX_ROWS };
  const expected = referenceDispatch(world.inputs, { ...shape, ...call });
  const got = await Promise.all(all.map(({ graph }) => output(graph.results.recv, layout)));
  const release = () => Promise.resolve();
  assertDispatched({ ranks: got, release }, expected.ranks, { inputs: world.inputs, call, options: shape });
  const inputs = got.map((rank) => ({
    x: new Uint16Array(rank.x.buffer, rank.x.byteOffset, rank.x.length / 2),
    topkWeights: rank.topkWeights!,
  }));
  const combined = await Promise.all(all.map(async ({ graph: { results: { out } } }) => {
    return { x: await out.x.read(), topkWeights: await out.topkWeights!.read() };
  }));
  assertCombined(combined, referenceCombine(expected.handle, inputs, { hidden, masked: [] }), { hidden, numTopk });
}

async function buffers(more: Partial<BufferOptions> = {}): Promise<EpBuffer[]> {
  return await Promise.all(Group.local(spec.numRanks).map((g) => EpBuffer.create(g, { ...options, ...more })));
}
const closeAll = (all: readonly EpBuffer[]) => Promise.all(all.map((b) => b.close()));

suite("cuda: graphs", noCudaGraphs, () => {
  const seed = runSeed();
  for (const [layout, usual] of [["rank", 1000], ["expert", 300]] as const) {
    const count = replayCount(usual);
    test(`${count} replays, ${layout} layout, DEEPEP_SEED=${seed}`, { timeout: 120_000 }, async () => {
      const all = await buffers();
      try {
        const layers = all.map((b) => captured(b, layout));
        for (let i = 0; i < count; i++) {
          await replay(layers, layout, makeWorld(spec, seed + i)).catch((cause) => {
            throw new Error(`replay ${i}, DEEPEP_SEED=${seed}: ${cause.message}`, { cause });
          });
        }
        for (const b of all) assertEquals(b.stats().numDispatches, count);
        layers.forEach((rank) => rank.end());
      } finally {
        await closeAll(all);
      }
    });
  }

  for (const ue8m0 of [false, true]) {
    test(`FP8 rows with ${ue8m0 ? "UE8M0" : "f32"} scales, by topkIdx and by a kept handle: as eager calls`, async () => {
      const hidden = 256, numTokens = 4, numTopk = 2, numScales = ue8m0 ? 1 : 2, random = new Random(seed);
      await ranks(2, { hidden, numTopk, numSlots: 3, timeoutMs: 20_000 }, async (b) => {
        const random8 = (count: number) => Uint8Array.from({ length: count }, () => random.uint32() & 0xff);
        using data = b.tensor("f8e4m3", [numTokens, hidden], random8(numTokens * hidden));
        using scales = b.tensor(ue8m0 ? "i32" : "f32", [numTokens, numScales]),
          topkIdx = b.tensor("i32", [numTokens, numTopk]);
        const draw = () => {
          b.write(data, random8(numTokens * hidden));
          b.write(scales, random8(numTokens * numScales * 4));
          b.write(topkIdx, Int32Array.from({ length: numTokens * numTopk }, () => random.uint32() % 8));
        };
        const rows = async (recv: DispatchResult<{ data: Tensor; scales: Tensor }>, numRows: number) =>
          (await Promise.all([recv.x.data, recv.x.scales].map((part) => part.slice(0, numRows).read())))
            .map((values) => [...bytesOf(values)]);
        draw();
        using first = await b.dispatch({ data, scales }, { topkIdx }), handle = first.handle.keep();
        using graph = b.capture(b.stream, (operations) => ({
          routed: operations.dispatch({ data, scales }, { topkIdx }),
          again: operations.dispatch({ data, scales }, { handle }),
        }));
        const { routed, again } = graph.results;
        first.release();
        for (let i = 0; i < 3; i++) {
          draw();
          graph.launch();
          {
            using eager = await b.dispatch({ data, scales }, { topkIdx });
            const { numRows } = eager.handle.counts!;
            assertEquals(await rows(routed, numRows), await rows(eager, numRows));
          }
          using eager = await b.dispatch({ data, scales }, { handle });
          const { numRows } = handle.counts!;
          assertEquals(await rows(again, numRows), await rows(eager, numRows));
        }
        routed.release();
        again.release();
        handle.release();
      });
    });
  }

  test("replays and eager calls take turns, in any order", { timeout: 60_000 }, async () => {
    const all = await buffers({ numSlots: 3 });
    try {
      const both = (["rank", "expert"] as const).map((layout) => ({
        layout,
        layers: all.map((b) => captured(b, layout)),
      }));
      const random = new Random(seed);
      for (let i = 0; i < replayCount(100); i++) {
        const { layout, layers } = random.pick(both);
        if (random.chance(0.5)) await replay(layers, layout, makeWorld(spec, seed + i));
        else await Promise.all(all.map((b) => eager(b, seed + i)));
      }
      both.forEach(({ layers }) => layers.forEach((rank) => rank.end()));
    } finally {
      await closeAll(all);
    }
  });

  test("many replays are enqueued at once, and another stream orders after them", async () => {
    await ranks(2, {}, async (b) => {
      using counter = b.tensor("i32", [b.numLocalExperts], new Int32Array(b.numLocalExperts));
      using x = b.tensor("bf16", [4, 16], new Uint16Array(64).fill(0x3f80));
      using topkIdx = b.tensor("i32", [4, 2], Int32Array.of(0, 4, 0, 4, 0, 4, 0, 4));
      using graph = b.capture(
        b.stream,
        (operations) => operations.dispatch(x, { topkIdx, expertStats: counter }),
      );
      const other = b.createStream();
      const began = b.record();
      for (let i = 0; i < 50; i++) graph.launch();
      const last = graph.launch({ stream: b.stream });
      last.wait(other);
      assertEquals((await counter.read({ stream: other }))[0], 51 * 8);
      await last;
      assert(last.elapsedSince(began) > 0);
      graph.results.release();
      await b.destroyStream(other);
    });
  });

  for (const mode of ["normal", "low latency"] as const) {
    if (mode === "low latency" && noCudaLowLatency) continue;
    test(`a graph of more layers than slots, ${mode}: what is released in it goes to its later calls`, async () => {
      const layers = 7, value = 0x3f80, doubled = (times: number) => value + 0x80 * times; // bf16: 1, 2, 4, …
      await ranks(2, { numSlots: 2, maxLowLatencyTokensPerRank: 4 }, async (b) => {
        using x = b.tensor("bf16", [4, 16]), topkIdx = b.tensor("i32", [4, 2]);
        using topkWeights = b.tensor("f32", [4, 2], new Float32Array(8).fill(1));
        const outs = Array.from({ length: layers }, () => b.tensor("bf16", [4, 16]));
        const one = (operations: Recorder, from: Tensor, out: Tensor<"bf16">): Disposable => {
          if (mode === "normal") {
            const recv = operations.dispatch(from, { topkIdx });
            operations.combine(recv.x as Tensor<"bf16">, recv.handle, { out });
            return recv;
          }
          const recv = operations.lowLatencyDispatch(from, { topkIdx, fp8: false });
          const y = recv.x as unknown as Tensor<"bf16">;
          operations.lowLatencyCombine(y, { topkIdx, topkWeights, handle: recv.handle, out });
          return recv;
        };
        const graph = b.capture(b.stream, (operations) => {
          let before: Disposable | undefined; // both slots are in use at times
          outs.forEach((out, i) => {
            const recv = one(operations, i === 0 ? x : outs[i - 1]!, out);
            before?.[Symbol.dispose]();
            before = i % 3 === 2 ? void recv[Symbol.dispose]() : recv;
          });
          before?.[Symbol.dispose]();
        });
        for (let i = 0; i < replayCount(100); i++) {
          const shift = i % 3;
          x.write(new Uint16Array(64).fill(doubled(shift)));
          topkIdx.write(Int32Array.from({ length: 8 }, (_, k) => k % 2 === 0 ? (i + k) % 4 : 4 + (i + k) % 4));
          await graph.launch();
          for (const [layer, out] of outs.entries()) {
            assertEquals(
              [...await out.read()],
              new Array(64).fill(doubled(shift + layer + 1)),
              `replay ${i}, layer ${layer}`,
            );
          }
        }
        const held = await reasonOf(b.dispatch(x, { topkIdx }));
        assert(held instanceof EpError && held.code === "noFreeSlot" && held.message.includes("graph"), String(held));
        graph.release();
        for (let i = 0; i < 4; i++) await layer(b);
        outs.forEach((out) => out.release());
      });
    });
  }

  test("a slot can be released in the capture that took it, and in no other", async () => {
    await ranks(2, { numSlots: 3 }, async (b) => {
      using x = b.tensor("bf16", [4, 16], new Uint16Array(64)), topkIdx = b.tensor("i32", [4, 2], new Int32Array(8));
      const eager = await b.dispatch(x, { topkIdx });
      assertThrows(() => b.capture(b.stream, () => eager.release()), EpError, "was not taken in that capture");
      const other = b.createStream(); // takes no part in the capture
      assertThrows(
        () => b.capture(b.stream, ({ dispatch }) => dispatch(x, { topkIdx }).release({ stream: other })),
        EpError,
        "name a stream that takes part in it",
      );
      const graph = b.capture(b.stream, (operations) => operations.dispatch(x, { topkIdx }).release());
      assertThrows(() => b.capture(b.stream, () => graph.release()), EpError, "Cannot release a graph in a capture");
      graph.release();
      assertThrows(
        () =>
          b.capture(b.stream, (operations) => {
            operations.dispatch(x, { topkIdx }).release();
            throw new Error("my own");
          }),
        Error,
        "my own",
      );
      eager.release();
      const all = await Promise.all([1, 2, 3].map(() => b.dispatch(x, { topkIdx })));
      for (const recv of all) recv.release();
      for (let i = 0; i < 4; i++) await layer(b);
    });
  });

  test("events of a capture order what is captured with them, and are refused elsewhere", async () => {
    await ranks(2, {}, async (b) => {
      using x = b.tensor("bf16", [4, 16], new Uint16Array(64).fill(0x3f80));
      using topkIdx = b.tensor("i32", [4, 2], Int32Array.of(0, 4, 0, 4, 0, 4, 0, 4));
      const other = b.createStream(), before = b.record();
      await before;
      const refused = (use: () => unknown) => {
        const { code, message } = assertThrows(use, EpError);
        assertEquals(code, "invalidArgument");
        assert(message.includes("use the event of the replay"), message);
      };
      const ofNoUse = (events: readonly EpEvent[]) => {
        for (const event of events) {
          refused(() => event.done);
          refused(() => event.wait(other));
          refused(() => event.elapsedSince(before));
          refused(() => before.elapsedSince(event));
          refused(() => b.getDispatchLayout(topkIdx, { previousEvent: event }));
        }
      };
      const graph = b.capture(b.stream, (operations) => {
        const recv = operations.dispatch(x, { topkIdx, asyncFinish: true });
        recv.event.wait(operations.stream);
        const recorded = b.record(operations.stream);
        const out = operations.combine(recv.x, recv.handle, { previousEvent: recorded, asyncFinish: true });
        operations.barrier({ previousEvent: out.event });
        for (const event of [recv.event, recorded]) {
          refused(() => event.done);
          refused(() => event.wait(other));
        }
        return { recv, out, recorded };
      });
      const { recv, out, recorded } = graph.results, events = [recv.event, out.event, recorded];
      ofNoUse(events);
      const another = b.capture(b.stream, (operations) => {
        for (const event of events) refused(() => event.wait(operations.stream));
        for (const event of events) refused(() => operations.barrier({ previousEvent: event }));
        operations.barrier();
      });
      for (let i = 0; i < 2; i++) {
        const replay = graph.launch();
        replay.wait(other);
        assertEquals([...await out.x.read({ stream: other })], new Array(64).fill(0x4000)); // 1 + 1
        await replay;
        assert(replay.elapsedSince(before) > 0);
        await another.launch();
        ofNoUse(events);
      }
      for (const event of events) {
        const reason = await reasonOf(event);
        assert(reason instanceof EpError && reason.code === "invalidArgument", String(reason));
      }
      recv.release();
      out[Symbol.dispose]();
      graph.release();
      another.release();
      await b.destroyStream(other);
    });
  });

  test("a capture that fails leaves the buffer as it was", async () => {
    await ranks(2, {}, async (b) => {
      using x = b.tensor("bf16", [4, 16], new Uint16Array(64)), topkIdx = b.tensor("i32", [4, 2], new Int32Array(8));
      assertThrows(
        () =>
          b.capture(b.stream, (operations) => {
            operations.dispatch(x, { topkIdx });
            throw new Error("my own");
          }),
        Error,
        "my own",
      );
      assertThrows(() => b.capture(b.stream, (o) => o.dispatch(x, { topkIdx, numSms: 60_000 })), EpError);
      for (let i = 0; i < 4; i++) await layer(b);
      using graph = b.capture(b.stream, (operations) => operations.dispatch(x, { topkIdx }));
      await graph.launch();
      await layer(b);
      graph.results.release();
      assertEquals(assertThrows(() => graph.launch(), EpError).code, "closed");
      for (let i = 0; i < 4; i++) await layer(b);
    });
  });

  test("a peer that does not replay is named; after recover() replays are right again", async () => {
    const groups = Group.local(2);
    const all = await Promise.all(
      groups.map((g) => EpBuffer.create(g, { ...tiny, backend: "cuda", timeoutMs: 400, numTopk: 2 })),
    );
    try {
      const parts = all.map((b) => {
        const x = b.tensor("bf16", [4, 16], new Uint16Array(64).fill(0x3f80 + b.rank));
        const topkIdx = b.tensor("i32", [4, 2], Int32Array.of(0, 4, 0, 4, 0, 4, 0, 4));
        return { x, topkIdx, graph: b.capture(b.stream, (operations) => operations.dispatch(x, { topkIdx })) };
      });
      const right = async () => {
        await Promise.all(parts.map(({ graph }) => graph.launch()));
        for (const { graph } of parts) {
          const first = (await graph.results.x.slice(0, 8).read()).filter((_, i) => i % 16 === 0);
          assertEquals([...first], [...new Array(4).fill(0x3f80), ...new Array(4).fill(0x3f81)]);
        }
      };
      await right();
      const replay = parts[0]!.graph.launch(), reason = await reasonOf(replay);
      assert(reason instanceof EpError && reason.code === "timeout" && reason.peer === 1, String(reason));
      eventStruct.pack({});
      all[0]!.core.device.call("deepep_event_query", replay.address, eventStruct, "event");
      assertEquals([eventStruct.get("done"), eventStruct.get("status")], [1, constants.ERROR.TIMEOUT[0]]);
      assert(await reasonOf(parts[0]!.graph.results.x.read()) instanceof EpError);
      assertEquals(all[0]!.failed, true);
      await Promise.all(all.map((b) => b.recover()));
      for (let i = 0; i < 3; i++) await right();
      for (const { x, topkIdx, graph } of parts) {
        graph.results.release();
        graph.release();
        x.release();
        topkIdx.release();
      }
    } finally {
      await closeAll(all);
    }
  });
});

suite("cuda graphs: failures that nobody looks at", noCudaGraphs, () => {
  /** The event loop's: the library's own thread looks now and then. */
  const standStill = (ms: number) => {
    for (const until = performance.now() + ms; performance.now() < until;);
  };
  const outcome = (event: EpEvent): Promise<EpError | undefined> =>
    Promise.resolve(event).then(() => undefined, (error) => error as EpError);

  test("more refused calls than are kept fail their replay, and nothing around it", { timeout: 60_000 }, async () => {
    await ranks(2, { timeoutMs: 20_000 }, async (b, rank) => {
      using x = b.tensor("bf16", [1, 16]);
      using good = b.tensor("i32", [1, 1], Int32Array.of(0)),
        bad = b.tensor("i32", [1, 1], Int32Array.of(rank === 0 ? 99 : 0));
      const dispatches = (topkIdx: Tensor, count: number) =>
        b.capture(b.stream, (operations) => {
          for (let i = 0; i < count; i++) operations.dispatch(x, { topkIdx }).release();
        });
      using refused = dispatches(bad, replayCount(600)), fine = dispatches(good, 2);
      await fine.launch();
      const events = [refused.launch(), fine.launch(), b.barrier()];
      standStill(300);
      const reasons = await Promise.all(events.map(outcome));
      assertEquals(reasons.map((reason) => reason !== undefined), [true, false, false], String(reasons));
      assertEquals(b.failed, false);
      assertEquals(b.stats().numFailures, replayCount(600));
      await fine.launch();
    });
  });

  test(
    "when a call fails half-way, replays behind it fail, but for those that need no peer",
    { timeout: 60_000 },
    async () => {
      await ranks(2, { timeoutMs: 300 }, async (b, rank, group) => {
        using bytes = b.tensor("u8", [64], new Uint8Array(64).fill(rank + 1)), copied = b.tensor("u8", [64]);
        using barriers = b.capture(b.stream, (operations) => {
          for (let i = 0; i < 1100; i++) operations.barrier();
        });
        using copies = b.capture(b.stream, () => b.core.copy(copied.address, bytes.address, 64));
        const before = b.barrier();
        await group.barrier(); // one thread has both ranks
        if (rank === 0) {
          const events = [barriers.launch(), b.barrier(), copies.launch(), barriers.launch(), copies.launch()];
          standStill(600);
          const codes = (await Promise.all([before, ...events].map(outcome))).map((reason) => reason?.code);
          assertEquals(codes, [undefined, "timeout", "needsRecovery", undefined, "needsRecovery", undefined]);
          const reason = await reasonOf(events[0]!) as EpError;
          assertEquals(reason.peer, 1, reason.message);
          assertEquals([...await copied.read()], new Array(64).fill(1));
          assertEquals([b.failed, b.stats().numFailures], [true, 2201]);
          assertEquals(assertThrows(() => barriers.launch(), EpError).code, "needsRecovery");
          await copies.launch();
        } else {
          await before;
        }
        await group.barrier();
        await b.recover();
        await barriers.launch();
      });
    },
  );
});

/** An eager layer on the same buffers: identity experts, small integers, exact sums. */
async function eager(b: EpBuffer, seed: number): Promise<void> {
  const world = makeWorld({ ...spec, values: "integers" }, seed), { numTokens, topkIdx, x } = world.inputs[b.rank]!;
  using rows = b.tensor("bf16", [numTokens, spec.hidden], new Uint16Array(x.slice().buffer));
  using routes = b.tensor("i32", [numTokens, spec.numTopk], topkIdx as Int32Array);
  using recv = await b.dispatch(rows, { topkIdx: routes });
  using out = await b.combine(recv.x, recv.handle);
  const shape = { ...options, numRanks: spec.numRanks, maxRecvTokens: MAX_ROWS, numTopk: spec.numTopk };
  const { ranks, handle } = referenceDispatch(world.inputs, shape);
  const back = ranks.map((rank) => ({ x: new Uint16Array(rank.x.slice().buffer) }));
  const want = referenceCombine(handle, back, { hidden: spec.hidden, masked: [] })[b.rank]!;
  assertEquals([...await out.x.read()], [...want.x]);
}
