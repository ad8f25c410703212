/** Groups over TCP: the rules of every group, ranks that are late, missing or die, and rank 0 that dies. */
import { spawn } from "node:child_process";
import process from "node:process";
import { test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { type ConnectOptions, Group } from "../lib/group/group.ts";
import { runFailureCases, runHappyCases } from "./support/group_cases.ts";
import {
  bounded,
  type Child,
  disposeAll,
  freePort,
  optionsOf,
  rejection,
  startChild,
  stranger,
  tcpGroups,
  until,
} from "./support/group_worlds.ts";

runHappyCases("tcp", tcpGroups);
runFailureCases("tcp", tcpGroups);

const childRank = (rank: number, size: number, port: number, then: string): Child =>
  startChild("tests/support/group_child.ts", ["join", then], {
    RANK: `${rank}`,
    WORLD_SIZE: `${size}`,
    LOCAL_RANK: `${rank}`,
    MASTER_ADDR: "127.0.0.1",
    MASTER_PORT: `${port}`,
  });

test("tcp: names of rank 0's machine, secrets, and a group of one that listens nowhere", bounded, async () => {
  const port = await freePort();
  const secret = "a secret of this job";
  for (const host of ["localhost", "127.0.0.1"]) {
    const groups = await Promise.all(
      [0, 1].map((rank) => Group.connect({ ...optionsOf(rank, 2, port), host, secret })),
    );
    await Promise.all(groups.map((group) => group.barrier()));
    await disposeAll(groups);
  }
  const taken = await stranger(port, undefined, 1).catch((error) => error);
  assert(taken instanceof Error, "the group listens although it is complete");
  await using alone = await Group.connect({ rank: 0, size: 1, host: "node-that-is-not-there", port, secret });
  assertEquals((await alone.allGather(new Uint8Array([7]))).map((part) => [...part]), [[7]]);
});

test("tcp: rank 0 may come last", bounded, async () => {
  const port = await freePort();
  const others = [1, 2].map((rank) => Group.connect(optionsOf(rank, 3, port)));
  await new Promise((resolve) => setTimeout(resolve, 400));
  const groups = await Promise.all([Group.connect(optionsOf(0, 3, port)), ...others]);
  await Promise.all(groups.map((group) => group.barrier()));
  await disposeAll(groups);
});

test("tcp: missing ranks are named to every rank that waits, at the first deadline", bounded, async () => {
  const port = await freePort();
  const join = (rank: number, timeoutMs: number) =>
    rejection(Group.connect({ ...optionsOf(rank, 6, port), timeoutMs }));
  const zero = join(0, 10_000), twins = [join(1, 10_000), join(1, 10_000)];
  const refused = await Promise.race(twins); // the one that came second: rank 1 is there
  assert(refused.message.includes("rank 1 has already joined"), refused.message);
  const started = performance.now(), third = join(3, 500);
  const one = (await Promise.all(twins)).find((error) => error !== refused)!;
  for (const [i, error] of [await zero, one, await third].entries()) {
    const message = `Cannot join: ranks 2, 4, 5 of 6 did not arrive at 127.0.0.1:${port} within 500 ms`;
    assertEquals([error.message, error.code, error.peer], [message, "timeout", 2]);
    assertEquals((error as { rank?: number }).rank, [0, 1, 3][i]);
  }
  assert(performance.now() - started < 4000);
});

test("tcp: a missing rank 0 is named within the deadline", bounded, async () => {
  const port = await freePort();
  const error = await rejection(Group.connect({ ...optionsOf(2, 4, port), timeoutMs: 300 }), 4000);
  assert(error.message.startsWith(`Cannot join: rank 0 of 4 did not arrive at 127.0.0.1:${port} within 300 ms`));
  assertEquals([error.code, error.peer], ["timeout", 0]);
});

test("tcp: a rank that gives up before all are there may come again", bounded, async () => {
  const port = await freePort();
  const logged: string[] = [];
  const groups = [Group.connect(optionsOf(0, 3, port, logged)), Group.connect(optionsOf(2, 3, port))];
  const first = childRank(1, 4, port, "wait"); // wrong size: refused, ends
  assert((await first.ended).code !== 0);
  assert(first.output.stderr.includes("refused rank 1: its job has 4 ranks, this one 3"), first.output.stderr);
  groups.push(Group.connect(optionsOf(1, 3, port)));
  await disposeAll(await Promise.all(groups));
  assert(logged.some((line) => line.includes("its job has 4 ranks")), logged.join("\n"));
});

test(
  "tcp: a killed rank ends pending and later collectives with its name; subsets without it go on",
  bounded,
  async () => {
    const port = await freePort();
    const logged: string[] = [];
    const child = childRank(2, 4, port, "wait");
    const groups = await Promise.all([0, 1, 3].map((rank) => Group.connect(optionsOf(rank, 4, port, logged))));
    await Promise.all(groups.map((group) => group.barrier()));
    const pending = groups.map((group) => rejection(group.barrier()));
    await until(() => child.output.stdout.includes("joined"), "the child to join");
    const killed = performance.now();
    child.process.kill("SIGKILL");
    for (const error of await Promise.all(pending)) {
      assertEquals([error.code, error.peer], ["peerLost", 2]);
      assert(error.message.startsWith("Cannot run barrier: rank 2 has ended ("), error.message);
    }
    assert(performance.now() - killed < 5000);
    assertEquals((await rejection(groups[1]!.allGather(new Uint8Array(1)))).code, "peerLost");
    const rest = groups.map((group) => group.allGather(new Uint8Array([group.rank]), { ranks: [0, 1, 3] }));
    for (const parts of await Promise.all(rest)) assertEquals(parts.map((part) => [...part]), [[0], [1], [], [3]]);
    await disposeAll(groups);
    assertEquals(logged.length, 1, logged.join("\n"));
    assert(logged[0]!.startsWith("deepep: rank 2 has ended ("));
  },
);

test("tcp: a killed rank 0 ends every collective, with its name", bounded, async () => {
  const port = await freePort();
  const child = childRank(0, 3, port, "wait");
  const logged: string[] = [];
  const groups = await Promise.all([1, 2].map((rank) => Group.connect(optionsOf(rank, 3, port, logged))));
  await Promise.all(groups.map((group) => group.barrier()));
  const pending = groups.map((group) => rejection(group.barrier({ ranks: group.rank === 1 ? [0, 1] : [1, 2] })));
  await until(() => child.output.stdout.includes("joined"), "the child to join");
  child.process.kill("SIGKILL");
  for (const error of await Promise.all(pending)) {
    assertEquals([error.code, error.peer], ["peerLost", 0]);
    assert(error.message.includes("rank 0, which hosts the group, has ended"), error.message);
  }
  assertEquals((await rejection(groups[0]!.barrier())).code, "peerLost");
  await disposeAll(groups);
  assertEquals(logged.length, 2);
});

test("tcp: rank 0 that leaves says so; nothing of an orderly end is logged", bounded, async () => {
  const logged: string[] = [];
  const groups = await tcpGroups(3, { log: (message) => logged.push(message) });
  const pending = rejection(groups[1]!.barrier({ ranks: [1, 2] }));
  await groups[0]![Symbol.asyncDispose]();
  const error = await pending;
  assertEquals([error.code, error.message], [
    "peerLost",
    "Cannot run barrier: rank 0, which hosts the group, has left the group",
  ]);
  await disposeAll(groups);
  assertEquals(logged, []);
});

test("tcp: processes leave, or just end, without a word and without delay", bounded, async () => {
  for (const then of ["leave", "abandon"]) {
    const port = await freePort();
    const children = [0, 1, 2].map((rank) => childRank(rank, 3, port, then));
    await until(() => children.some((child) => child.output.stdout.includes("joined")), "the ranks to join");
    const joined = performance.now();
    const ends = await Promise.all(children.map((child) => child.ended));
    assertEquals(ends.map(({ code }) => code), [0, 0, 0]);
    assert(performance.now() - joined < 8000);
    if (then === "leave") assertEquals(children.map((child) => child.output.stderr).join(""), "");
  }
});

test("tcp: a port in use, and options out of range, are said plainly", bounded, async () => {
  const port = await freePort();
  const first = Group.connect({ ...optionsOf(0, 2, port), timeoutMs: 4000 });
  const second = await rejection(Group.connect({ ...optionsOf(0, 2, port), timeoutMs: 200 }));
  assertEquals(second.code, "system");
  assert(second.message.includes("the port is in use by another program; set DEEPEP_PORT"), second.message);
  await disposeAll(await Promise.all([first, Group.connect(optionsOf(1, 2, port))]));
  const wrong: [Partial<ConnectOptions>, string][] = [
    [{ rank: 2 }, "rank is 2, expected 0 to 1"],
    [{ size: 0 }, "size is 0"],
    [{ port: 70000 }, "port is 70000"],
    [{ host: " " }, "host is"],
    [{ timeoutMs: 0.5 }, "timeoutMs is 0.5"],
    [{ localRank: 9 }, "localRank is 9"],
    [{ host: "10.1.2.3" }, "needs a job secret: set the environment variable DEEPEP_SECRET"],
    [{ host: "10.1.2.3", secret: "short" }, "the job's secret has 5 characters"],
  ];
  for (const [option, text] of wrong) {
    const error = await rejection(Group.connect({ ...optionsOf(0, 2, port), ...option }));
    assert(error instanceof RangeError && error.message.includes(text), error.message);
  }
});

const sandbox = { ...bounded, skip: "Bun" in globalThis };
test("tcp: Deno needs the rank's address and the launcher's variables, and says so at once", sandbox, async () => {
  const port = await freePort();
  const url = new URL("../lib/group/group.ts", import.meta.url).href;
  const program = `import { Group } from "${url}";
    try { await using group = await Group.fromEnv(); await group.barrier(); console.log("met"); }
    catch (error) { console.log(error.code, error.message); }`;
  const run = async (rank: number, flags: string[]): Promise<string> => {
    const names = {
      RANK: `${rank}`,
      WORLD_SIZE: "2",
      LOCAL_RANK: `${rank}`,
      MASTER_ADDR: "127.0.0.1",
      MASTER_PORT: `${port}`,
    };
    const args = ["run", "--no-prompt", `--allow-env=${Object.keys(names)}`, ...flags, "-"];
    const child = spawn(process.execPath, args, { env: { ...process.env, ...names } });
    let text = "";
    child.stdout.on("data", (data) => text += data);
    child.stdin.end(program);
    await new Promise((resolve) => child.on("close", resolve));
    return text.trim();
  };
  const allowed = [`--allow-net=127.0.0.1:${port}`];
  assertEquals(await Promise.all([run(0, allowed), run(1, allowed)]), ["met", "met"]);
  const forbidden = `rank 1 is not allowed to connect to 127.0.0.1:${port}; Deno needs --allow-net=127.0.0.1:${port}`;
  assertEquals(await run(1, []), `system Cannot join: ${forbidden}`);
  const deaf = `rank 0 is not allowed to listen at 127.0.0.1:${port}; Deno needs --allow-net=127.0.0.1:${port}`;
  assertEquals(await run(0, []), `system Cannot join: ${deaf}`);
});
