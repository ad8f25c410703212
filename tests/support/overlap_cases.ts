/**
 * Computing while rows travel: between the halves of a call the stream is free, whatever the peers do. Shown by a peer that is
 * late with its rows: what is computed after the send half ends long before they arrive; after a call in one piece it does not.
 * In: a backend, and something to compute on a stream. Out: tests.
 *
 * World: 2 ranks, 8 experts; every token goes to experts 0 and 4, one on each rank; experts are the identity. Rank 1 is late by
 * LATE_MS after its counts were published, before its rows are sent.
 */
import { test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { bf16FromF32, type EpBuffer, type EpEvent, type LowLatencyResult, type Tensor } from "@deepep/deepep";
import { inject, ranksOf } from "./ranks.ts";
import { type BackendSubject, suite } from "./suite.ts";

const NUM_TOKENS = 4, HIDDEN = 16, LATE_MS = 400;
/** How much earlier something was that did not wait for what was late. A busy machine delays both. */
const EARLIER_MS = LATE_MS / 2;

/** Something that keeps a stream busy for some milliseconds at most. */
export interface Compute extends Disposable {
  /** Enqueues it on the buffer's stream. */
  enqueue(): void;
  /** Throws unless what was enqueued first ran between `begin` and `end`, where the backend can tell. */
  check(begin: EpEvent, end: EpEvent): Promise<void>;
}

/** Makes something to compute on a buffer's device. */
export type NewCompute = (b: EpBuffer) => Compute;

/** Copies of a megabyte: what every backend can do on a stream. */
export const copies: NewCompute = (b) => {
  const [from, to] = [0, 1].map(() => b.tensor("u8", [1 << 20], new Uint8Array(1 << 20))) as [Tensor, Tensor];
  return {
    enqueue() {
      for (let i = 0; i < 8; i++) b.copy(to, from);
    },
    check: () => Promise.resolve(),
    [Symbol.dispose]: () => [from, to].forEach((tensor) => tensor.release()),
  };
};

/** A micro-batch: its tensors, and its way there and back. */
class Batch implements Disposable {
  readonly #b: EpBuffer;
  readonly #value: number;
  readonly #x: Tensor<"bf16">;
  readonly #topkIdx: Tensor<"i32">;
  readonly #topkWeights: Tensor<"f32">;
  readonly recvHook: boolean;
  #recv: LowLatencyResult | undefined;

  constructor(b: EpBuffer, value: number, recvHook: boolean) {
    const entries = { length: 2 * NUM_TOKENS }, shape = [NUM_TOKENS, 2];
    this.#b = b;
    this.#value = value;
    this.recvHook = recvHook;
    this.#x = b.tensor("bf16", [NUM_TOKENS, HIDDEN], new Float32Array(NUM_TOKENS * HIDDEN).fill(value));
    this.#topkIdx = b.tensor("i32", shape, Int32Array.from(entries, (_, i) => i % 2 * 4));
    this.#topkWeights = b.tensor("f32", shape, new Float32Array(entries).fill(1));
  }
  send(): void {
    this.#recv = this.#b.lowLatencyDispatch(this.#x, { topkIdx: this.#topkIdx, fp8: false, recvHook: this.recvHook });
  }
  receive(): void {
    this.#recv!.hook();
  }
  /** The sending half of the combine; answers what receives, checks and gives all back. */
  back(): () => Promise<void> {
    const recv = this.#recv!, { recvHook } = this, topkIdx = this.#topkIdx, topkWeights = this.#topkWeights;
    const { handle } = recv;
    const out = this.#b.lowLatencyCombine(recv.x as Tensor<"bf16">, { topkIdx, topkWeights, handle, recvHook });
    return async () => {
      await out.received();
      const want = bf16FromF32(Float32Array.of(2 * this.#value))[0]!;
      assertEquals([...await out.x.read()], new Array(NUM_TOKENS * HIDDEN).fill(want), `batch ${this.#value}`);
      out[Symbol.dispose]();
    };
  }
  [Symbol.dispose](): void {
    this.#recv?.release();
    for (const tensor of [this.#x, this.#topkIdx, this.#topkWeights]) tensor.release();
  }
}

/** When rank 0 had computed and received, in milliseconds from the begin of a dispatch whose rows are late. */
async function timeline(
  b: EpBuffer,
  newCompute: NewCompute,
  recvHook: boolean,
): Promise<{ computed: number; arrived: number }> {
  using compute = newCompute(b), batch = new Batch(b, b.rank + 1, recvHook);
  await b.barrier();
  if (b.rank === 1) inject(b, "LOW_LATENCY_DISPATCH", "SEND", "DELAY", 1000 * LATE_MS);
  const begin = b.record();
  batch.send();
  const sent = b.record();
  compute.enqueue();
  const computed = b.record();
  batch.receive();
  const arrived = b.record();
  await batch.back()();
  await arrived;
  await compute.check(sent, computed);
  return { computed: computed.elapsedSince(begin), arrived: arrived.elapsedSince(begin) };
}

/** Two micro-batches: the first is received, computed and sent back while the rows of the second travel. */
async function twoBatches(b: EpBuffer, newCompute: NewCompute, round: number): Promise<void> {
  using compute = newCompute(b);
  using first = new Batch(b, 10 * round + b.rank + 1, true), second = new Batch(b, 10 * round + b.rank + 5, true);
  await b.barrier();
  const begin = b.record();
  first.send();
  const sent = b.record();
  await sent; // so that the delay is the second one's
  if (b.rank === 1) inject(b, "LOW_LATENCY_DISPATCH", "SEND", "DELAY", 1000 * LATE_MS);
  second.send();
  first.receive();
  const received = b.record();
  compute.enqueue();
  const computed = b.record();
  second.receive();
  const arrived = b.record();
  const backFirst = first.back();
  compute.enqueue();
  const backSecond = second.back();
  await backFirst();
  await backSecond();
  await compute.check(received, arrived);
  if (b.rank === 1) return;
  const ms = arrived.elapsedSince(computed);
  assert(ms > EARLIER_MS, `computed ${ms} ms before the second batch arrived, ${arrived.elapsedSince(begin)} in all`);
}

/** Registers the cases. */
export function runOverlapCases(
  { name, backend, skip, skipLowLatency }: BackendSubject,
  newCompute: NewCompute = copies,
): void {
  const ranks = ranksOf(backend);
  suite(`${name}: computing between the halves of a call`, skip || skipLowLatency, () => {
    test("what follows a send half does not wait for the peers' rows; after a whole call it does", async () => {
      await ranks(2, {}, async (b) => {
        const halves = await timeline(b, newCompute, true), whole = await timeline(b, newCompute, false);
        if (b.rank === 1) return;
        const text = JSON.stringify({ halves, whole });
        assert(halves.arrived - halves.computed > EARLIER_MS, text);
        assert(whole.computed > EARLIER_MS && whole.arrived - whole.computed < EARLIER_MS, text);
      });
    });
    test("two micro-batches: one is computed while the other travels", async () => {
      await ranks(2, {}, async (b) => {
        for (let round = 0; round < 3; round++) await twoBatches(b, newCompute, round);
      });
    });
  });
}
