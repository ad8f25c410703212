/**
 * A rank in a Web Worker: says that it listens, then runs one method a message. It says so because a message that comes
 * while the module still loads may find no listener.
 */
import { farSide, packError } from "./transport.ts";

const self = globalThis as unknown as {
  onmessage: (event: MessageEvent) => void;
  postMessage(message: unknown): void;
};
const run = farSide();

self.onmessage = async (event) => {
  const { id, method, args } = event.data as { id: number; method: string; args: readonly unknown[] };
  try {
    self.postMessage({ id, value: await run(method, args) });
  } catch (error) {
    self.postMessage({ id, error: packError(error) });
  }
};
self.postMessage({ id: -1, value: "listening" });
