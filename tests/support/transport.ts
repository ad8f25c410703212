/**
 * How a world under test reaches its ranks: the same host in this thread, in a Web Worker, or in a process of its own.
 *
 * In: a rank's place and options. Out: something that runs a host's methods by name. Messages are structured clones for
 * workers, and lines of JSON with typed arrays as base64 for processes.
 */
import { type ChildProcess, spawn } from "node:child_process";
import { createInterface } from "node:readline";
import process from "node:process";
import { after } from "node:test";
import { fileURLToPath } from "node:url";
import { EpError, Group } from "@deepep/deepep";
import type { WorldOptions } from "./driver.ts";
import { RankHost } from "./rank_host.ts";

/** Where a rank is, and what it shall be. */
export interface RankPlace {
  readonly rank: number;
  readonly size: number;
  readonly port: number;
  readonly secret: string;
  readonly options: WorldOptions & { backend?: "cpu" | "cuda" };
}

/** A rank that runs methods of its host. */
export interface RemoteRank {
  call(method: string, args: readonly unknown[]): Promise<unknown>;
  close(): Promise<void>;
}

/** What a rank answers with. */
export type Answer = { id: number; value: unknown } | { id: number; error: Record<string, unknown> };

/** An error as plain data. */
export function packError(error: unknown): Record<string, unknown> {
  const { name, message, stack } = error as Error;
  const { code, op, rank, peer, phase, expected, seen } = error as EpError;
  return { name, message, stack, code, op, rank, peer, phase, expected, seen };
}

function unpackError(e: Record<string, unknown>): Error {
  if (e["name"] === "EpError") return new EpError(String(e["message"]), e as unknown as EpError);
  const error = e["name"] === "TypeError"
    ? new TypeError(String(e["message"]))
    : e["name"] === "RangeError"
    ? new RangeError(String(e["message"]))
    : new Error(String(e["message"]));
  error.stack = String(e["stack"]);
  return error;
}

/** The far side of workers and processes: `open` makes a host for a place, `close` ends it, other methods are the host's. */
export function farSide(): (method: string, args: readonly unknown[]) => Promise<unknown> {
  let group: Group | undefined, host: RankHost | undefined;
  return async (method, args) => {
    if (method === "open") {
      const { rank, size, port, secret, options } = args[0] as RankPlace;
      group = await Group.connect({ rank, size, host: "127.0.0.1", port, secret, timeoutMs: 60_000 });
      host = await RankHost.create(group, options);
      return true;
    }
    const result = await (host as unknown as Record<string, (...a: unknown[]) => unknown>)[method]!(...args);
    if (method === "close") await group![Symbol.asyncDispose]();
    return result;
  };
}

/** Answers by number. */
class Pending {
  readonly #waiting = new Map<number, PromiseWithResolvers<unknown>>();
  #next = 0;
  add(): { id: number; promise: Promise<unknown> } {
    const id = this.#next++, waiter = Promise.withResolvers<unknown>();
    this.#waiting.set(id, waiter);
    return { id, promise: waiter.promise };
  }
  settle(answer: Answer): void {
    const waiter = this.#waiting.get(answer.id);
    this.#waiting.delete(answer.id);
    if ("error" in answer) waiter?.reject(unpackError(answer.error));
    else waiter?.resolve(answer.value);
  }
  fail(error: Error): void {
    for (const waiter of this.#waiting.values()) waiter.reject(error);
    this.#waiting.clear();
  }
}

/** A rank in this thread. */
export async function localRank(group: Group, options: RankPlace["options"]): Promise<RemoteRank> {
  const host = await RankHost.create(group, options);
  return {
    // deno-lint-ignore require-await -- so that what a method throws is a rejection
    async call(method, args) {
      return (host as unknown as Record<string, (...a: unknown[]) => unknown>)[method]!(...args);
    },
    close: () => host.close(),
  };
}

/** A worker or process that waits for a place, or has one. */
interface Far {
  call(method: string, args: readonly unknown[]): Promise<unknown>;
  end(): Promise<void>;
}

/** A rank somewhere else: `close()` ends it and where it ran. */
const place = async <F extends Far>(far: F, at: RankPlace): Promise<RemoteRank & F> => {
  await far.call("open", [at]);
  const close = async () => {
    await far.call("close", []);
    await far.end();
  };
  return { ...far, close };
};

/** A rank in a Web Worker of its own. */
export const workerRank = async (at: RankPlace): Promise<RemoteRank & Far> => await place(await startWorker(), at);
/** A rank in a process of its own. */
export const processRank = async (at: RankPlace): Promise<RemoteRank & Far & { process: ChildProcess }> =>
  await place(await startProcess(), at);

/** Ranks that go back to a pool when they are closed, so that a suite starts few processes. The pool ends with the tests. */
export function pooled(kind: typeof workerRank | typeof processRank): (at: RankPlace) => Promise<RemoteRank> {
  const idle: Far[] = [];
  after(async () => void await Promise.all(idle.map((far) => far.end())));
  return async (at) => {
    const far = idle.pop() ?? await (kind === workerRank ? startWorker() : startProcess());
    await far.call("open", [at]);
    const close = async () => {
      await far.call("close", []);
      idle.push(far);
    };
    return { call: far.call, close };
  };
}

async function startWorker(): Promise<Far> {
  const worker = new Worker(new URL("./rank_worker.ts", import.meta.url), { type: "module" });
  const pending = new Pending(), listening = Promise.withResolvers<void>();
  worker.onmessage = (event: MessageEvent<Answer>) =>
    event.data.id < 0 ? listening.resolve() : pending.settle(event.data);
  worker.onerror = (event: ErrorEvent) => {
    listening.reject(new Error(event.message));
    pending.fail(new Error(event.message));
  };
  await listening.promise;
  return {
    call(method, args) {
      const { id, promise } = pending.add();
      worker.postMessage({ id, method, args });
      return promise;
    },
    end: () => Promise.resolve(worker.terminate()),
  };
}

/** The arguments that run a TypeScript file in this runtime. */
export function runArgs(file: string): string[] {
  if ("Bun" in globalThis) return [file];
  const map = fileURLToPath(new URL("./import_map.json", import.meta.url));
  return ["run", "-A", "--no-lock", "--import-map", map, file];
}

function startProcess(): Promise<Far & { process: ChildProcess }> {
  const file = fileURLToPath(new URL("./rank_process.ts", import.meta.url));
  const child = spawn(process.execPath, runArgs(file), { stdio: ["pipe", "pipe", "inherit"] });
  const pending = new Pending(), exited = new Promise<void>((resolve) => child.once("exit", () => resolve()));
  createInterface({ input: child.stdout! }).on("line", (line) => pending.settle(decode(line) as Answer));
  child.once("exit", (code, signal) => pending.fail(new Error(`a rank's process exited with ${signal ?? code}`)));
  child.stdin!.on("error", () => {}); // a dead child is reported by its exit
  return Promise.resolve({
    process: child,
    call(method: string, args: readonly unknown[]) {
      const { id, promise } = pending.add();
      child.stdin!.write(`${encode({ id, method, args })}\n`);
      return promise;
    },
    async end() {
      child.stdin!.end();
      await exited;
    },
  });
}

const arrays = { Int32Array, BigInt64Array, Float32Array, Uint16Array, Uint8Array } as const;

/** A line of JSON; typed arrays become base64. */
export function encode(value: unknown): string {
  return JSON.stringify(value, (_, v) => {
    if (!ArrayBuffer.isView(v)) return v;
    return { $: v.constructor.name, b: Buffer64.encode(new Uint8Array(v.buffer, v.byteOffset, v.byteLength)) };
  });
}

/** The value of {@linkcode encode}. */
export function decode(line: string): unknown {
  return JSON.parse(line, (_, v) => {
    if (v === null || typeof v !== "object" || !("$" in v)) return v;
    const bytes = Buffer64.decode(v.b);
    return new arrays[v.$ as keyof typeof arrays](bytes.buffer);
  });
}

const Buffer64 = {
  encode(bytes: Uint8Array): string {
    let text = "";
    for (let i = 0; i < bytes.length; i += 8192) text += String.fromCharCode(...bytes.subarray(i, i + 8192));
    return btoa(text);
  },
  decode: (text: string): Uint8Array<ArrayBuffer> => Uint8Array.from(atob(text), (c) => c.charCodeAt(0)),
};
