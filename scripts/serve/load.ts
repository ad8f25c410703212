/**
 * A worker that asks the server: some clients, each with one request at a time, whose answers it compares with what was sent.
 *
 * In: where, how many clients, for how long. Out: a report. It has a thread of its own so that it does not delay the server's.
 */
import { Times } from "./delay.ts";
import type { Percentiles } from "./delay.ts";
import { exactRow } from "./messages.ts";

/** What to ask. */
export interface Load {
  readonly url: string;
  readonly clients: number;
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

const self = globalThis as unknown as {
  onmessage: (event: MessageEvent<Load>) => void;
  postMessage(message: LoadReport | "listening"): void;
};

async function ask({ url, clients, seconds, hidden, tokens }: Load): Promise<LoadReport> {
  const latency = new Times(), end = performance.now() + 1000 * seconds;
  let requests = 0, wrong = 0, errors = 0, firstError: string | undefined;
  const client = async (): Promise<void> => {
    while (performance.now() < end) {
      const rows = Array.from({ length: 1 + Math.floor(Math.random() * tokens) }, () => exactRow(hidden, Math.random));
      const sent = new Uint16Array(rows.length * hidden);
      rows.forEach((row, i) => sent.set(row, i * hidden));
      const began = performance.now();
      try {
        const response = await fetch(url, { method: "POST", body: sent });
        const got = await response.arrayBuffer();
        if (!response.ok) throw new Error(`${response.status}: ${new TextDecoder().decode(got)}`);
        const answer = new Uint16Array(got);
        requests++;
        latency.add(performance.now() - began);
        if (answer.length !== sent.length || answer.some((bits, i) => bits !== sent[i])) wrong++;
      } catch (error) {
        errors++;
        firstError ??= String(error);
      }
    }
  };
  await Promise.all(Array.from({ length: clients }, client));
  return { requests, wrong, errors, firstError, latencyMs: latency.percentiles };
}

self.onmessage = async ({ data }) => self.postMessage(await ask(data));
self.postMessage("listening");
