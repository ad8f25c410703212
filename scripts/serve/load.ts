/**
 * A worker that asks the server: some clients, each with one request at a time, whose answers it compares with what was sent.
 *
 * In: where, how many clients, how often, for how long. Out: a report. It has a thread of its own so that it does not delay the
 * server's. What it sends is drawn beforehand, and answers are compared as bytes, so that it has time to ask. With a rate,
 * requests have their times, and how long one took counts from its time on: one that had to wait for a client, because the
 * answers before it were slow, was slow itself. It asks for a while before it counts: code is compiled and connections are made
 * then.
 */
import { Buffer } from "node:buffer";
import { type Percentiles, Times } from "./delay.ts";
import { exactRow } from "./messages.ts";

/** Requests that are drawn, and sent in turns. */
const DRAWN = 64;

/** What to ask. */
export interface Load {
  readonly url: string;
  readonly clients: number;
  /** Requests a second of all clients; 0 = as many as they can. */
  readonly rate: number;
  /** Before it counts, and while it does. */
  readonly warmupSeconds: number;
  readonly seconds: number;
  readonly hidden: number;
  /** The most tokens of a request. */
  readonly tokens: number;
}

/** What came of it. */
export interface LoadReport {
  readonly requests: number;
  /** Answers that were not what was sent. */
  readonly wrong: number;
  /** Requests that were refused or failed, and why the first one was. */
  readonly errors: number;
  readonly firstError: string | undefined;
  readonly latencyMs: Percentiles;
}

/** To serve.ts. */
export type FromLoad = "listening" | "warm" | LoadReport;

const self = globalThis as unknown as {
  onmessage: (event: MessageEvent<Load>) => void;
  postMessage(message: FromLoad): void;
};

/** What a client sends: bf16 rows `[n, hidden]` that come back as they are. */
function draw(hidden: number, tokens: number): Buffer<ArrayBuffer>[] {
  return Array.from({ length: DRAWN }, (_, i) => {
    const rows = new Uint16Array((1 + i % tokens) * hidden);
    for (let at = 0; at < rows.length; at += hidden) rows.set(exactRow(hidden, Math.random), at);
    return Buffer.from(rows.buffer);
  });
}

const sleep = (ms: number): Promise<void> => new Promise((resolve) => setTimeout(resolve, ms));

async function ask({ url, clients, rate, warmupSeconds, seconds, hidden, tokens }: Load): Promise<LoadReport> {
  const drawn = draw(hidden, tokens), latency = new Times(), begin = performance.now();
  const warm = begin + 1000 * warmupSeconds, end = warm + 1000 * seconds;
  let sent = 0, requests = 0, wrong = 0, errors = 0, firstError: string | undefined;
  /** When the next request is due. */
  const due = (): number => rate === 0 ? performance.now() : begin + 1000 * sent / rate;
  const client = async (): Promise<void> => {
    for (let at = due(); at < end && performance.now() < end; at = due()) {
      const body = drawn[sent++ % DRAWN]!, counts = at >= warm;
      if (at > performance.now()) await sleep(at - performance.now());
      try {
        const response = await fetch(url, { method: "POST", body });
        const got = Buffer.from(await response.arrayBuffer());
        if (!response.ok) throw new Error(`${response.status}: ${got}`);
        if (!counts) continue;
        requests++;
        latency.add(performance.now() - at);
        if (!got.equals(body)) wrong++;
      } catch (error) {
        errors++;
        firstError ??= String(error);
      }
    }
  };
  setTimeout(() => self.postMessage("warm"), 1000 * warmupSeconds);
  await Promise.all(Array.from({ length: clients }, client));
  return { requests, wrong, errors, firstError, latencyMs: latency.percentiles };
}

self.onmessage = async ({ data }) => self.postMessage(await ask(data));
self.postMessage("listening");
