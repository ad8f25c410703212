/**
 * What the tests of groups share: a free port, TCP groups inside this process, raw strangers, ranks as child processes.
 * Everything is on the loopback interface and bounded in number and time.
 */
import { type ChildProcess, spawn } from "node:child_process";
import { connect, createServer, type Socket } from "node:net";
import process from "node:process";
import { type ConnectOptions, Group } from "../../lib/group/group.ts";

/** Options of a test that starts processes or waits for deadlines. */
export const bounded = { timeout: 60_000 };

/** A port that nobody listens on now. */
export function freePort(): Promise<number> {
  return new Promise((resolve) => {
    const server = createServer();
    server.listen(0, "127.0.0.1", () => {
      const { port } = server.address() as { port: number };
      server.close(() => resolve(port));
    });
  });
}

/** Options of rank `rank` on `port`, with a log that is an array. */
export function optionsOf(rank: number, size: number, port: number, logged: string[] = []): ConnectOptions {
  return { rank, size, host: "127.0.0.1", port, timeoutMs: 20_000, log: (message) => logged.push(message) };
}

/** All ranks of a TCP group in this process. */
export async function tcpGroups(size: number, options: Partial<ConnectOptions> = {}): Promise<Group[]> {
  const port = await freePort();
  return await Promise.all(
    Array.from({ length: size }, (_, rank) => Group.connect({ ...optionsOf(rank, size, port), ...options })),
  );
}

/** Leaves all groups. */
export async function disposeAll(groups: readonly Group[]): Promise<void> {
  await Promise.all(groups.map((group) => group[Symbol.asyncDispose]()));
}

/** The reason of a promise that must reject; bounded by `limitMs`. */
export async function rejection(
  promise: Promise<unknown>,
  limitMs = 15_000,
): Promise<Error & { code?: string; peer?: number }> {
  const { promise: late, reject } = Promise.withResolvers<never>();
  const timer = setTimeout(() => reject(new Error(`still pending after ${limitMs} ms`)), limitMs);
  try {
    await Promise.race([promise, late]);
  } catch (error) {
    return error as Error;
  } finally {
    clearTimeout(timer);
  }
  throw new Error("expected a rejection");
}

/** Waits until `condition` holds, 20 seconds at most. */
export async function until(condition: () => boolean | Promise<boolean>, what: string): Promise<void> {
  for (let i = 0; !await condition(); i++) {
    if (i === 4000) throw new Error(`waited 20 s for: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

/** A connection that knows nothing of the protocol. */
export interface Stranger {
  socket: Socket;
  received: Uint8Array[];
  closed: Promise<void>;
}

/** Connects, trying again until somebody listens, and sends `bytes`. */
export async function stranger(port: number, bytes?: Uint8Array, tries = 100): Promise<Stranger> {
  for (let i = 1;; i++) {
    const socket = connect({ host: "127.0.0.1", port });
    const received: Uint8Array[] = [];
    socket.on("data", (data) => received.push(data as Uint8Array));
    socket.on("error", () => {});
    const closed = new Promise<void>((resolve) => socket.on("close", () => resolve()));
    const opened = await Promise.race([new Promise<boolean>((r) => socket.on("connect", () => r(true))), closed]);
    if (opened) {
      if (bytes) socket.write(bytes);
      return { socket, received, closed };
    }
    if (i === tries) throw new Error(`nobody listens on ${port}`);
    await new Promise((resolve) => setTimeout(resolve, 20));
  }
}

/** A child process of this runtime and what it has said. */
export interface Child {
  process: ChildProcess;
  output: { stdout: string; stderr: string };
  /** Exit code and signal, when all output has come. */
  ended: Promise<{ code: number | null; signal: string | null }>;
}

/** Starts `script` (a path of the repository) under this very runtime. */
export function startChild(script: string, args: string[] = [], env: Record<string, string> = {}): Child {
  const path = new URL(`../../${script}`, import.meta.url).pathname;
  const command = "Bun" in globalThis ? [path, ...args] : ["run", "-A", path, ...args];
  const child = spawn(process.execPath, command, { env: { ...cleanEnv(), ...env }, stdio: ["ignore", "pipe", "pipe"] });
  const output = { stdout: "", stderr: "" };
  child.stdout.on("data", (data) => output.stdout += data);
  child.stderr.on("data", (data) => output.stderr += data);
  const ended = new Promise<{ code: number | null; signal: string | null }>((resolve) => {
    child.on("close", (code, signal) => resolve({ code, signal }));
  });
  return { process: child, output, ended };
}

/** The environment without what a launcher around the tests may have set. */
function cleanEnv(): Record<string, string | undefined> {
  const launcher = /^(RANK|WORLD_SIZE|LOCAL_|MASTER_|DEEPEP_(PORT|SECRET)|TORCHELASTIC|SLURM_|OMPI_|PMI|MPI_)/;
  return Object.fromEntries(Object.entries(process.env).filter(([name]) => !launcher.test(name)));
}
