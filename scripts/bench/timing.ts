/**
 * Time of a call: many calls in a chain, behind a gate, over its number.
 *
 * In: chains, each of which enqueues one call of all ranks at a time. Out: microseconds a call, median and spread over
 * repetitions. Called by the ops. Chains that are compared with each other take turns, so that a noisy minute hits all of
 * them; the first chains only warm up and say how many calls fill a chain.
 */
import type { EpEvent } from "../../mod.ts";
import type { BenchOptions } from "./options.ts";
import { type Lane, nowUs, type Ranks } from "./ranks.ts";

/** Something to time. */
export interface Chain {
  /** Enqueues one call on every rank. A promise must not need the device, unless `hostPaced`. */
  step(): void | Promise<void>;
  /** Streams whose end is the end of the chain. */
  readonly lanes: readonly Lane[];
  /** A step waits for the device (for counts on the host), so steps cannot be enqueued ahead. */
  readonly hostPaced?: boolean;
  /** Calls of all ranks that a step makes, where the clock of a GPU is to divide by it. Default 1. */
  readonly calls?: number;
  /** Native calls a step makes, when they are so many that chains must stay short. */
  readonly callsPerStep?: number;
}

/** Microseconds. */
export interface Spread {
  readonly median: number;
  readonly min: number;
  readonly max: number;
}

/** Most calls in a chain, and most native calls: what is enqueued takes memory. */
const MAX_ITERATIONS = 5000;
const MAX_CALLS = 200_000;

/** Median, least and most. */
export function spreadOf(samples: readonly number[]): Spread {
  const sorted = samples.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  const median = sorted.length % 2 === 1 ? sorted[middle]! : (sorted[middle - 1]! + sorted[middle]!) / 2;
  return { median, min: sorted[0]!, max: sorted.at(-1)! };
}

/** Chains of a bench. Knows how long its steps take to enqueue. */
export class Stopwatch {
  readonly #ranks: Ranks;
  readonly #options: BenchOptions;
  readonly #enqueueUs = new Map<Chain, number>();

  constructor(ranks: Ranks, options: BenchOptions) {
    this.#ranks = ranks;
    this.#options = options;
  }

  /** Times chains against each other. */
  async measure<K extends string>(chains: Readonly<Record<K, Chain>>): Promise<Record<K, Spread>> {
    const samples = Object.entries<number[]>(await this.samples(chains));
    return Object.fromEntries(samples.map(([name, us]) => [name, spreadOf(us)])) as Record<K, Spread>;
  }

  /** The times that {@linkcode measure} sums up, turn by turn. */
  async samples<K extends string>(chains: Readonly<Record<K, Chain>>): Promise<Record<K, number[]>> {
    const names = Object.keys(chains) as K[];
    const iterations = {} as Record<K, number>, samples = {} as Record<K, number[]>;
    for (const name of names) {
      iterations[name] = await this.#iterations(chains[name]);
      samples[name] = [];
    }
    for (let i = 0; i < this.#options.repetitions; i++) {
      for (const name of names) samples[name].push(await this.#time(chains[name], iterations[name]));
    }
    return samples;
  }

  /** Warms up: first touches of memory, compilation. Answers how many steps fill a chain. */
  async #iterations(chain: Chain): Promise<number> {
    const most = Math.max(2, Math.min(MAX_ITERATIONS, Math.floor(MAX_CALLS / (chain.callsPerStep ?? 1))));
    if (this.#options.iterations !== undefined) {
      await this.#time(chain, 2);
      return Math.min(most, this.#options.iterations);
    }
    let iterations = 2;
    for (let round = 0; round < 4; round++) {
      const us = await this.#time(chain, iterations);
      iterations = Math.max(2, Math.min(most, Math.round(this.#options.chainMs * 1000 / us), iterations * 20));
    }
    return iterations;
  }

  /** Microseconds a step of one chain. */
  async #time(chain: Chain, iterations: number): Promise<number> {
    await this.#ranks.rest();
    if (chain.hostPaced || !this.#ranks.hasGate) {
      const begin = nowUs();
      const ends = await enqueue(chain, iterations);
      await Promise.all(ends);
      return (nowUs() - begin) / iterations;
    }
    for (;;) {
      const delayMs = 3 + 2 * iterations * (this.#enqueueUs.get(chain) ?? 200) / 1000;
      const opened = this.#ranks.shut(chain.lanes, delayMs);
      const enqueueBegin = nowUs();
      const ends = await enqueue(chain, iterations);
      this.#enqueueUs.set(chain, (nowUs() - enqueueBegin) / iterations);
      const late = opened[0]!.done; // it opened before everything was there
      await Promise.all(opened);
      const begin = nowUs();
      await Promise.all(ends);
      const us = (nowUs() - begin) / iterations;
      if (!late) return us;
    }
  }
}

/** Runs one step and waits for its end. */
export async function runOnce(chain: Chain): Promise<void> {
  await Promise.all(await enqueue(chain, 1));
}

async function enqueue(chain: Chain, iterations: number): Promise<EpEvent[]> {
  for (let i = 0; i < iterations; i++) {
    const step = chain.step();
    if (step) await step;
  }
  return chain.lanes.map(({ buffer, stream }) => buffer.record(stream));
}
