/** A worker that sends the time to every port that it is given, each millisecond, from a thread that does nothing else. */
import { sharedNow } from "./delay.ts";

const self = globalThis as unknown as {
  onmessage: (event: MessageEvent<MessagePort[]>) => void;
  postMessage(message: unknown): void;
};
const asleep = new Int32Array(new SharedArrayBuffer(4));

self.onmessage = ({ data: ports }) => {
  for (;;) { // until it is terminated
    Atomics.wait(asleep, 0, 0, 1);
    for (const port of ports) port.postMessage(sharedNow());
  }
};
self.postMessage("listening");
