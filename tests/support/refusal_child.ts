/**
 * A program that creates a buffer on the CUDA backend, and prints for each of its ranks one line of JSON: what became of it. As
 * many ranks as its argument says are in this process; started by scripts/launch.ts it is one of several processes. Run by
 * refusal_test.ts, whose environment makes the emulated device one that does not do.
 */
import process from "node:process";
import { EpBuffer, type EpError, Group } from "../../mod.ts";

const groups = process.env["WORLD_SIZE"] === undefined
  ? Group.local(Number(process.argv[2] ?? 1))
  : [await Group.fromEnv()];

await Promise.all(groups.map(async (group) => {
  const shape = { hidden: 16, numExperts: 2, numTopk: 1, maxTokensPerRank: 2, timeoutMs: 10_000 };
  try {
    await using _ = await EpBuffer.create(group, { backend: "cuda", ...shape });
    console.log(JSON.stringify({ rank: group.rank, code: "created", message: "" }));
  } catch (error) {
    const { code, message } = error as EpError;
    console.log(JSON.stringify({ rank: group.rank, code, message }));
  }
}));
await Promise.all(groups.map((group) => group[Symbol.asyncDispose]()));
