/**
 * Time of a call of all ranks, by the device's own clock.
 *
 * In: a chain. Out: microseconds a call: from the first rank's first event to the last rank's last, over the steps, median and
 * spread of several chains. Only events of one device are held against each other: of several devices the slowest counts, and
 * all begin at one gate. Called by the phases. Three forms: `chain`: the calls wait behind a gate until all are enqueued,
 * so the device's time is seen and not the host's; `launched`: as a program makes them that does nothing else, one thread for
 * all ranks; `graph`: replays behind the gate of a graph of many calls, divided by their number.
 */
import type { EpEvent } from "../../../mod.ts";
import { type Lane, nowUs, type Ranks } from "../ranks.ts";
import { type Chain, type Spread, spreadOf } from "../timing.ts";

/** How calls get to the device. */
export type Form = "chain" | "launched" | "graph";

/** What was measured. */
export interface Measured {
  readonly form: Form;
  /** Microseconds a call. */
  readonly us: Spread;
  /** Steps of a chain. */
  readonly iterations: number;
  readonly repetitions: number;
  /** Microseconds that the host took to enqueue a call, median. */
  readonly enqueueUs: number;
  /** Chains that the gate was opened too early for: the host is in them. */
  readonly late: number;
}

/** Steps in a chain: a stream takes about a thousand launches, waits and records before it makes the host wait. */
const MOST_STEPS = 60;
/** How long a chain lasts, about. */
const CHAIN_US = 15_000;
/** Longest wait for a chain. Waits on the device have deadlines, so what takes longer is lost. */
const LOST_MS = 60_000;

/** Fails when a promise takes too long, instead of hanging. */
export async function within<T>(ms: number, what: string, promise: Promise<T>): Promise<T> {
  let timer: ReturnType<typeof setTimeout> | undefined;
  const late = new Promise<never>((_, reject) => {
    timer = setTimeout(() => reject(new Error(`${what} took longer than ${ms / 1000} s`)), ms);
  });
  try {
    return await Promise.race([promise, late]);
  } finally {
    clearTimeout(timer);
  }
}

/** Waits for events. A failed one rejects. */
export function all(events: readonly EpEvent[]): Promise<unknown> {
  return within(LOST_MS, "a chain", Promise.all(events));
}

/** Times chains of all ranks. */
export class DeviceClock {
  readonly #ranks: Ranks;
  readonly #repetitions: number;

  constructor(ranks: Ranks, repetitions: number) {
    this.#ranks = ranks;
    this.#repetitions = repetitions;
  }

  /** Times a chain. The first chains warm up and say how many steps fill one. */
  async measure(chain: Chain, form: Form = "chain"): Promise<Measured> {
    const most = Math.max(2, Math.min(MOST_STEPS, Math.floor(600 / (chain.callsPerStep ?? 1))));
    const gated = form !== "launched" && !chain.hostPaced, { calls = 1 } = chain;
    let iterations = 3, enqueueUs = 0;
    for (let round = 0; round < 2; round++) {
      const first = await this.#time(chain, iterations, false, 0);
      enqueueUs = first.enqueueUs;
      iterations = Math.max(3, Math.min(most, Math.round(CHAIN_US / Math.max(1, first.us))));
    }
    const us: number[] = [], enqueued: number[] = [];
    let late = 0;
    for (let i = 0; i < this.#repetitions; i++) {
      let one = await this.#time(chain, iterations, gated, enqueueUs);
      for (let tries = 0; one.late && tries < 3; tries++) {
        one = await this.#time(chain, iterations, gated, one.enqueueUs * 2 ** tries);
      }
      us.push(one.us / calls);
      enqueued.push(one.enqueueUs / calls);
      enqueueUs = Math.max(one.enqueueUs, enqueueUs / 2);
      if (one.late) late++;
    }
    const { median } = spreadOf(enqueued);
    return { form, us: spreadOf(us), iterations, repetitions: us.length, enqueueUs: median, late };
  }

  /** One chain. */
  async #time(
    chain: Chain,
    iterations: number,
    gated: boolean,
    enqueueUs: number,
  ): Promise<{ us: number; enqueueUs: number; late: boolean }> {
    const { lanes } = chain;
    await within(LOST_MS, "a barrier", this.#ranks.rest());
    const mayGate = gated && this.#ranks.hasGate;
    const opened = mayGate ? this.#ranks.shut(lanes, 3 + 2 * iterations * enqueueUs / 1000) : this.#together(lanes);
    const starts = record(lanes), begin = nowUs();
    for (let i = 0; i < iterations; i++) {
      const step = chain.step();
      if (step) await step;
    }
    const enqueued = (nowUs() - begin) / iterations;
    const ends = record(lanes);
    const late = gated && opened.some((event) => event.done);
    await all([...opened, ...starts, ...ends]);
    let ms = 0;
    const deviceOf = (i: number): number => lanes[i]!.buffer.deviceIndex;
    ends.forEach((end, i) =>
      starts.forEach((start, k) => {
        if (deviceOf(i) === deviceOf(k)) ms = Math.max(ms, end.elapsedSince(start));
      })
    );
    return { us: ms * 1000 / iterations, enqueueUs: enqueued, late };
  }

  /** A barrier in front of lanes that are not held back. */
  #together(lanes: readonly Lane[]): EpEvent[] {
    const opened = this.#ranks.buffers.map((buffer) => buffer.barrier({ stream: buffer.commStream }));
    lanes.forEach(({ stream }, i) => opened[i % opened.length]!.wait(stream));
    return opened;
  }
}

const record = (lanes: readonly Lane[]): EpEvent[] => lanes.map(({ buffer, stream }) => buffer.record(stream));
