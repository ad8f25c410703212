/**
 * Peers that are late, silent or gone, in each phase of each operation, all in one process. Late peers change nothing;
 * silent ones end in a typed error that names them within the deadline, or are masked when the buffer was asked to; the
 * survivors go on after `recover()`. In: a backend. Out: tests. Killed processes are in process_cases.ts.
 */
import { describe, test } from "node:test";
import { assert, assertEquals, assertThrows } from "@std/assert";
import { EpBuffer, EpError, Group, type OperationOptions, Tensor } from "@deepep/deepep";
import type { constants } from "../../lib/ffi/abi.ts";
import { struct } from "../../lib/ffi/struct.ts";
import { limitCases } from "./limit_cases.ts";
import { inject, ranksOf, reasonOf, tiny } from "./ranks.ts";
import { input, lowLatencyLayer, normalLayer, NUM_TOKENS, route } from "./small_layers.ts";
import { type BackendSubject, suite } from "./suite.ts";

const recoverStruct = struct("deepep_buffer_recover_args");

type Op = keyof typeof constants.OP;
type PhaseName = keyof typeof constants.PHASE;

/** Of calls in which a peer is silent. All others have the buffer's long deadline: a busy machine is no silent peer. */
const SHORT: OperationOptions = { timeoutMs: 500 };

const lowLatencyHalves: typeof normalLayer = (b, gone, call) => lowLatencyLayer(b, gone, { ...call, recvHook: true });
const lowLatencyCast: typeof normalLayer = (b, gone, call) => lowLatencyLayer(b, gone, { ...call, cast: true });

/** Few tokens still, but more than one block of a GPU sends. */
const TEN = 10;
const tenTokens: typeof normalLayer = (b, gone, call) => normalLayer(b, gone, call, TEN);

type Phase = [Op, PhaseName, typeof normalLayer];
const tenTokensPhases = (["NOTIFY", "SEND", "ARRIVE"] as const).map((phase): Phase => ["DISPATCH", phase, tenTokens]);
const normalPhases: Phase[] = [
  ["DISPATCH", "NOTIFY", normalLayer],
  ["DISPATCH", "SEND", normalLayer],
  ["DISPATCH", "ARRIVE", normalLayer],
  ["COMBINE", "PUBLISH", normalLayer],
  ["COMBINE", "REDUCE", normalLayer],
];
const lowLatencyPhases: Phase[] = [lowLatencyLayer, lowLatencyHalves, lowLatencyCast].flatMap((layer): Phase[] => {
  const dispatch: Phase[] = (["NOTIFY", "SEND", "ARRIVE"] as const).map((
    phase,
  ) => ["LOW_LATENCY_DISPATCH", phase, layer]);
  const combine: Phase[] = (["PUBLISH", "REDUCE"] as const).map((phase) => ["LOW_LATENCY_COMBINE", phase, layer]);
  return layer === lowLatencyCast ? dispatch : [...dispatch, ...combine];
});
const variants = new Map([
  [lowLatencyHalves, ", in two halves"],
  [lowLatencyCast, ", cast"],
  [tenTokens, ", ten tokens"],
]);
const inWords = (op: Op, phase: PhaseName, layer: typeof normalLayer): string =>
  `in ${op} ${phase}${variants.get(layer) ?? ""}`;

/** Registers the cases. */
export function runFailureCases({ name, backend, skip, skipLowLatency }: BackendSubject): void {
  suite(`${name}: peers that are late, silent or gone`, skip, () => {
    everyCase(ranksOf(backend), backend, normalPhases, !skipLowLatency);
  });
  suite(`${name}: peers that are late, silent or gone, low latency`, skip || skipLowLatency, () => {
    lowLatencyCases(ranksOf(backend), backend);
  });
}

type Ranks = ReturnType<typeof ranksOf>;

function lowLatencyCases(ranks: Ranks, backend: BackendSubject["backend"]): void {
  lateCases(ranks, lowLatencyPhases);
  silentCases(backend, lowLatencyPhases);
  test("a late peer is in the wait statistics, a typed array, and nobody else", async () => {
    await ranks(3, {}, async (b, rank) => {
      using waitStats = b.tensor("i64", [3], new BigInt64Array(3));
      const late = [["DISPATCH", "NOTIFY"], ["DISPATCH", "SEND"], ["COMBINE", "PUBLISH"]] as const;
      let before = await waitStats.read();
      for (const [op, phase] of late) {
        for (const recvHook of [false, true]) {
          await b.barrier(); // so that nobody is late for another reason
          if (rank === 1) inject(b, `LOW_LATENCY_${op}`, phase, "DELAY", 150_000);
          await waitingLayer(b, waitStats, recvHook);
          const after = await waitStats.read(), grown = [...after].map((ns, i) => Number(ns - before[i]!) / 1e6);
          assert(after instanceof BigInt64Array);
          const what = `rank ${rank}, ${op} ${phase}, recvHook ${recvHook}: ${grown} ms`;
          assertEquals(grown[rank], 0, what);
          if (rank !== 1) assert(grown[1]! > 100 && grown[1]! < 5000, what);
          before = after;
        }
      }
      // Of all calls: the other peer has had to wait as well, and a busy machine can hold it up once.
      if (rank !== 1) assert(before[2 - rank]! < before[1]! / 2n, `rank ${rank}: ${before} ns`);
    });
  });
  test("a masked peer that is taken in again takes part again", async () => {
    await ranks(3, {}, async (b, rank) => {
      await lowLatencyLayer(b);
      if (rank !== 1) {
        b.maskRank(1);
        assertEquals(b.maskedRanks, [1]);
        for (let i = 0; i < 3; i++) await lowLatencyLayer(b, [1]);
        b.unmaskRank(1);
      }
      assertEquals(b.maskedRanks, []);
      await b.recover(); // epochs ran apart
      for (let i = 0; i < 3; i++) await lowLatencyHalves(b);
      assertEquals(b.stats().numFailures, 0);
    });
  });
  test("a result released before its combine was received leaves nobody waiting", async () => {
    await ranks(2, { timeoutMs: 3000 }, async (b, rank) => {
      using x = input(b), topkIdx = b.tensor("i32", [NUM_TOKENS, 2], route(rank));
      using topkWeights = b.tensor("f32", [NUM_TOKENS, 2], new Float32Array(2 * NUM_TOKENS).fill(1));
      const recv = b.lowLatencyDispatch(x, { topkIdx, fp8: false });
      const handle = recv.handle;
      using out = b.lowLatencyCombine(recv.x, { topkIdx, topkWeights, handle, recvHook: rank === 0 });
      if (rank === 1) await out.received(); // rank 0 never asks for its own
      recv.release();
      for (let i = 0; i < 4; i++) await lowLatencyLayer(b); // both slots, twice
      for (let i = 0; i < 4; i++) await normalLayer(b);
      assertEquals(b.stats().numFailures, 0);
    });
  });
}

/** A low-latency layer that adds to `waitStats`; what it computes is checked elsewhere. */
async function waitingLayer(b: EpBuffer, waitStats: Tensor<"i64">, recvHook: boolean): Promise<void> {
  using x = input(b), topkIdx = b.tensor("i32", [NUM_TOKENS, 2], route(b.rank));
  using topkWeights = b.tensor("f32", [NUM_TOKENS, 2], new Float32Array(2 * NUM_TOKENS).fill(1));
  using recv = b.lowLatencyDispatch(x, { topkIdx, fp8: false, recvHook, waitStats });
  await recv.received();
  const { handle } = recv;
  using out = b.lowLatencyCombine(recv.x, { topkIdx, topkWeights, handle, recvHook, waitStats });
  await out.received();
}

function lateCases(ranks: Ranks, phases: readonly Phase[]): void {
  for (const [op, phase, layer] of phases) {
    test(`${inWords(op, phase, layer)} changes nothing`, async () => {
      await ranks(4, {}, async (b, rank) => {
        for (let round = 0; round < 4; round++) {
          if (rank === round) inject(b, op, phase, "DELAY", 30_000);
          await layer(b);
        }
        assertEquals(b.stats().numFailures, 0);
      });
    });
  }
}

function silentCases(backend: BackendSubject["backend"], phases: readonly Phase[]): void {
  for (const [op, phase, layer] of phases) {
    test(`silent ${inWords(op, phase, layer)}: the others fail with its name, then go on without it`, async () => {
      const groups = Group.local(4);
      const options = { ...tiny, backend, maxTokensPerRank: TEN };
      const buffers = await Promise.all(groups.map((g) => EpBuffer.create(g, options)));
      try {
        inject(buffers[1]!, op, phase, "STALL");
        const reasons = await Promise.all(buffers.map((b) =>
          reasonOf(layer(b, [], SHORT).then(() => "went well"))
            .catch(() => "went well" as const)
        ));
        // A rank whose part was over before the silence began may have finished; who waited must name rank 1.
        const failed = reasons.filter((r): r is EpError => r instanceof EpError);
        assert(failed.length > 0, `${op} ${phase}`);
        for (const reason of failed) {
          if (reason.rank !== 1) assertEquals(reason.peer, 1, reason.message);
          assert(reason.phase !== undefined, reason.message);
        }
        const rest = buffers.filter((b) => b.rank !== 1);
        await Promise.all(rest.map((b) => b.recover({ masked: [1] })));
        for (const b of rest) assertEquals(b.maskedRanks, [1]);
        for (let i = 0; i < 3; i++) await Promise.all(rest.map((b) => layer(b, [1])));
      } finally {
        await Promise.all(buffers.map((b) => b.close()));
      }
    });
  }
}

function everyCase(
  ranks: Ranks,
  backend: BackendSubject["backend"],
  phases: readonly Phase[],
  lowLatency: boolean,
): void {
  describe("a late peer", () => {
    lateCases(ranks, phases);
    test("is visible in the wait statistics of the others", async () => {
      await ranks(2, {}, async (b, rank) => {
        if (rank === 1) inject(b, "DISPATCH", "NOTIFY", "DELAY", 300_000); // rank 0 itself may be late on a busy machine
        await normalLayer(b);
        if (rank === 0) assert(b.stats().dispatchWaitNs[1]! > 30_000_000n, String(b.stats().dispatchWaitNs));
      });
    });
  });

  describe("a peer that never comes", () => {
    test("is named within the deadline; the buffer recovers", async () => {
      let waiting = 3;
      const told = Promise.withResolvers<void>();
      await ranks(4, {}, async (b, rank) => {
        await normalLayer(b);
        if (rank === 2) { // misses one call
          await told.promise;
        } else {
          const began = performance.now(),
            reason = await reasonOf(
              normalLayer(b, [], SHORT).finally(() => {
                if (--waiting === 0) told.resolve();
              }),
            );
          assert(reason instanceof EpError, String(reason));
          assert(performance.now() - began < 3000);
          assert(reason.code === "timeout" || reason.code === "aborted", reason.code);
          assertEquals(reason.peer, 2);
          assert(reason.message.includes("rank 2") || reason.message.includes("2"), reason.message);
          assertEquals(b.failed, true);
          const next = await reasonOf(normalLayer(b));
          assert(next instanceof EpError && next.code === "needsRecovery" && next.peer === 2, String(next));
        }
        await b.recover();
        assertEquals(b.failed, false);
        for (let i = 0; i < 3; i++) await normalLayer(b);
        if (lowLatency) await lowLatencyLayer(b);
      });
    });
    silentCases(backend, [...phases, ...tenTokensPhases]);
    test("a recovery that fails on one rank fails on all, and they can try again", async () => {
      await ranks(3, {}, async (b, rank) => {
        await normalLayer(b);
        const { core } = b, { call } = core;
        if (rank === 1) {
          core.call = (name, args, op) => {
            if (name === "deepep_buffer_recover") { // once with an epoch that is over
              recoverStruct.pack({ epoch: 0n, masked_ranks: 0n });
              core.call = call;
              args = recoverStruct;
            }
            call.call(core, name, args, op);
          };
        }
        const reason = await reasonOf(b.recover());
        assert(reason instanceof EpError, String(reason));
        assertEquals(`${reason.code} ${reason.peer}`, rank === 1 ? "invalidArgument undefined" : "aborted 1");
        await b.recover();
        await normalLayer(b);
      });
    });
    test("with maskOnTimeout the survivors' results are those of a world without it", async () => {
      const groups = Group.local(4);
      const buffers = await Promise.all(
        groups.map((g) => EpBuffer.create(g, { ...tiny, backend, maskOnTimeout: true })),
      );
      try {
        const first = lowLatency ? lowLatencyLayer : normalLayer;
        await Promise.all(buffers.map((b) => first(b)));
        const rest = buffers.filter((b) => b.rank !== 3);
        await Promise.all(rest.map((b) => first(b, [3], SHORT)));
        await Promise.all(rest.map((b) => normalLayer(b, [3])));
        for (const b of rest) {
          assertEquals(b.maskedRanks, [3]);
          assertEquals(b.stats().numFailures, 0);
        }
      } finally {
        await Promise.all(buffers.map((b) => b.close()));
      }
    });
    test("a masked peer that is taken in again takes part again", async () => {
      const groups = Group.local(2);
      const buffers = await Promise.all(groups.map((g) => EpBuffer.create(g, { ...tiny, backend })));
      const [a, b] = buffers as [EpBuffer, EpBuffer];
      try {
        a.maskRank(1);
        await normalLayer(a, [1]);
        a.unmaskRank(1);
        await Promise.all([a.recover(), b.recover()]); // epochs ran apart
        await Promise.all([normalLayer(a), normalLayer(b)]);
      } finally {
        await Promise.all(buffers.map((x) => x.close()));
      }
    });
    test("a peer that closed is lost at once, not after the deadline", async () => {
      const groups = Group.local(2);
      const [a, b] = await Promise.all(groups.map((g) => EpBuffer.create(g, { ...tiny, backend, timeoutMs: 20_000 })));
      await b!.close();
      const began = performance.now(), reason = await reasonOf(normalLayer(a!));
      assert(reason instanceof EpError && reason.code === "peerLost" && reason.peer === 1, String(reason));
      assert(performance.now() - began < 5000);
      await a!.close();
    });
  });

  test("calls that fail one after another all fail", { timeout: 60_000 }, async () => {
    await ranks(2, {}, async (b, rank, group) => {
      if (rank === 0) {
        // As many as a stream takes without making the host wait.
        const calls = Array.from({ length: 900 }, () => b.barrier({ timeoutMs: 200 }));
        const until = performance.now() + 400;
        while (performance.now() < until); // the event loop stands still
        const codes = await Promise.all(
          calls.map(async (call) => ((await reasonOf(call)) as EpError).code),
        );
        assertEquals([codes[0], ...new Set(codes.slice(1))], ["timeout", "needsRecovery"]);
      }
      await group.barrier();
      await b.recover();
      await b.barrier();
    });
  });

  test("ranks that call different operations are told which", async () => {
    await ranks(2, { timeoutMs: 1000 }, async (b, rank) => {
      const reason = await reasonOf(rank === 0 ? normalLayer(b) : lowLatency ? lowLatencyLayer(b) : b.barrier());
      assert(reason instanceof EpError, String(reason));
      assert(reason.code === "mismatch" || reason.code === "aborted", `${reason.code}: ${reason.message}`);
    });
  });

  test("ranks that give different arguments are told which", async () => {
    await ranks(2, { timeoutMs: 1000 }, async (b, rank) => {
      using x = input(b), topkIdx = b.tensor("i32", [NUM_TOKENS, 2], route(rank));
      const reason = await reasonOf(b.dispatch(x, { topkIdx, expertAlignment: rank === 0 ? 1 : 4 }));
      assert(reason instanceof EpError && reason.code === "mismatch", String(reason));
      assert(reason.message.includes("expert_alignment"), reason.message);
      assertEquals(b.failed, false);
      await normalLayer(b);
    });
  });

  test("three ranks, of which two give different arguments and one calls something else", async () => {
    await ranks(3, { timeoutMs: 5000 }, async (b, rank) => {
      using x = input(b), topkIdx = b.tensor("i32", [NUM_TOKENS, 2], route(rank));
      const reason = await reasonOf(
        rank === 1 ? b.barrier() : b.dispatch(x, { topkIdx, expertAlignment: rank === 0 ? 1 : 4 }),
      );
      assert(reason instanceof EpError && reason.code === "mismatch", String(reason));
      assertEquals(b.failed, false);
      await normalLayer(b);
    });
  });

  test("a late rank hears at once that one which has given up gives other arguments", async () => {
    await ranks(3, { timeoutMs: 20_000 }, async (b, rank) => {
      using x = input(b), topkIdx = b.tensor("i32", [NUM_TOKENS, 2], route(rank));
      if (rank === 0) inject(b, "DISPATCH", "NOTIFY", "DELAY", 1_200_000);
      const began = performance.now();
      const call = rank === 0 ? {} : SHORT, expertAlignment = rank === 2 ? 4 : 1;
      const reason = await reasonOf(b.dispatch(x, { topkIdx, expertAlignment, ...call }));
      assert(reason instanceof EpError, String(reason));
      if (rank !== 0) return;
      assert(reason.code === "mismatch" || reason.code === "aborted", String(reason));
      assert(performance.now() - began < 10_000);
    });
  });

  test("a rank that was left out hears at which call the others are", async () => {
    await ranks(2, { timeoutMs: 20_000 }, async (b, rank) => {
      if (rank === 0) {
        b.maskRank(1);
        for (let i = 0; i < 8; i++) await b.barrier(); // as far that the message lies where the first one would
        b.unmaskRank(1);
      } else {
        await new Promise((resolve) => setTimeout(resolve, 300)); // it comes last
      }
      const reason = await reasonOf(b.barrier(rank === 0 ? SHORT : {}));
      assert(reason instanceof EpError, String(reason));
      if (rank === 0) return;
      assert(reason.code === "mismatch" && reason.message.includes("rank 0 is at call 9"), String(reason));
      assertEquals(b.failed, false);
    });
  });

  test("a recovery's epoch is none that an old word could match", async () => {
    await ranks(1, {}, async (b) => {
      await b.barrier();
      const recover = struct("deepep_buffer_recover_args");
      const to = (epoch: bigint) => () => b.core.call("deepep_buffer_recover", recover.pack({ epoch }), "recover");
      for (const epoch of [2n ** 32n - 2n ** 21n + 1n, 2n ** 32n + 1n, 2n ** 32n + 2n ** 21n, 2n ** 33n]) {
        assertThrows(to(epoch), EpError, `epoch is ${epoch}, about a multiple of 2^32 above the 1 of this rank`);
      }
      assertThrows(to(2n ** 47n + 1n), EpError, "at most 140737488355328");
      to(2n ** 31n + 5n)();
      await b.barrier();
      to(2n ** 31n + 2n ** 32n - 2n ** 21n)();
      await b.barrier();
    });
  });

  for (const numTokens of [1, 3, 10, 64]) {
    test(`a count of tokens that no expert can have is refused, ${numTokens} tokens`, async () => {
      await ranks(2, { maxTokensPerRank: 64 }, async (b, rank) => {
        using x = b.tensor("bf16", [numTokens, 16]);
        using isTokenInRank = b.tensor("bool", [numTokens, 2], new Uint8Array(2 * numTokens).fill(1));
        using numTokensPerExpert = b.tensor(
          "i32",
          [8],
          Int32Array.from({ length: 8 }, (_, e) => rank + e === 5 ? -7 : 1),
        );
        const reason = await reasonOf(b.dispatch(x, { dispatchLayout: { isTokenInRank, numTokensPerExpert } }));
        assert(reason instanceof EpError && reason.code === "invalidArgument", String(reason));
        assert(reason.message.includes(`num_tokens_per_expert[${5 - rank}] is -7`), reason.message);
        assertEquals(b.failed, false);
        await normalLayer(b);
      });
    });
  }

  test("a rank without tokens hears that the others disagree about weights", async () => {
    await ranks(3, { timeoutMs: 5000 }, async (b, rank) => {
      const numTokens = rank === 2 ? 0 : NUM_TOKENS;
      using x = b.tensor("bf16", [numTokens, 16]);
      using topkIdx = b.tensor("i32", [numTokens, 2], route(rank).subarray(0, 2 * numTokens));
      using topkWeights = b.tensor("f32", [numTokens, 2]);
      const reason = await reasonOf(b.dispatch(x, { topkIdx, ...(rank === 0 ? { topkWeights } : {}) }));
      assert(reason instanceof EpError && reason.code === "mismatch", String(reason));
      assert(reason.message.includes("topk_weights"), reason.message);
      assert(rank !== 2 || reason.message.includes("1 on rank 0, 0 on rank 1"), reason.message);
      assertEquals(b.failed, false);
      await normalLayer(b);
    });
  });

  limitCases(ranks, lowLatency);

  test("a dispatch that fails leaves no counts of an earlier one on the device", async () => {
    await ranks(1, { maxRecvTokens: 2, numSlots: 1 }, async (b) => {
      using two = b.tensor("bf16", [2, 16]), twice = b.tensor("i32", [2, 2], Int32Array.of(0, 1, 2, 3));
      using first = await b.dispatch(two, { topkIdx: twice });
      assertEquals([...await first.counts.numRows.read()], [2, 2]);
      first.release();
      using three = input(b), topkIdx = b.tensor("i32", [NUM_TOKENS, 2], route(0));
      using failed = await b.dispatch(three, { topkIdx, cpuSync: false });
      const reason = await reasonOf(failed.event);
      assert(reason instanceof EpError && reason.code === "capacity", String(reason));
      assertEquals([...await b.read(Tensor.from(failed.counts.numRows.address, "i32", [2]))], new Array(8).fill(0));
    });
  });
}
