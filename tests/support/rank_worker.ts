/** A rank in a Web Worker: takes its place in the first message, then one method a message. */
import { packError, type RankPlace, serve } from "./transport.ts";

const self = globalThis as unknown as {
  onmessage: (event: MessageEvent) => void;
  postMessage(message: unknown): void;
};
let run: Promise<(method: string, args: readonly unknown[]) => Promise<unknown>> | undefined;

self.onmessage = async (event) => {
  const { id, method, args } = event.data as { id: number; method: string; args: readonly unknown[] };
  const number = run === undefined ? 0 : id;
  try {
    if (run === undefined) {
      run = serve(event.data as RankPlace);
      await run;
      self.postMessage({ id: number, value: true });
    } else {
      self.postMessage({ id: number, value: await (await run)(method, args) });
    }
  } catch (error) {
    self.postMessage({ id: number, error: packError(error) });
  }
};
