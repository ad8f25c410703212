/**
 * How long an event loop lets events wait.
 *
 * In: pulses, messages that another thread (pulse.ts) sends every millisecond with the time of their sending. Out: percentiles
 * of the time until each was handled. Timers would not do: their own resolution is a millisecond. Called by serve.ts and
 * worker.ts.
 */
import { createHistogram } from "node:perf_hooks";

/** Milliseconds. */
export interface Percentiles {
  readonly count: number;
  readonly p50: number;
  readonly p99: number;
  readonly max: number;
}

/** Now, on a clock that all threads of the process have in common. */
export const sharedNow = (): number => performance.timeOrigin + performance.now();

/** Times in milliseconds, summed up. */
export class Times {
  #histogram = createHistogram();

  add(ms: number): void {
    this.#histogram.record(Math.max(1, Math.round(ms * 1e6)));
  }
  reset(): void {
    this.#histogram = createHistogram();
  }
  get percentiles(): Percentiles {
    const { count, max } = this.#histogram, ms = (ns: number) => Number((ns / 1e6).toFixed(3));
    if (count === 0) return { count: 0, p50: 0, p99: 0, max: 0 };
    return { count, p50: ms(this.#histogram.percentile(50)), p99: ms(this.#histogram.percentile(99)), max: ms(max) };
  }
}

/** The delays of the event loop that this is called in, by the pulses of `port`. */
export function delaysOf(port: MessagePort): Times {
  const times = new Times();
  port.onmessage = ({ data }: MessageEvent<number>) => times.add(sharedNow() - data);
  return times;
}
