/**
 * Random programs: ranks of one thread make the same random calls of both modes, with several results in flight, while each
 * rank by itself is late at random moments and in random phases. Every token carries a value of its own and experts are
 * the identity, so any stale, lost or swapped row shows in the combined sums, which must be exact. In: a backend. Out: tests.
 */
import { test } from "node:test";
import { assertEquals } from "@std/assert";
import { bf16FromF32, type EpBuffer, f32FromBf16, type LowLatencyCombineResult, type Tensor } from "@deepep/deepep";
import { constants } from "../../lib/ffi/abi.ts";
import { struct } from "../../lib/ffi/struct.ts";
import { expertRank } from "../../lib/layout.ts";
import { Random, runSeed } from "./random.ts";
import { ranksOf } from "./ranks.ts";
import { type BackendSubject, randomCount, suite } from "./suite.ts";

const sizes = { hidden: 64, numExperts: 10, numTopk: 3, maxTokensPerRank: 6 };
/** Entries may name one expert again and again: an expert of low-latency mode must hold them all, whatever is drawn. */
const shape = { ...sizes, maxLowLatencyTokensPerRank: sizes.maxTokensPerRank * sizes.numTopk };
const { hidden, numExperts, numTopk, maxTokensPerRank } = shape;
const NUM_SLOTS = 4, NUM_STEPS = 150;
const injectStruct = struct("deepep_inject_args");

/** What a rank sends in one step. */
interface Sent {
  readonly numTokens: number;
  readonly values: Float32Array;
  readonly experts: Int32Array;
  readonly weights: Float32Array;
}

function draw(own: Random): Sent {
  const numTokens = own.int(0, maxTokensPerRank);
  const values = new Float32Array(numTokens * hidden);
  for (let t = 0; t < numTokens; t++) values.fill(own.int(1, 120), t * hidden, (t + 1) * hidden);
  const entries = { length: numTokens * numTopk };
  return {
    numTokens,
    values,
    experts: Int32Array.from(entries, () => own.chance(0.15) ? -1 : own.int(0, numExperts - 1)),
    weights: Float32Array.from(entries, () => own.int(1, 2)),
  };
}

/** Makes this rank late in a random phase of a later call. */
function beLate(b: EpBuffer, own: Random, lowLatency: boolean): void {
  const phases = [["DISPATCH", "NOTIFY"], ["DISPATCH", "SEND"], ["DISPATCH", "ARRIVE"], ["COMBINE", "PUBLISH"], [
    "COMBINE",
    "REDUCE",
  ]] as const;
  const [op, phase] = own.pick(phases);
  const name = !lowLatency || own.chance(0.5) ? op : `LOW_LATENCY_${op}` as const;
  injectStruct.pack({
    op: constants.OP[name][0],
    phase: constants.PHASE[phase][0],
    action: constants.INJECT.DELAY[0],
    delay_us: own.int(0, 3000),
    count: 1,
  });
  b.core.call("deepep_inject", injectStruct, "inject");
}

/** Compares bf16 [numTokens, hidden] with each token times `times(token)`. */
async function check(out: Tensor, sent: Sent, times: (token: number) => number, what: string): Promise<void> {
  const want = sent.values.map((v, i) => v * times(Math.floor(i / hidden)));
  assertEquals(f32FromBf16(await out.read() as Uint16Array), f32FromBf16(bf16FromF32(want)), what);
}

const entriesOf = (sent: Sent, t: number) => [...sent.experts.subarray(t * numTopk, (t + 1) * numTopk)];

/** Dispatches at once; answers what combines and checks later. */
async function normal(b: EpBuffer, sent: Sent, shared: Random, what: string): Promise<() => Promise<void>> {
  const layout = shared.chance(0.5) ? "rank" : "expert", inPlace = shared.chance(0.5);
  const x = b.tensor("bf16", [sent.numTokens, hidden], sent.values);
  const topkIdx = b.tensor("i32", [sent.numTokens, numTopk], sent.experts);
  const expertAlignment = shared.pick([1, 4]), cpuSync = shared.chance(0.7);
  const recv = await b.dispatch(x, { topkIdx, layout, expertAlignment, cpuSync });
  return async () => {
    const rows = recv.x.shape[0]!, region = inPlace ? recv.handle.expertOutput() : undefined;
    if (region && rows > 0) b.copy(region.slice(0, rows), recv.x);
    using out = await b.combine(region ?? recv.x, recv.handle);
    const ranks = (t: number) =>
      new Set(entriesOf(sent, t).filter((e) => e >= 0).map((e) => expertRank(e, numExperts, b.numRanks))).size;
    const entries = (t: number) => entriesOf(sent, t).filter((e) => e >= 0).length;
    await check(out.x, sent, layout === "rank" ? ranks : entries, `${what} ${layout}`);
    [recv, x, topkIdx].forEach((held) => held.release());
  };
}

/** A low-latency call that was sent, and what is left to do with it, in this order. */
interface LowLatencyHalves {
  /** Receives, if that is a half of its own. */
  receive(): void;
  /** Sends the combine. */
  back(): void;
  /** Receives that, checks it, and gives all back. */
  finish(): Promise<void>;
}

/** The same in low-latency mode, in two halves or not. */
function sendLowLatency(b: EpBuffer, sent: Sent, shared: Random, what: string): LowLatencyHalves {
  const recvHook = shared.chance(0.5), inPlace = shared.chance(0.5);
  const x = b.tensor("bf16", [sent.numTokens, hidden], sent.values);
  const topkIdx = b.tensor("i32", [sent.numTokens, numTopk], sent.experts);
  const topkWeights = b.tensor("f32", [sent.numTokens, numTopk], sent.weights);
  const recv = b.lowLatencyDispatch(x, { topkIdx, fp8: false, recvHook });
  let out: LowLatencyCombineResult;
  return {
    receive: () => void recv.hook(),
    back() {
      const region = inPlace ? recv.handle.expertOutput() : undefined;
      if (region) b.copy(region, recv.x);
      out = b.lowLatencyCombine(region ?? recv.x, { topkIdx, topkWeights, handle: recv.handle, recvHook });
    },
    async finish() {
      out.hook();
      const sum = (t: number) =>
        entriesOf(sent, t).reduce((s, e, k) => s + (e >= 0 ? sent.weights[t * numTopk + k]! : 0), 0);
      await check(out.x, sent, sum, `${what} low latency`);
      [recv, x, topkIdx, topkWeights].forEach((held) => held.release());
      out[Symbol.dispose]();
    },
  };
}

/** {@linkcode sendLowLatency}, in the form of {@linkcode normal}. */
function lowLatency(b: EpBuffer, sent: Sent, shared: Random, what: string): Promise<() => Promise<void>> {
  const call = sendLowLatency(b, sent, shared, what);
  return Promise.resolve(async () => {
    call.receive();
    call.back();
    await call.finish();
  });
}

/** Low-latency calls in flight: all ranks send in the same order, and each receives in an order of its own. */
async function ownOrders(b: EpBuffer, rank: number, seed: number): Promise<void> {
  const shared = new Random(seed),
    own = new Random(seed + 1000 * (rank + 1)),
    orderOf = (r: Random) => r.distinct(3, 3);
  for (let round = 0; round < 30; round++) {
    const what = `DEEPEP_SEED=${seed}, rank ${rank}, round ${round}:`;
    if (own.chance(0.3)) beLate(b, own, true);
    const calls = [0, 1, 2].map(() => sendLowLatency(b, draw(own), shared, what));
    for (const i of orderOf(own)) calls[i]!.receive();
    for (const i of orderOf(shared)) calls[i]!.back();
    for (const i of orderOf(own)) await calls[i]!.finish();
  }
  assertEquals(b.stats().numFailures, 0);
}

/** One rank's run of the program that `seed` stands for. */
async function run(b: EpBuffer, rank: number, seed: number, bothModes: boolean): Promise<void> {
  const shared = new Random(seed), own = new Random(seed + 1000 * (rank + 1));
  const inFlight: (() => Promise<void>)[] = [];
  for (let step = 0; step < NUM_STEPS; step++) {
    if (own.chance(0.1)) await new Promise((resolve) => setTimeout(resolve, own.int(0, 3)));
    if (own.chance(0.2)) beLate(b, own, bothModes);
    const what = `DEEPEP_SEED=${seed}, rank ${rank}, step ${step}:`, sent = draw(own);
    inFlight.push(await (!bothModes || shared.chance(0.5) ? normal : lowLatency)(b, sent, shared, what));
    const keep = shared.int(0, NUM_SLOTS - 1);
    while (inFlight.length > keep) await inFlight.shift()!();
  }
  for (const finish of inFlight) await finish();
  assertEquals(b.stats().numFailures, 0);
}

/** Registers the programs. */
export function runMixedCases({ name, backend, skip, skipLowLatency }: BackendSubject): void {
  const modes = skipLowLatency ? "of normal mode" : "of both modes";
  suite(`${name}: random programs ${modes}, several results in flight`, skip, () => {
    const seed = runSeed();
    for (const [i, numRanks] of [1, 3, 4, 7].slice(0, randomCount(4)).entries()) {
      test(`${numRanks} ranks, DEEPEP_SEED=${seed + i}`, async () => {
        await ranksOf(backend)(
          numRanks,
          { ...shape, numSlots: NUM_SLOTS, maxRecvTokens: 200, timeoutMs: 20_000 },
          (b, rank) => run(b, rank, seed + i, !skipLowLatency),
        );
      });
    }
  });
  suite(`${name}: halves of low latency in an order of each rank's own`, skip || skipLowLatency, () => {
    const seed = runSeed();
    for (const [i, numRanks] of [2, 4].slice(0, randomCount(2)).entries()) {
      test(`${numRanks} ranks, DEEPEP_SEED=${seed + i}`, async () => {
        const options = { ...shape, numSlots: 3, timeoutMs: 20_000 };
        await ranksOf(backend)(numRanks, options, (b, rank) => ownOrders(b, rank, seed + i));
      });
    }
  });
}
