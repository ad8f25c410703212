/** A rank in a process: runs one method a line of stdin, answers on stdout, ends with its stdin. */
import { createInterface } from "node:readline";
import process from "node:process";
import { decode, encode, farSide, packError } from "./transport.ts";

const answer = (value: unknown) => process.stdout.write(`${encode(value)}\n`);
const run = farSide();

// Calls are begun in the order of the lines, without waiting for each other: that is how a user's program makes them.
createInterface({ input: process.stdin }).on("line", async (line) => {
  const { id, method, args } = decode(line) as { id: number; method: string; args: readonly unknown[] };
  try {
    const value = await run(method, args);
    answer({ id, value: value === undefined ? null : value });
  } catch (error) {
    answer({ id, error: packError(error) });
  }
});
