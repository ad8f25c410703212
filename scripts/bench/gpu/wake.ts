/**
 * How long after its counts are in host memory a dispatch's promise goes on.
 *
 * In: options. Out: figures. Called by bench.ts. The host cannot see both moments on one thread, so a worker reads the first
 * word that the device stores in a tight loop, where a value stands that no count is, and notes the time when it changes; the
 * main thread notes the time when `await dispatch()` goes on. Their difference is the figure: p50, and p99 beside it. The worker
 * sees a change some 0.1 us late; the words of the other counts come after the first, which counts against the library. What of
 * the figure is the event loop's: `wake_asked` is the same while the main thread asks the queue without pause, with no turn of
 * the event loop between; `wake_turn` is a turn of it.
 */
import { setImmediate } from "node:timers";
import type { EpBuffer } from "../../../mod.ts";
import type { Device } from "../../../lib/device.ts";
import { constants } from "../../../lib/ffi/abi.ts";
import { struct } from "../../../lib/ffi/struct.ts";
import { wake as wakeByBarrier } from "../host.ts";
import type { BenchOptions } from "../options.ts";
import { nowUs, Ranks } from "../ranks.ts";
import { type Spread, spreadOf } from "../timing.ts";
import { within } from "./clock.ts";
import type { Report } from "./report.ts";
import { monotonicNs, SENTINEL } from "./wake_clock.ts";
import type { WatchMessage } from "./wake_watcher.ts";

const injectStruct = struct("deepep_inject_args");
const TOKENS = 128;
/** How long an operation is awaited of which turns of the event loop are counted: less than it is polled for each turn. */
const LOOP_MS = 5;
const ASKS = 200;
/** Before the first kinds: a runtime compiles what it has run some thousand times. */
const WARM_CALLS = 1000;

/** The watcher. */
class Watcher implements Disposable {
  readonly #control = new Int32Array(new SharedArrayBuffer(16));
  readonly #times = new BigInt64Array(new SharedArrayBuffer(16));
  readonly #worker = new Worker(new URL("./wake_watcher.ts", import.meta.url), { type: "module" });
  #request = 0;

  async start({ backend, path }: { backend: WatchMessage["backend"]; path: string }): Promise<void> {
    const message: WatchMessage = {
      backend,
      path,
      control: this.#control.buffer as SharedArrayBuffer,
      times: this.#times.buffer as SharedArrayBuffer,
    };
    const ready = new Promise<void>((resolve, reject) => {
      this.#worker.onmessage = ({ data }) => {
        if (data === "loaded") this.#worker.postMessage(message);
        else if (data === "ready") resolve();
        else reject(new Error(String(data)));
      };
      this.#worker.onerror = (event) => reject(new Error(event.message));
    });
    await within(10_000, "the watcher's start", ready);
  }

  /** Begins to watch an address; returns when it is watched. */
  watch(address: bigint): void {
    Atomics.store(this.#times, 1, address);
    Atomics.store(this.#control, 0, ++this.#request);
    Atomics.notify(this.#control, 0);
    this.#spin(1);
  }

  /** When it changed, nanoseconds. */
  seenNs(): bigint {
    this.#spin(2);
    return Atomics.load(this.#times, 0);
  }

  #spin(word: number): void {
    const end = performance.now() + 5000;
    while (Atomics.load(this.#control, word) !== this.#request) {
      if (performance.now() > end) throw new Error("the watcher does not answer");
    }
  }

  [Symbol.dispose](): void {
    Atomics.store(this.#control, 3, 1);
    Atomics.store(this.#control, 0, ++this.#request);
    Atomics.notify(this.#control, 0);
    this.#worker.terminate();
  }
}

/** Sorted samples' value at a share of them. */
const at = (sorted: readonly number[], share: number): number =>
  sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))]!;

/**
 * Where the device tells a buffer with one slot its counts: words of 64 bits, a number of the call above the count, which lie
 * right before the counts that the library makes of them; on the cpu backend these counts themselves. Looked for, and seen to be
 * what two dispatches have changed.
 */
async function wordsAddress(buffer: EpBuffer, call: () => Promise<void>): Promise<bigint> {
  const { core } = buffer, { device } = core, original = device.hostRead, isCpu = buffer.backend === "cpu";
  const before = isCpu ? 0n : 8n * BigInt(2 + core.numLocalExperts + core.numRanks);
  const seen: { address: bigint; count: number; call: number }[] = [], word = new Int32Array(new ArrayBuffer(8));
  Object.defineProperty(device, "hostRead", {
    configurable: true,
    value: (counts: bigint, into: ArrayBufferView) => {
      original.call(device, counts, into);
      const address = counts - before;
      original.call(device, address, word);
      seen.push({ address, count: word[0]!, call: word[1]! });
    },
  });
  try {
    await call();
    await call();
  } finally {
    delete (device as { hostRead?: unknown }).hostRead;
  }
  const [first, second] = seen;
  const found = first?.address === second?.address && seen.every(({ count }) => count === TOKENS) &&
    (isCpu || second!.call > first!.call);
  if (!first || !found) {
    throw new Error(`the device's counts are not where they were looked for: ${JSON.stringify(seen, show)}`);
  }
  return first.address;
}
const show = (_: string, value: unknown): unknown => typeof value === "bigint" ? `0x${value.toString(16)}` : value;

/** Wake-ups, seen by the watcher and, as a check, by another way. */
export async function wakePhase(report: Report, options: BenchOptions, samples: number): Promise<void> {
  const { hidden, experts, topk } = options;
  await using ranks = await Ranks.create(1, { ...options, numSms: 0 }, {
    hidden,
    numExperts: experts,
    numTopk: topk,
    maxTokensPerRank: TOKENS,
    numSlots: 1,
    timeoutMs: 10_000,
  });
  const buffer = ranks.buffers[0]!, { device } = buffer.core;
  using x = buffer.tensor("bf16", [TOKENS, hidden], new Uint16Array(TOKENS * hidden).fill(0x3f80));
  using topkIdx = buffer.tensor("i32", [TOKENS, topk], Int32Array.from({ length: TOKENS * topk }, (_, i) => i % topk));
  const facts = {
    phase: "wake",
    form: "host",
    ranks: 1,
    numSms: buffer.numSms,
    tokens: TOKENS,
    dtype: "none",
    layout: "none",
  } as const;
  try {
    using watcher = new Watcher();
    await watcher.start({ backend: device.backend, path: device.path });
    const now = monotonicNs(), word = Int32Array.of(SENTINEL);
    const address = await wordsAddress(buffer, async () => {
      const result = await buffer.dispatch(x, { topkIdx });
      await result.event;
      result.release();
    });
    const once = async (delayUs: number, asked = false): Promise<number> => {
      if (delayUs > 0) late(buffer, delayUs);
      device.hostWrite(address, word);
      watcher.watch(address);
      const dispatched = buffer.dispatch(x, { topkIdx });
      const result = asked ? await askedFor(device, dispatched) : await dispatched;
      const resumed = now(), seen = watcher.seenNs();
      await result.event;
      result.release();
      await ranks.rest();
      return seen < 0n ? NaN : Number(resumed - seen) / 1000;
    };
    const kinds = [["observed", 0], ["asked", 0], ["observed_after_500_us", 500], [
      "observed_after_3_ms",
      3000,
    ]] as const;
    for (const [name, delayUs] of kinds) {
      if (delayUs > 0 && !ranks.hasGate) continue;
      const count = delayUs > 1000 ? Math.ceil(samples / 5) : samples, us: number[] = [];
      for (let i = 0; i < (delayUs > 0 ? 20 : WARM_CALLS); i++) await once(delayUs, name === "asked");
      for (let i = 0; i < count; i++) us.push(await once(delayUs, name === "asked"));
      const sorted = us.filter((one) => !Number.isNaN(one)).sort((a, b) => a - b);
      report.add({
        ...facts,
        op: `wake_${name}`,
        us: { median: at(sorted, 0.5), min: sorted[0]!, max: sorted.at(-1)! },
        more: { p90: at(sorted, 0.9), p99: at(sorted, 0.99), samples: sorted.length },
      });
    }
  } catch (error) {
    report.trouble(`wake: no watcher: ${(error as Error).message}`);
  }
  if (ranks.hasGate) {
    const { turn, ask } = await loopCosts(ranks);
    report.add({ ...facts, op: "wake_turn", us: turn, more: { turnsPerSecond: 1e6 / turn.median } });
    report.add({ ...facts, op: "wake_ask", us: ask });
  }
  report.say(
    "  observed: from the first count that the device has stored to the promise; asked: the same, the queue asked without " +
      "pause\n  turn: a turn of the event loop while an operation is awaited, which asks the queue once and runs one more " +
      "callback; ask: asking the queue once",
  );
  // The other way: the end of a barrier, awaited and asked for without pause. What awaiting adds is the difference of the two.
  const barrier = await wakeByBarrier(options, [0], () => buffer.barrier());
  const { measured, bound } = barrier;
  report.add({ ...facts, op: "wake_barrier_awaited", us: measured });
  report.add({ ...facts, op: "wake_barrier_asked", us: bound, more: { awaitingAdds: measured.median - bound.median } });
}

/** Waits for a promise by asking the queue without pause. Only promises that are kept meanwhile run between. */
async function askedFor<T>(device: Device, promise: Promise<T>): Promise<T> {
  let settled = false;
  const note = (): void => {
    settled = true;
  };
  promise.then(note, note);
  for (const end = nowUs() + 5e6; !settled && nowUs() < end;) {
    for (let i = 0; i < 100 && !settled; i++) {
      device.poll();
      await undefined;
    }
  }
  return promise;
}

/** What a turn of the event loop costs while an operation is awaited, and what asking the queue costs. */
async function loopCosts(ranks: Ranks): Promise<{ turn: Spread; ask: Spread }> {
  const { device } = ranks.buffers[0]!.core, turns: number[] = [], asks: number[] = [];
  for (let i = 0; i < 20; i++) {
    const [event] = ranks.shut([], LOOP_MS);
    let done = false, count = 0;
    const ended = event!.then(() => done = true);
    const asking = nowUs();
    for (let ask = 0; ask < ASKS; ask++) device.poll();
    const begin = nowUs();
    asks.push((begin - asking) / ASKS);
    while (!done) {
      await new Promise((resolve) => setImmediate(resolve));
      count++;
    }
    turns.push((nowUs() - begin) / count);
    await ended;
  }
  return { turn: spreadOf(turns), ask: spreadOf(asks) };
}

/** Makes the next dispatch's counts late. */
function late(buffer: EpBuffer, delayUs: number): void {
  const { OP, PHASE, INJECT } = constants;
  injectStruct.pack({
    op: OP.DISPATCH[0],
    phase: PHASE.NOTIFY[0],
    action: INJECT.DELAY[0],
    delay_us: delayUs,
    count: 1,
  });
  buffer.core.call("deepep_inject", injectStruct, "inject");
}
