/**
 * Low latency in CUDA graphs. A decode step (dispatch, expert kernel, combine) captured once and replayed thousands of times:
 * rows and routing are drawn, and every element is checked, by kernels of the same graph. And each half of a step captured by
 * itself and replayed with what the host writes, compared with the reference bit for bit. And kernels that compute between the
 * halves.
 */
import { test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { EpBuffer, Group, type LowLatencyResult, type Tensor } from "@deepep/deepep";
import { maxLocalExperts } from "../lib/layout.ts";
import { referenceLowLatencyCombine, referenceLowLatencyDispatch } from "../lib/reference/mod.ts";
import { type DecodeKernels, decodeKernels } from "../scripts/decode/kernels.ts";
import { decodeBuffer, DecodeStep } from "../scripts/decode/step.ts";
import { Soak, type SoakOptions } from "../scripts/soak.ts";
import { assertLowLatencyDispatched, assertSame } from "./support/compare.ts";
import { cudaCapabilities, noCudaDecode, noCudaGraphs, noCudaLowLatency } from "./support/cuda.ts";
import type { LowLatencyCall } from "./support/driver.ts";
import { lowLatencyOutput } from "./support/experts.ts";
import { type NewCompute, runOverlapCases } from "./support/overlap_cases.ts";
import { Random, runSeed } from "./support/random.ts";
import { readLowLatency, writeExpertRows } from "./support/rank_host.ts";
import { replayCount as times, suite } from "./support/suite.ts";
import { makeWorld, type TestWorld, type WorldSpec } from "./support/worlds.ts";

/** An emulated device computes on the cores of the host: there it gets less to do. */
const emulated = cudaCapabilities?.name.startsWith("emulated") ?? false;
const [LAUNCHES, STEPS] = emulated ? [2, 10] : [20, 20_000];

/** Arithmetic on more blocks than there are multiprocessors, with the device's times of its begin and end. */
const arithmetic: NewCompute = (b) => {
  const kernels = decodeKernels() as DecodeKernels, blocks = 2 * b.capabilities.numSms;
  const sink = b.tensor("f32", [blocks, 256]), times = b.tensor("i64", [8], new BigInt64Array(8).fill(-1n, 0, 4));
  let count = 0;
  return {
    enqueue() {
      const begin = times.address + BigInt(8 * count++ % 32), fields = { begin, end: begin + 32n, sink: sink.address };
      for (let i = 0; i < LAUNCHES; i++) kernels.run("compute", { ...fields, steps: STEPS, blocks }, b.stream.address);
    },
    async check(begin, end) {
      const stamps = await times.read(), ms = Number(stamps[4]! - stamps[0]!) / 1e6, room = end.elapsedSince(begin);
      assert(ms > 0 && ms <= room, `computed for ${ms} ms in ${room} ms`);
    },
    [Symbol.dispose]: () => [sink, times].forEach((tensor: Tensor) => tensor.release()),
  };
};

runOverlapCases({ name: "cuda", backend: "cuda", skip: noCudaDecode }, arithmetic);

const seed = runSeed();

const base: Omit<SoakOptions, "shape" | "ranks" | "steps"> = {
  backend: "cuda",
  seconds: 100,
  seed: seed % 2 ** 31,
  look: 500,
  recvHook: false,
  perGraph: 1,
  corrupt: false,
};
const steps: readonly (Omit<SoakOptions, keyof typeof base> & Partial<SoakOptions>)[] = [
  { steps: 10_000, ranks: 4, shape: { tokens: 8, hidden: 512, experts: 13, topk: 3 } },
  { steps: 3000, ranks: 4, shape: { tokens: 8, hidden: 512, experts: 13, topk: 3 }, recvHook: true, perGraph: 3 },
  { steps: 1000, ranks: 4, shape: { tokens: 8, hidden: 512, experts: 13, topk: 3 }, perGraph: 0 },
  { steps: 3000, ranks: 1, shape: { tokens: 1, hidden: 7168, experts: 8, topk: 8 } },
  { steps: 1000, ranks: 8, shape: { tokens: 32, hidden: 7168, experts: 64, topk: 8 }, look: 100 },
];

suite("cuda: decode steps", noCudaDecode || noCudaGraphs, () => {
  for (const { steps: usual, ranks, shape, ...more } of steps) {
    const { perGraph = 1, recvHook = false } = more;
    const how = perGraph === 0 ? "plain calls" : `steps, ${perGraph} a replay${recvHook ? ", in two halves" : ""}`;
    const words = `${ranks} ranks, ${shape.tokens} tokens of ${shape.hidden}`;
    test(`${times(usual)} ${how}, ${words}, DEEPEP_SEED=${seed}`, { timeout: 120_000 }, async () => {
      const options = { ...base, ...more, ranks, shape, steps: times(usual) };
      await using soak = await Soak.create(options);
      while (soak.steps < options.steps) await soak.advance(Math.min(options.look, options.steps - soak.steps));
    });
  }

  test("replays and plain calls take turns, in any order", { timeout: 60_000 }, async () => {
    const shape = { tokens: 6, hidden: 256, experts: 10, topk: 4 };
    const create = { ...decodeBuffer(shape), backend: "cuda", timeoutMs: 20_000 } as const;
    const buffers = await Promise.all(Group.local(3).map((group) => EpBuffer.create(group, create)));
    const kinds = [1, 0].map((perGraph) => buffers.map((b) => new DecodeStep(b, shape, { seed: base.seed, perGraph })));
    const random = new Random(seed), made = [0, 0];
    for (let i = 0; i < times(600); i++) {
      const kind = random.int(0, 1);
      made[kind]!++;
      const events = kinds[kind]!.map((rank) => rank.run());
      if (i % 16 === 0) await Promise.all(events);
    }
    for (const [kind, ranks] of kinds.entries()) {
      for (const rank of ranks) {
        assertEquals(await rank.found(), { steps: made[kind]!, mismatches: 0, first: undefined });
      }
      for (const rank of ranks) rank[Symbol.dispose]();
    }
    await Promise.all(buffers.map((b) => b.close()));
  });
});

const spec: WorldSpec = {
  name: "replayed",
  numRanks: 4,
  numExperts: 10,
  numTopk: 3,
  hidden: 272,
  tokens: [8, 5, 0, 7],
  routing: "mixed",
  dropped: 0.1,
};
const options = {
  hidden: spec.hidden,
  numExperts: spec.numExperts,
  numTopk: spec.numTopk,
  maxTokensPerRank: 1,
  maxLowLatencyTokensPerRank: 8 * spec.numTopk, // a token may list an expert thrice
  timeoutMs: 20_000,
};

/** A dispatch, and whether its combine carries rows as FP8. */
type Call = LowLatencyCall & { readonly combineFp8?: boolean };

/** A rank with its halves of a step captured: a dispatch, and a combine of what the host writes. */
class Halves implements Disposable {
  readonly buffer: EpBuffer;
  readonly #tensors: Tensor[] = [];
  readonly #inputs: readonly [Tensor<"bf16">, Tensor<"i32">, Tensor<"f32">];
  readonly #stats: Tensor<"i32">;
  readonly #y: Tensor<"bf16">;
  readonly #out: Tensor<"bf16">;
  readonly #dispatch;
  readonly #combine;

  constructor(b: EpBuffer, { fp8 = false, round, ue8m0, scalesColumnMajor = false, combineFp8 = false }: Call) {
    const tokens = spec.tokens[b.rank]!, entries = [tokens, spec.numTopk], { hidden } = spec;
    const make = <T extends Tensor>(tensor: T): T => (this.#tensors.push(tensor), tensor);
    const x = make(b.tensor("bf16", [tokens, hidden])), topkIdx = make(b.tensor("i32", entries));
    const topkWeights = make(b.tensor("f32", entries));
    const expertStats = make(b.tensor("i32", [b.numLocalExperts], new Int32Array(b.numLocalExperts)));
    const maxRows = spec.numRanks * options.maxLowLatencyTokensPerRank;
    const y = make(b.tensor("bf16", [b.numLocalExperts, maxRows, hidden])),
      out = make(b.tensor("bf16", [tokens, hidden]));
    const how = { fp8, scalesColumnMajor, ...(round && { roundScale: true }), ...(ue8m0 && { useUe8m0: true }) };
    this.buffer = b;
    this.#inputs = [x, topkIdx, topkWeights];
    [this.#stats, this.#y, this.#out] = [expertStats, y, out];
    this.#dispatch = b.capture(
      b.stream,
      (ep): LowLatencyResult => ep.lowLatencyDispatch(x, { topkIdx, expertStats, ...how }),
    );
    const { handle } = this.#dispatch.results;
    this.#combine = b.capture(
      b.stream,
      (ep) => void ep.lowLatencyCombine(y, { topkIdx, topkWeights, handle, out, fp8: combineFp8 }),
    );
  }

  send(world: TestWorld): void {
    const { x, topkIdx, topkWeights } = world.inputs[this.buffer.rank]!, [rows, routes, weights] = this.#inputs;
    this.buffer.write(rows, x);
    this.buffer.write(routes, topkIdx!);
    this.buffer.write(weights, topkWeights!);
    this.#dispatch.launch();
  }
  received() {
    return readLowLatency(this.#dispatch.results, this.#stats);
  }
  back(experts: readonly Uint16Array[]): void {
    writeExpertRows(this.#y, experts);
    this.#combine.launch();
  }
  combined(): Promise<Uint16Array> {
    return this.#out.read();
  }

  [Symbol.dispose](): void {
    this.#dispatch.results.release();
    this.#dispatch.release();
    this.#combine.release();
    for (const tensor of this.#tensors) tensor.release();
  }
}

/** One replay of both halves on every rank, checked bit for bit. Answers the sums of expertStats. */
async function replay(
  ranks: readonly Halves[],
  world: TestWorld,
  call: Call,
  stats: readonly Int32Array[],
): Promise<Int32Array[]> {
  const inputs = world.inputs.map((input, rank) => ({ ...input, expertStats: stats[rank]! }));
  const shape = { ...options, numRanks: spec.numRanks, maxTokensPerRank: options.maxLowLatencyTokensPerRank, ...call };
  for (const rank of ranks) rank.send(world);
  const got = (await Promise.all(ranks.map((rank) => rank.received()))).map(({ output }) => output);
  const release = () => Promise.resolve();
  assertLowLatencyDispatched({ ranks: got, release }, referenceLowLatencyDispatch(inputs, shape), {
    inputs,
    call,
    options: { ...options, numRanks: spec.numRanks },
  });
  const payload = call.fp8 ? { kind: "fp8", ue8m0: call.ue8m0 ?? false } as const : world.payload;
  const outputs = inputs.map(({ numTokens, topkIdx, topkWeights }, rank) => {
    const x = lowLatencyOutput({ ...world, payload }, rank, got[rank]!);
    return { numTokens, topkIdx: topkIdx!, topkWeights: topkWeights!, x };
  });
  ranks.forEach((rank, i) => rank.back(outputs[i]!.x));
  const sums = referenceLowLatencyCombine(outputs, { ...shape, fp8: call.combineFp8 ?? false });
  for (const [rank, halves] of ranks.entries()) {
    assertSame(`rank ${rank}, combined x`, await halves.combined(), sums[rank]!, { width: spec.hidden });
  }
  return got.map(({ expertStats }) => expertStats);
}

suite("cuda: halves of decode steps in graphs", noCudaLowLatency || noCudaGraphs, () => {
  const numTopk = spec.numTopk;
  const calls: readonly Call[] = [
    { numTopk },
    { numTopk, fp8: true, combineFp8: true },
    { numTopk, fp8: true, round: true, scalesColumnMajor: true },
    { numTopk, fp8: true, round: true, ue8m0: true },
  ];
  for (const call of calls) {
    test(
      `${times(250)} replays of each, ${JSON.stringify(call)}, DEEPEP_SEED=${seed}`,
      { timeout: 60_000 },
      async () => {
        const all = await Promise.all(
          Group.local(spec.numRanks).map((group) => EpBuffer.create(group, { ...options, backend: "cuda" })),
        );
        const ranks = all.map((b) => new Halves(b, call));
        let stats: Int32Array[] = all.map((b) => new Int32Array(b.numLocalExperts));
        assertEquals(stats[0]!.length, maxLocalExperts(spec.numExperts, spec.numRanks));
        for (let i = 0; i < times(250); i++) {
          stats = await replay(ranks, makeWorld(spec, seed + i), call, stats).catch((cause) => {
            throw new Error(`replay ${i}, DEEPEP_SEED=${seed}: ${cause.message}`, { cause });
          });
        }
        for (const rank of ranks) rank[Symbol.dispose]();
        await Promise.all(all.map((b) => b.close()));
      },
    );
  }
});
