/**
 * What graphs of captured calls look like: a node for each kernel, one after another. With side branches CUDA would run a graph
 * over several channels, where graphs of ranks that share a device hold each other up. In: a kernel of the caller's between the
 * calls, and the runtime's own view of the graph, by scripts/decode. Nothing is compared: cuda_graph_test.ts does that.
 */
import { test } from "node:test";
import { assertEquals } from "@std/assert";
import type { EpBuffer, Recorder, Tensor } from "@deepep/deepep";
import { type DecodeKernels, decodeKernels } from "../scripts/decode/kernels.ts";
import { noCudaDecode, noCudaGraphs } from "./support/cuda.ts";
import { ranksOf } from "./support/ranks.ts";
import { suite } from "./support/suite.ts";

const HIDDEN = 128, NUM_TOKENS = 3, STEPS = 3;
const shape = { hidden: HIDDEN, numExperts: 4, numTopk: 2, maxTokensPerRank: NUM_TOKENS, numSlots: STEPS };

interface Inputs {
  readonly x: Tensor<"bf16">;
  readonly topkIdx: Tensor<"i32">;
  readonly topkWeights: Tensor<"f32">;
}

/** Records a step; `compute` enqueues a kernel of the caller's. Answers what must be released. */
type Step = (operations: Recorder, inputs: Inputs, compute: () => void) => Disposable[];

const lowLatency = (recvHook: boolean): Step => (operations, { x, topkIdx, topkWeights }, compute) => {
  const recv = operations.lowLatencyDispatch(x, { topkIdx, fp8: false, recvHook });
  recv.hook();
  compute();
  const out = operations.lowLatencyCombine(recv.x, { topkIdx, topkWeights, handle: recv.handle, recvHook });
  out.hook();
  return [recv, out];
};

/** Calls whose order the caller keeps by events, though nothing runs beside them. */
const byEvents: Step = (operations, { x, topkIdx }, compute) => {
  const recv = operations.dispatch(x, { topkIdx, asyncFinish: true });
  recv.event.wait(operations.stream);
  compute();
  const out = operations.combine(recv.x, recv.handle, { asyncFinish: true });
  const last = operations.barrier({ previousEvent: out.event, asyncFinish: true });
  last.wait(operations.stream);
  return [recv, out];
};

/** Of each step, and how many kernels it is. */
const steps: readonly (readonly [string, number, Step])[] = [
  ["low-latency calls", 3, lowLatency(false)],
  ["low-latency calls in halves", 5, lowLatency(true)],
  ["calls of normal mode", 3, (operations, { x, topkIdx }, compute) => {
    const recv = operations.dispatch(x, { topkIdx });
    compute();
    return [recv, operations.combine(recv.x, recv.handle)];
  }],
  ["calls with the caller's events", 4, byEvents],
];

suite("cuda: shapes of graphs", noCudaDecode || noCudaGraphs, () => {
  for (const [name, numKernels, record] of steps) {
    test(`${name}: a chain`, async () => {
      await ranksOf("cuda")(2, { ...shape, maxLowLatencyTokensPerRank: NUM_TOKENS, timeoutMs: 20_000 }, async (b) => {
        const kernels = decodeKernels() as DecodeKernels, inputs = inputsOf(b), at = b.tensor("i64", [1]);
        const compute = () => kernels.run("stamp", { at: at.address }, b.stream.address);
        let seen = {};
        using graph = b.capture(b.stream, (operations) => {
          const made = Array.from({ length: STEPS }, () => record(operations, inputs, compute)).flat();
          seen = kernels.shape(b.stream.address);
          return made;
        });
        const nodes = STEPS * numKernels;
        assertEquals(seen, { nodes, edges: nodes - 1, widest: 1 });
        await graph.launch();
        for (const made of graph.results) made[Symbol.dispose]();
        for (const tensor of [...Object.values(inputs), at]) tensor.release();
      });
    });
  }
});

function inputsOf(b: EpBuffer): Inputs {
  return {
    x: b.tensor("bf16", [NUM_TOKENS, HIDDEN], new Uint16Array(NUM_TOKENS * HIDDEN).fill(0x3f80)),
    topkIdx: b.tensor("i32", [NUM_TOKENS, 2], Int32Array.of(0, 1, 1, 2, 2, 3)),
    topkWeights: b.tensor("f32", [NUM_TOKENS, 2], new Float32Array(2 * NUM_TOKENS).fill(1)),
  };
}
