/**
 * A worker that sees when counts arrive in host memory: it reads them in a tight loop on a thread of its own.
 *
 * In: the library's path, and shared words: control i32 [request, watching, seen, stop]; times i64 [seen ns, address]. Out: the time,
 * by the clock of the system. Started by wake.ts.
 */
import { openLibrary } from "../../../lib/ffi/open.ts";
import type { BackendName } from "../../../lib/ffi/types.ts";
import { monotonicNs, SENTINEL } from "./wake_clock.ts";

interface Scope {
  onmessage: ((event: MessageEvent) => void) | null;
  postMessage(message: unknown): void;
  close(): void;
}
const scope = globalThis as unknown as Scope;

/** What the worker is told first. */
export interface WatchMessage {
  readonly backend: BackendName;
  readonly path: string;
  readonly control: SharedArrayBuffer;
  readonly times: SharedArrayBuffer;
}

/** A watch that sees nothing ends after so many reads, seconds of them. */
const MOST_READS = 200_000_000;

async function watch(message: WatchMessage): Promise<void> {
  const { symbols } = await openLibrary(message.backend, { path: message.path });
  const control = new Int32Array(message.control), times = new BigInt64Array(message.times);
  const word = new Int32Array(new ArrayBuffer(4));
  const now = monotonicNs();
  now();
  scope.postMessage("ready");
  for (let request = 0;;) {
    Atomics.wait(control, 0, request);
    request = Atomics.load(control, 0);
    if (Atomics.load(control, 3) !== 0) break;
    const address = Atomics.load(times, 1);
    symbols.deepep_host_read(address, word, 4n);
    Atomics.store(control, 1, request);
    for (let reads = 0; reads < MOST_READS; reads++) {
      symbols.deepep_host_read(address, word, 4n);
      if (word[0] !== SENTINEL) break;
    }
    Atomics.store(times, 0, word[0] === SENTINEL ? -1n : now());
    Atomics.store(control, 2, request);
  }
  scope.postMessage("ended");
  scope.close();
}

scope.onmessage = ({ data }) => {
  watch(data as WatchMessage).catch((error) => scope.postMessage(`failed: ${(error as Error).message}`));
};
scope.postMessage("loaded"); // what is sent before would be lost: this module's imports await
