/**
 * A rank of serve.ts in a Web Worker: decode steps one after another, with the requests that have come since the last one.
 *
 * In: messages of serve.ts. Out: answers to requests, metrics. A step always has all of a rank's tokens: the places of requests
 * come first, the others are filled with sequences of its own, as a server's batch would be. The worker's event loop goes on
 * while a step runs on the device. All ranks must stop before the same step: rank 0 says which, just before it begins the step
 * that is to be the last; no rank can end that step without rank 0, and each looks again after it.
 */
import { EpBuffer, Group } from "../../mod.ts";
import { decodeBuffer, DecodeStep } from "../decode/step.ts";
import { delaysOf, type Times } from "./delay.ts";
import { exactRow, type FromRank, type RankMetrics, type RankPlace, route, type ToRank } from "./messages.ts";

const self = globalThis as unknown as {
  onmessage: (event: MessageEvent<ToRank>) => void;
  postMessage(message: FromRank, transfer?: Transferable[]): void;
};

interface Request {
  readonly id: number;
  readonly rows: Uint16Array;
}

class Rank {
  readonly #place: RankPlace;
  readonly #group: Group;
  readonly #buffer: EpBuffer;
  readonly #step: DecodeStep;
  readonly #limit: Int32Array;
  readonly #idx: Int32Array<ArrayBuffer>;
  readonly #weights: Float32Array<ArrayBuffer>;
  readonly #waiting: Request[] = [];
  #requests = 0;
  #failures = 0;
  #steps = 0;
  #stopping = false;

  private constructor(place: RankPlace, group: Group, buffer: EpBuffer) {
    const { tokens, topk } = place.shape;
    this.#place = place;
    this.#group = group;
    this.#buffer = buffer;
    this.#step = new DecodeStep(buffer, place.shape, { standIn: { multiply: 1, add: 1 } });
    this.#limit = new Int32Array(place.limit);
    this.#idx = new Int32Array(tokens * topk);
    this.#weights = new Float32Array(tokens * topk);
    this.#fill();
  }

  static async create(place: RankPlace): Promise<Rank> {
    const { rank, size, port, secret, backend, shape } = place;
    const group = await Group.connect({ rank, size, host: "127.0.0.1", port, secret });
    const more = { backend, timeoutMs: 10_000, maskOnTimeout: true };
    return new Rank(place, group, await EpBuffer.create(group, { ...decodeBuffer(shape), ...more }));
  }

  get backend() {
    return this.#buffer.backend;
  }

  /** The sequences of its own. */
  #fill(): void {
    const { shape: { tokens, hidden } } = this.#place;
    const rows = Array.from({ length: tokens }, () => exactRow(hidden, Math.random));
    rows.forEach((row, place) => this.#route(place, row));
    const x = new Uint16Array(tokens * hidden);
    rows.forEach((row, place) => x.set(row, place * hidden));
    this.#step.x.write(x);
    this.#writeRoutes();
  }

  #route(place: number, row: Uint16Array): void {
    const { shape } = this.#place, [begin, end] = [place * shape.topk, (place + 1) * shape.topk];
    route(row, shape, this.#idx.subarray(begin, end), this.#weights.subarray(begin, end));
  }
  #writeRoutes(): void {
    this.#step.topkIdx.write(this.#idx);
    this.#step.topkWeights.write(this.#weights);
  }

  /** Rank 0 lets all ranks stop after its next step. */
  stop(): void {
    this.#stopping = this.#place.rank === 0;
  }

  add(request: Request): void {
    this.#waiting.push(request);
  }

  metrics(times: Times): RankMetrics {
    const { maskedRanks, backend, rank } = this.#buffer;
    try {
      this.#failures = this.#buffer.stats().numFailures;
    } catch {
      // The GPU's copies have other work: as of the last answer.
    }
    const counts = { steps: this.#steps, requests: this.#requests, failures: this.#failures };
    return { rank, backend, ...counts, maskedRanks, delay: times.percentiles };
  }

  /** Steps until the limit. */
  async run(): Promise<void> {
    for (;; this.#steps++) {
      if (this.#steps >= Atomics.load(this.#limit, 0)) return;
      if (this.#stopping) Atomics.store(this.#limit, 0, this.#steps + 1);
      this.#stopping = false;
      await this.#one();
    }
  }

  async #one(): Promise<void> {
    const { tokens, hidden } = this.#place.shape, taken: Request[] = [];
    let used = 0;
    while (this.#waiting.length > 0 && used + this.#waiting[0]!.rows.length / hidden <= tokens) {
      const request = this.#waiting.shift()!;
      this.#step.x.slice(used, used + request.rows.length / hidden).write(new Uint16Array(request.rows));
      for (let at = 0; at < request.rows.length; at += hidden) {
        this.#route(used++, request.rows.subarray(at, at + hidden));
      }
      taken.push(request);
    }
    if (used > 0) this.#writeRoutes();
    const event = this.#step.run();
    if (used === 0) return await event;
    const rows = await this.#step.out.slice(0, used).read();
    let at = 0;
    for (const request of taken) {
      const answer = rows.slice(at, at += request.rows.length);
      self.postMessage({ kind: "generated", id: request.id, rows: answer }, [answer.buffer]);
      this.#requests++;
    }
  }

  async close(): Promise<void> {
    this.#step[Symbol.dispose]();
    await this.#buffer.close();
    await this.#group[Symbol.asyncDispose]();
  }
}

let rank: Rank | undefined, delays: Times | undefined;

async function open(place: RankPlace, pulse: MessagePort): Promise<void> {
  try {
    rank = await Rank.create(place);
    delays = delaysOf(pulse);
    self.postMessage({ kind: "open", backend: rank.backend });
    await rank.run();
    await rank.close();
    pulse.close();
    self.postMessage({ kind: "stopped" });
  } catch (error) {
    self.postMessage({ kind: "failed", message: `rank ${place.rank}: ${(error as Error).stack ?? error}` });
  }
}

self.onmessage = ({ data }) => {
  if (data.kind === "open") void open(data.place, data.pulse);
  else if (data.kind === "generate") rank!.add(data);
  else if (data.kind === "stop") rank!.stop();
  else {
    self.postMessage({ kind: "metrics", id: data.id, metrics: rank!.metrics(delays!) });
    if (data.reset) delays!.reset();
  }
};
self.postMessage({ kind: "listening" });
