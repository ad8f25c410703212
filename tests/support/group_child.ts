/** A process that the tests of groups and of the launcher start. The first argument says what it does. */
import process from "node:process";
import { Group } from "../../lib/group/group.ts";

const [what, ...args] = process.argv.slice(2);
const forLong = (): Promise<void> => new Promise((resolve) => setTimeout(resolve, 60_000));
const say = (text: string): boolean => process.stdout.write(`${text}\n`);

/** Joins, meets, says "joined"; then does what the second argument says. */
async function join(): Promise<void> {
  const group = await Group.fromEnv({ timeoutMs: 20_000 });
  await group.barrier();
  say("joined");
  if (args[0] === "wait") await forLong();
  if (args[0] === "abandon") return; // neither leaves nor exits: the loop must end by itself
  if (args[0] === "leave") await group[Symbol.asyncDispose]();
  if (args[0] === "gather") {
    const all = await group.allGather(new Uint8Array([group.rank]));
    say(`rank ${group.rank} of ${group.size}, local ${group.localRank}: ${all.map((part) => part[0])}`);
    await group[Symbol.asyncDispose]();
  }
}

const actions: Record<string, () => Promise<void> | void> = {
  join,
  local: () => void Group.local(3),
  args: () => void say(JSON.stringify(args)),
  env: () => args.forEach((name) => say(`${name}=${process.env[name] ?? ""}`)),
  /** Lines on both streams, in pieces, the last one cut short. */
  lines: async () => {
    process.stderr.write("to stderr\n");
    process.stdout.write("one\ntw");
    await new Promise((resolve) => setTimeout(resolve, 30));
    process.stdout.write("o\n\nü\nend");
  },
  many: () => {
    for (let i = 0; i < 20_000; i++) say(`${args[0] ?? "line"} ${i}`);
  },
  /** The rank named exits with the code named, or ends by the signal named; the others wait. */
  fail: async () => {
    const [rank, how] = args;
    if (process.env.RANK !== rank) return await forLong();
    if (/^\d+$/.test(how!)) process.exit(Number(how));
    process.kill(process.pid, how);
    await forLong();
  },
  /** Says which signal came, then exits with 40 + rank. */
  signals: async () => {
    for (const signal of ["SIGINT", "SIGTERM", "SIGHUP"] as const) {
      process.on(signal, () => {
        process.stdout.write(`got ${signal}\n`, () => process.exit(40 + Number(process.env.RANK)));
      });
    }
    say(`ready ${process.pid}`);
    await forLong();
  },
  /** Takes no notice of SIGTERM. */
  stubborn: async () => {
    process.on("SIGTERM", () => {});
    say(`ready ${process.pid}`);
    await forLong();
  },
};
await actions[what ?? ""]?.();
