/**
 * Low latency in CUDA graphs, what the host is told of it: counters of replays, which tell the host nothing by themselves,
 * and halves of calls that would not be in the same graph.
 */
import { test } from "node:test";
import { assert, assertEquals, assertThrows } from "@std/assert";
import { type EpBuffer, EpError, type LowLatencyResult, type Tensor } from "@deepep/deepep";
import { noCudaGraphs, noCudaLowLatency } from "./support/cuda.ts";
import { ranksOf } from "./support/ranks.ts";
import { suite } from "./support/suite.ts";

const HIDDEN = 128;
const NUM_TOKENS = 3;

/** A rank whose token t goes to expert t and the one after it; rank 0 has experts 0 and 1, rank 1 experts 2 and 3. */
function inputsOf(b: EpBuffer): { x: Tensor<"bf16">; topkIdx: Tensor<"i32">; topkWeights: Tensor<"f32">; end(): void } {
  const x = b.tensor("bf16", [NUM_TOKENS, HIDDEN], new Uint16Array(NUM_TOKENS * HIDDEN).fill(0x3f80));
  const topkIdx = b.tensor("i32", [NUM_TOKENS, 2], Int32Array.of(0, 1, 1, 2, 2, 3));
  const topkWeights = b.tensor("f32", [NUM_TOKENS, 2], new Float32Array(2 * NUM_TOKENS).fill(1));
  const end = () => [x, topkIdx, topkWeights].forEach((tensor) => tensor.release());
  return { x, topkIdx, topkWeights, end };
}

const shape = { hidden: HIDDEN, numExperts: 4, numTopk: 2, maxLowLatencyTokensPerRank: NUM_TOKENS, timeoutMs: 20_000 };
async function onRanks(body: (b: EpBuffer) => Promise<void>): Promise<void> {
  await ranksOf("cuda")(2, shape, body);
}

suite("cuda: low latency in graphs", noCudaLowLatency || noCudaGraphs, () => {
  for (const recvHook of [false, true]) {
    test(`calls of replays are counted, ${recvHook ? "in halves" : "in one piece"}`, () =>
      onRanks(async (b) => {
        const { x, topkIdx, topkWeights, end } = inputsOf(b);
        const graph = b.capture(b.stream, (operations) => {
          const recv = operations.lowLatencyDispatch(x, { topkIdx, fp8: false, recvHook });
          recv.hook();
          const out = operations.lowLatencyCombine(recv.x, { topkIdx, topkWeights, handle: recv.handle, recvHook });
          out.hook();
          return { recv, out };
        });
        assertEquals([b.stats().numDispatches, b.stats().numCombines], [0, 0]);
        for (let i = 1; i <= 3; i++) {
          await graph.launch();
          const stats = b.stats();
          assertEquals([stats.numDispatches, stats.numCombines, stats.numFailures], [i, i, 0]);
          assertEquals([stats.rowsSent, stats.bytesSent, stats.rowsPulled], [6 * i, 6 * i * 2 * HIDDEN, 6 * i]);
          assertEquals(b.core.stats().epoch, BigInt(2 * i));
          assertEquals([stats.dispatchWaitNs[b.rank], stats.combineWaitNs[b.rank]], [0n, 0n]);
        }
        // A call between replays, of which the host hears, goes on from there.
        const recv = b.lowLatencyDispatch(x, { topkIdx, fp8: true });
        await recv.received();
        await graph.launch();
        const { numDispatches, numCombines, bytesSent } = b.stats();
        assertEquals([numDispatches, numCombines, b.core.stats().epoch], [5, 4, 9n]);
        assertEquals(bytesSent, 4 * 6 * 2 * HIDDEN + 6 * (HIDDEN + 4));
        recv.release();
        graph.results.recv.release();
        graph.results.out[Symbol.dispose]();
        graph.release();
        end();
      }));
  }

  test("a rank that does not replay is masked, and everybody knows it at once", async () => {
    const masking = { ...shape, maskOnTimeout: true, timeoutMs: 300 };
    await ranksOf("cuda")(3, masking, async (b) => {
      const { x, topkIdx, topkWeights, end } = inputsOf(b);
      const graph = b.capture(b.stream, (operations) => {
        const recv = operations.lowLatencyDispatch(x, { topkIdx, fp8: false });
        const out = operations.lowLatencyCombine(recv.x, { topkIdx, topkWeights, handle: recv.handle });
        return { recv, out };
      });
      if (b.rank < 2) {
        await graph.launch();
        const { epoch } = b.core.stats();
        assertEquals([b.maskedRanks, b.failed, epoch], [[2], false, 2n]);
        await graph.launch();
        assertEquals([b.maskedRanks, b.stats().numCombines, b.stats().numFailures], [[2], 2, 0]);
      }
      graph.results.recv.release();
      graph.results.out[Symbol.dispose]();
      graph.release();
      end();
    });
  });

  test("both halves are part of the same graph, or of none", () =>
    onRanks(async (b) => {
      const { x, topkIdx, topkWeights, end } = inputsOf(b);
      const options = { topkIdx, fp8: false, recvHook: true } as const;
      const graph = b.capture(b.stream, (operations) => operations.lowLatencyDispatch(x, options));
      const refused = (half: () => unknown, words: string) => {
        const { code, message } = assertThrows(half, EpError);
        assertEquals(code, "invalidArgument");
        assert(message.includes(words), message);
      };
      refused(() => graph.results.hook(), "its send half was captured");
      await graph.launch();
      refused(() => graph.results.hook(), "its send half was captured");
      const recv: LowLatencyResult<Tensor<"bf16">> = b.lowLatencyDispatch(x, options);
      refused(() => b.capture(b.stream, () => recv.hook()), "its send half was not captured");
      await recv.received();
      // A combine that nobody receives is given up with its slot, and the next one finds the region free.
      for (let i = 0; i < 2; i++) {
        const again = i === 0 ? recv : b.lowLatencyDispatch(x, { topkIdx, fp8: false });
        using out = b.lowLatencyCombine(again.x, { topkIdx, topkWeights, handle: again.handle, recvHook: i === 0 });
        if (i === 1) assertEquals((await out.x.read())[0], 0x4000); // 1 + 1
        again.release();
      }
      graph.results.release();
      graph.release();
      end();
    }));
});
