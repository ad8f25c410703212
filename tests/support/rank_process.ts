/** A rank in a process: takes its place in the first line of stdin, then one method a line; answers on stdout. */
import { createInterface } from "node:readline";
import process from "node:process";
import { decode, encode, packError, type RankPlace, serve } from "./transport.ts";

const answer = (value: unknown) => process.stdout.write(`${encode(value)}\n`);
let run: Promise<(method: string, args: readonly unknown[]) => Promise<unknown>> | undefined;

// Calls are begun in the order of the lines, without waiting for each other: that is how a user's program makes them.
createInterface({ input: process.stdin }).on("line", async (line) => {
  const message = decode(line) as { id: number; method: string; args: readonly unknown[] };
  const id = run === undefined ? 0 : message.id;
  try {
    if (run === undefined) {
      run = serve(message as unknown as RankPlace);
      await run;
      answer({ id, value: true });
    } else {
      const value = await (await run)(message.method, message.args);
      answer({ id, value: value === undefined ? null : value });
    }
  } catch (error) {
    answer({ id, error: packError(error) });
  }
});
