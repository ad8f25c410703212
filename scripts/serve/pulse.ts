/**
 * A worker that sends the time to every port that it is given, each millisecond, from a thread that does nothing else, until it
 * is told to end: a word of shared memory, since it hears no messages meanwhile.
 */
import { sharedNow } from "./delay.ts";

/** To the worker. */
export interface Pulse {
  readonly ports: readonly MessagePort[];
  /** i32: not 0 once it shall end. */
  readonly ends: Int32Array;
}

const self = globalThis as unknown as {
  onmessage: (event: MessageEvent<Pulse>) => void;
  postMessage(message: "listening" | "ended"): void;
};

self.onmessage = ({ data: { ports, ends } }) => {
  while (Atomics.wait(ends, 0, 0, 1) === "timed-out") {
    for (const port of ports) port.postMessage(sharedNow());
  }
  self.postMessage("ended");
};
self.postMessage("listening");
