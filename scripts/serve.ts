/**
 * An inference worker in small: an HTTP server with the ranks of an MoE layer embedded, in one process.
 *
 * In: the flags below. Out: `POST /generate` takes bf16 rows, sends them through a decode step beside the sequences that run
 * anyway, and answers with what came back; `GET /metrics` tells steps a second, masked ranks, and how long the event loops let
 * events wait. Each rank has a Web Worker, which makes decode steps one after another (worker.ts); this thread only serves
 * HTTP. With `--load` it asks itself, from another thread, and prints a line of JSON. Runs under Bun and Deno.
 */
import { createServer as createTcpServer } from "node:net";
import process from "node:process";
import { parseArgs } from "node:util";
import type { Backend } from "../mod.ts";
import { openBest } from "../lib/device.ts";
import type { DecodeShape } from "./decode/draw.ts";
import { delaysOf, type Times } from "./serve/delay.ts";
import { bodyOf, type HttpServer, listen, TooLong } from "./serve/http.ts";
import type { FromLoad, Load, LoadReport } from "./serve/load.ts";
import type { FromRank, RankMetrics, ToRank } from "./serve/messages.ts";
import type { Pulse } from "./serve/pulse.ts";

/** Requests that are under way at once, at most: more are refused, so that what waits has bounds. */
const MOST_REQUESTS = 256;
/** How long the load runs before it counts. */
const WARMUP_SECONDS = 1;
/** How long requests under way may take when the server ends; and workers that were told to end. */
const DRAIN_MS = 1000, END_MS = 200;
const USAGE = `Usage: serve.ts [options]      (bun scripts/serve.ts, or deno run -A scripts/serve.ts)

  --port N                  default 8080; 0 = any that is free
  --backend auto|cpu|cuda   default: the best that works here
  --ranks N                 workers, a rank each; default 8, on cpu 2
  --tokens N                of each rank in a step, default 128, on cpu 8
  --hidden N                default 7168, on cpu 256
  --experts N               default 256, on cpu 16
  --topk N                  default 8, on cpu 4
  --load N                  ask with N clients at a time
  --rate N                  of all clients, requests a second; default: one after another
  --seconds N               end after so long; default 10 with --load, which asks ${WARMUP_SECONDS} before it counts; else never
  --help                    this text

POST /generate   bf16 rows [n, hidden] as bytes, n at most --tokens; answers with as many
GET /metrics     JSON
`;

interface Options {
  readonly port: number;
  readonly backend: Backend;
  readonly ranks: number;
  readonly shape: DecodeShape;
  readonly load: number;
  readonly rate: number;
  readonly seconds: number | undefined;
}

async function parse(args: string[]): Promise<Options | undefined> {
  const text = { type: "string" } as const;
  const { values } = parseArgs({
    args,
    options: {
      port: { ...text, default: "8080" },
      backend: { ...text, default: "auto" },
      ranks: text,
      tokens: text,
      hidden: text,
      experts: text,
      topk: text,
      load: { ...text, default: "0" },
      rate: { ...text, default: "0" },
      seconds: text,
      help: { type: "boolean", default: false },
    },
  });
  if (values.help) return undefined;
  if (!["auto", "cpu", "cuda"].includes(values.backend)) {
    throw new RangeError(`Cannot serve: --backend is ${values.backend}, needs auto, cpu or cuda`);
  }
  const backend = values.backend === "auto" ? (await openBest()).device.backend : values.backend as Backend;
  const usual = backend === "cpu"
    ? { ranks: 2, tokens: 8, hidden: 256, experts: 16, topk: 4 }
    : { ranks: 8, tokens: 128, hidden: 7168, experts: 256, topk: 8 };
  const whole = (
    name: keyof typeof usual | "port" | "load" | "rate" | "seconds",
    least: number,
    otherwise: number,
  ): number => {
    const value = values[name] === undefined ? otherwise : Number(values[name]);
    if (Number.isSafeInteger(value) && value >= least) return value;
    throw new RangeError(`Cannot serve: --${name} is ${values[name]}, needs a whole number from ${least}`);
  };
  const of = (name: keyof typeof usual): number => whole(name, 1, usual[name]);
  const load = whole("load", 0, 0);
  return {
    port: whole("port", 0, 8080),
    backend,
    ranks: of("ranks"),
    shape: { tokens: of("tokens"), hidden: of("hidden"), experts: of("experts"), topk: of("topk") },
    load,
    rate: whole("rate", 0, 0),
    seconds: load > 0 || values.seconds !== undefined ? whole("seconds", 1, 10) : undefined,
  };
}

function freePort(): Promise<number> {
  const { promise, resolve, reject } = Promise.withResolvers<number>();
  const server = createTcpServer().once("error", reject).listen(0, "127.0.0.1", () => {
    const { port } = server.address() as { port: number };
    server.close(() => resolve(port));
  });
  return promise;
}

/** Starts a worker, and waits until it listens: what is sent before may be lost. */
async function startWorker<T>(file: string): Promise<Worker> {
  const worker = new Worker(new URL(file, import.meta.url), { type: "module" });
  const { promise, resolve, reject } = Promise.withResolvers<void>();
  worker.onmessage = () => resolve();
  worker.onerror = (event: ErrorEvent) => reject(new Error(`${file}: ${event.message}`));
  await promise;
  return worker;
}

/** What a rank answers. */
type Told = Uint16Array<ArrayBuffer> | RankMetrics;

/** A rank's worker, as the server sees it. */
class RankClient {
  readonly #worker: Worker;
  readonly #asked = new Map<number, PromiseWithResolvers<Told>>();
  readonly opened = Promise.withResolvers<void>();
  readonly stopped = Promise.withResolvers<void>();
  #nextId = 0;
  #failure: Error | undefined;

  constructor(worker: Worker, failed: (error: Error) => void) {
    this.#worker = worker;
    worker.onmessage = ({ data }: MessageEvent<FromRank>) => {
      if (data.kind === "generated") this.#settle(data.id, data.rows);
      else if (data.kind === "metrics") this.#settle(data.id, data.metrics);
      else if (data.kind === "open") this.opened.resolve();
      else if (data.kind === "stopped") this.stopped.resolve();
      else if (data.kind === "failed") failed(new Error(data.message));
    };
    worker.onerror = (event: ErrorEvent) => failed(new Error(event.message));
  }

  /** Requests that are under way. */
  get busy(): number {
    return this.#asked.size;
  }
  send(message: ToRank, transfer: Transferable[] = []): void {
    this.#worker.postMessage(message, transfer);
  }
  async generate(rows: Uint16Array<ArrayBuffer>): Promise<Uint16Array<ArrayBuffer>> {
    const told = await this.#ask((id) => this.send({ kind: "generate", id, rows }, [rows.buffer]));
    return told as Uint16Array<ArrayBuffer>;
  }
  async metrics(reset = false): Promise<RankMetrics> {
    return await this.#ask((id) => this.send({ kind: "metrics", id, reset })) as RankMetrics;
  }
  /** Some rank has failed, so that this one makes no more steps either: nothing is answered any more. */
  fail(error: Error): void {
    this.#failure = error;
    for (const { reject } of this.#asked.values()) reject(error);
    this.#asked.clear();
  }
  terminate(): void {
    this.#worker.terminate();
  }

  #ask(send: (id: number) => void): Promise<Told> {
    if (this.#failure) return Promise.reject(this.#failure);
    const id = this.#nextId++, answer = Promise.withResolvers<Told>();
    this.#asked.set(id, answer);
    send(id);
    return answer.promise;
  }
  #settle(id: number, value: Told): void {
    this.#asked.get(id)?.resolve(value);
    this.#asked.delete(id);
  }
}

class Service {
  readonly #options: Options;
  readonly #ranks: readonly RankClient[];
  readonly #pulse: Worker;
  readonly #pulseEnds: Int32Array;
  readonly #delays: Times;
  readonly #pulsePort: MessagePort;
  #server: HttpServer | undefined;
  #answering = 0;
  /** Rejects when a rank has failed. */
  readonly failed: Promise<never>;
  #began = performance.now();
  #stepsBefore = 0;

  private constructor(
    options: Options,
    parts: {
      ranks: readonly RankClient[];
      pulse: Worker;
      pulseEnds: Int32Array;
      port: MessagePort;
      failed: Promise<never>;
    },
  ) {
    this.#options = options;
    this.#ranks = parts.ranks;
    this.#pulse = parts.pulse;
    this.#pulseEnds = parts.pulseEnds;
    this.#pulsePort = parts.port;
    this.failed = parts.failed;
    this.#delays = delaysOf(parts.port);
  }

  /** Starts the ranks, then listens. */
  static async start(options: Options): Promise<Service> {
    const { ranks: size, backend, shape } = options, failed = Promise.withResolvers<never>();
    const [pulse, ...workers] = await Promise.all([
      startWorker("./serve/pulse.ts"),
      ...Array.from({ length: size }, () => startWorker("./serve/worker.ts")),
    ]);
    const ranks = workers.map((worker) => new RankClient(worker, failed.reject));
    failed.promise.catch((error) => ranks.forEach((rank) => rank.fail(error)));
    const [port, secret] = [await freePort(), crypto.randomUUID()], limit = new SharedArrayBuffer(4);
    new Int32Array(limit)[0] = 2 ** 31 - 1;
    const channels = Array.from({ length: size + 1 }, () => new MessageChannel());
    ranks.forEach((client, rank) => {
      const place = { rank, size, port, secret, backend, shape, limit };
      client.send({ kind: "open", place, pulse: channels[rank]!.port1 }, [channels[rank]!.port1]);
    });
    await Promise.race([failed.promise, Promise.all(ranks.map(({ opened }) => opened.promise))]);
    const ports = channels.map(({ port2 }) => port2), ends = new Int32Array(new SharedArrayBuffer(4));
    pulse!.postMessage({ ports, ends } satisfies Pulse, ports);
    const parts = { ranks, pulse: pulse!, pulseEnds: ends, port: channels[size]!.port1, failed: failed.promise };
    const service = new Service(options, parts);
    service.#server = listen(options.port, (request) => service.#answer(request));
    return service;
  }

  get url(): string {
    return this.#server!.url;
  }

  async #answer(request: Request): Promise<Response> {
    const say = (status: number, text: string) => new Response(text, { status });
    const { pathname } = new URL(request.url);
    if (this.#answering >= MOST_REQUESTS) return say(503, `${MOST_REQUESTS} requests are under way\n`);
    this.#answering++;
    try {
      if (request.method === "POST" && pathname === "/generate") return new Response(await this.#generate(request));
      if (request.method === "GET" && pathname === "/metrics") return Response.json(await this.metrics());
      return say(404, "there are POST /generate and GET /metrics\n");
    } catch (error) {
      const status = error instanceof TooLong ? 413 : error instanceof RangeError ? 400 : 500;
      return say(status, `${(error as Error).message}\n`);
    } finally {
      this.#answering--;
    }
  }

  async #generate(request: Request): Promise<Uint8Array<ArrayBuffer>> {
    const { tokens, hidden } = this.#options.shape, rowBytes = 2 * hidden;
    const body = await bodyOf(request, tokens * rowBytes);
    if (body.length === 0 || body.length % rowBytes !== 0) {
      throw new RangeError(`rows have ${rowBytes} bytes, ${body.length} are no whole number of them`);
    }
    const idlest = this.#ranks.reduce((a, b) => b.busy < a.busy ? b : a);
    const rows = await idlest.generate(new Uint16Array(body.buffer));
    return new Uint8Array(rows.buffer, rows.byteOffset, rows.byteLength);
  }

  /** What there is to tell; with `reset` times begin anew. */
  async metrics(reset = false) {
    const ranks = await Promise.all(this.#ranks.map((rank) => rank.metrics(reset)));
    const seconds = (performance.now() - this.#began) / 1000, steps = ranks[0]!.steps;
    const main = this.#delays.percentiles;
    const told = {
      backend: ranks[0]!.backend,
      runtime: "Bun" in globalThis ? "bun" : "deno",
      ranks: ranks.length,
      ...this.#options.shape,
      steps,
      stepsPerSecond: Math.round((steps - this.#stepsBefore) / seconds),
      requests: ranks.reduce((sum, rank) => sum + rank.requests, 0),
      failures: ranks.reduce((sum, rank) => sum + rank.failures, 0),
      maskedRanks: [...new Set(ranks.flatMap((rank) => rank.maskedRanks))].sort((a, b) => a - b),
      /** Milliseconds that an event waited. */
      eventLoopDelay: { main, workers: ranks.map(({ delay }) => delay) },
    };
    if (reset) {
      this.#delays.reset();
      this.#began = performance.now();
      this.#stepsBefore = steps;
    }
    return told;
  }

  /** Asks itself from another thread, and forgets what was before that was warm; tells what it saw. */
  async load(clients: number, rate: number, seconds: number): Promise<LoadReport> {
    const worker = await startWorker("./serve/load.ts"), { hidden, tokens } = this.#options.shape;
    const report = Promise.withResolvers<LoadReport>();
    worker.onmessage = ({ data }: MessageEvent<FromLoad>) => {
      if (data === "warm") this.metrics(true).catch(report.reject);
      else if (data !== "listening") report.resolve(data);
    };
    const more = { warmupSeconds: WARMUP_SECONDS, seconds, hidden, tokens: Math.min(4, tokens) };
    worker.postMessage({ url: `${this.url}/generate`, clients, rate, ...more } satisfies Load);
    const done = await Promise.race([this.failed, report.promise]);
    worker.terminate();
    return done;
  }

  /** Lets requests end, then the ranks, before the same step. */
  async stop(): Promise<void> {
    const until = performance.now() + DRAIN_MS, soon = () => new Promise((resolve) => setTimeout(resolve, 1));
    while (this.#answering > 0 && performance.now() < until) await soon();
    await this.#server!.stop();
    for (const rank of this.#ranks) rank.send({ kind: "stop" });
    await Promise.race([this.failed, Promise.all(this.#ranks.map(({ stopped }) => stopped.promise))]);
    const ended = new Promise<void>((resolve) => this.#pulse.onmessage = () => resolve());
    Atomics.store(this.#pulseEnds, 0, 1);
    Atomics.notify(this.#pulseEnds, 0);
    await ended;
    this.#pulsePort.close();
    for (const worker of [this.#pulse, ...this.#ranks]) worker.terminate();
    // Nothing tells when a worker's thread has ended, and the process shall not end beneath it.
    await new Promise((resolve) => setTimeout(resolve, END_MS));
  }
}

/** Answers the exit status. */
async function main(): Promise<number> {
  const options = await parse(process.argv.slice(2));
  if (!options) {
    console.log(USAGE);
    return 0;
  }
  const { load, rate, seconds } = options, service = await Service.start(options);
  console.error(`listening on ${service.url}`);
  if (load > 0) {
    const asked = await service.load(load, rate, seconds!), metrics = await service.metrics();
    const good = asked.wrong === 0 && asked.errors === 0 && asked.requests > 0 && metrics.failures === 0;
    const { workers, main } = metrics.eventLoopDelay, requestsPerSecond = Math.round(asked.requests / seconds!);
    const goal = { mainUnder1Ms: main.p99 < 1, workersUnder1Ms: workers.every(({ p99 }) => p99 < 1) };
    const report = {
      serve: good ? "passed" : "failed",
      load,
      rate,
      seconds,
      warmupSeconds: WARMUP_SECONDS,
      requestsPerSecond,
      ...goal,
      ...metrics,
      ...asked,
    };
    console.log(JSON.stringify(report));
    await service.stop();
    return good ? 0 : 1;
  }
  const end = Promise.withResolvers<void>();
  for (const signal of ["SIGINT", "SIGTERM"] as const) process.once(signal, () => end.resolve());
  if (seconds !== undefined) setTimeout(() => end.resolve(), 1000 * seconds);
  await Promise.race([service.failed, end.promise]);
  await service.stop();
  return 0;
}

if (import.meta.main) {
  process.exit(
    await main().catch((error) => {
      console.error(error instanceof RangeError ? error.message : error.stack ?? error);
      return 1;
    }),
  );
}
