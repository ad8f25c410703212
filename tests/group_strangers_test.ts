/** Who does not belong to a TCP group: refused and logged, without disturbing the ranks that do. */
import { connect, createServer } from "node:net";
import { test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { type ConnectOptions, Group } from "../lib/group/group.ts";
import {
  bounded,
  disposeAll,
  freePort,
  optionsOf,
  rejection,
  type Stranger,
  stranger,
} from "./support/group_worlds.ts";

/** Rank 0 of two waits; `disturb` does its worst; rank 1 comes and the group works. Gives what rank 0 logged. */
async function disturbed(
  disturb: (port: number, logged: string[]) => Promise<unknown>,
  options: Partial<ConnectOptions> = {},
): Promise<string[]> {
  const port = await freePort();
  const logged: string[] = [];
  const first = Group.connect({ ...optionsOf(0, 2, port, logged), ...options });
  await disturb(port, logged);
  const groups = await Promise.all([first, Group.connect({ ...optionsOf(1, 2, port), ...options })]);
  const all = await Promise.all(groups.map((group) => group.allGather(new Uint8Array([group.rank]))));
  for (const parts of all) assertEquals(parts.map((part) => [...part]), [[0], [1]]);
  await disposeAll(groups);
  return logged;
}

/** A header of the protocol. */
function header(type: number, length: number, magic = 0x44504731): Uint8Array {
  const view = new DataView(new ArrayBuffer(20));
  view.setUint32(0, magic);
  view.setUint8(4, type);
  view.setUint32(8, length);
  return new Uint8Array(view.buffer);
}

test("strangers: garbage, another protocol, impossible frames are cut off and logged once", bounded, async () => {
  const wrong: [Uint8Array, string][] = [
    [new Uint8Array(100_000).fill(0xa5), "it does not speak this protocol"],
    [new TextEncoder().encode("GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"), "it does not speak this protocol"],
    [header(2, 0xffffffff), "it announced 4294967295 bytes, the limit is 256"],
    [header(2, 257), "it announced 257 bytes, the limit is 256"],
    [header(6, 16), "it sent a frame of type 6 where none is expected"],
    [header(200, 0), "it sent a frame of type 200 where none is expected"],
    [header(1, 0), "it sent a frame of type 1 where a hello is due"],
  ];
  const logged = await disturbed(async (port) => {
    for (const [bytes] of [...wrong, ...wrong]) await (await stranger(port, bytes)).closed;
  });
  for (const [, text] of wrong) {
    assert(logged.some((line) => line.includes(text)), `${text} not in\n${logged.join("\n")}`);
  }
  assertEquals(logged.length, 6, logged.join("\n"));
});

test("strangers: who says nothing, or not enough, is dropped at the handshake's deadline", bounded, async () => {
  const logged = await disturbed(async (port) => {
    const silent = [
      await stranger(port),
      await stranger(port, header(2, 80)),
      await stranger(port, new Uint8Array([0x44])),
    ];
    await Promise.all(silent.map(({ closed }) => closed));
    (await stranger(port)).socket.destroy(); // a port check: not worth a line
  }, { handshakeTimeoutMs: 200 });
  assertEquals(logged.length, 1, logged.join("\n"));
  assert(logged[0]!.includes("no handshake within 200 ms"), logged[0]);
});

test("strangers: a crowd does not keep a rank out", bounded, async () => {
  const crowd: Stranger[] = [];
  const logged = await disturbed(async (port) => {
    for (let i = 0; i < 150; i++) crowd.push(await stranger(port));
  });
  assert(logged.some((line) => line.includes("too many connections at once")), logged.join("\n"));
  assertEquals(logged.length, 1);
  await Promise.all(crowd.map(({ closed }) => closed)); // the complete group keeps none of them
});

test("strangers: a wrong secret is refused on both sides, at once", bounded, async () => {
  const logged = await disturbed(async (port) => {
    const error = await rejection(Group.connect({ ...optionsOf(1, 2, port), secret: "another secret" }), 3000);
    assertEquals(error.code, "mismatch");
    assertEquals(
      error.message,
      `Cannot join: rank 0 at 127.0.0.1:${port} refused rank 1: its job secret is not this job's`,
    );
  }, { secret: "the secret of the job" });
  assert(logged.length === 1 && logged[0]!.includes("its job secret is not this job's"), logged.join("\n"));
});

test("strangers: a rank that is there already is refused, the first one stays", bounded, async () => {
  const port = await freePort();
  const logged: string[] = [];
  const joining = [0, 1].map((rank) => Group.connect(optionsOf(rank, 3, port, logged)));
  // Whichever of the two comes first stays; the other one is told.
  const second = Group.connect(optionsOf(1, 3, port, logged));
  const settled = [joining[1]!, second].map((promise) => promise.then(() => undefined, (error: Error) => error));
  const loser = await Promise.race(settled);
  assert(loser?.message.includes("refused rank 1: rank 1 has already joined from 127.0.0.1:"), loser?.message);
  const last = await Group.connect(optionsOf(2, 3, port));
  const winner = (await Promise.allSettled([joining[1]!, second])).find(({ status }) => status === "fulfilled");
  const groups = [await joining[0]!, (winner as PromiseFulfilledResult<Group>).value, last];
  await Promise.all(groups.map((group) => group.barrier()));
  await disposeAll(groups);
});

test("strangers: a recorded handshake is worth nothing", bounded, async () => {
  const secret = "the secret of the job";
  const port = await freePort();
  const recorded: Uint8Array[] = [];
  // Between rank 1 and rank 0 sits somebody who listens.
  const wire = createServer((near) => {
    const far = connect({ host: "127.0.0.1", port });
    near.on("data", (data) => {
      recorded.push(data as Uint8Array);
      far.write(data);
    });
    far.on("data", (data) => near.write(data));
    for (const [one, other] of [[near, far], [far, near]] as const) {
      one.on("close", () => other.destroy());
      one.on("error", () => other.destroy());
    }
  });
  await new Promise<void>((resolve) => wire.listen(0, "127.0.0.1", () => resolve()));
  const between = (wire.address() as { port: number }).port;
  const first = Group.connect({ ...optionsOf(0, 2, port), secret });
  (await stranger(port)).socket.destroy(); // rank 0 listens
  const groups = await Promise.all([first, Group.connect({ ...optionsOf(1, 2, between), secret })]);
  await Promise.all(groups.map((group) => group.barrier()));
  await disposeAll(groups);
  wire.close();

  const bytes = Uint8Array.from(recorded.flatMap((piece) => [...piece]));
  assert(bytes.length > 100);
  assertEquals(new TextDecoder().decode(bytes).includes(secret), false);
  const logged = await disturbed(async (again) => {
    const replay = await stranger(again, bytes);
    await replay.closed;
    assert(new TextDecoder().decode(replay.received.at(-1)).includes("its job secret is not this job's"));
  }, { secret });
  assert(logged.length === 1 && logged[0]!.includes("its job secret is not this job's"), logged.join("\n"));
});

test("strangers: a server that is not rank 0 ends in an error that says so", bounded, async () => {
  const secret = "the secret of the job";
  for (const [greeting, text] of [["220 mail ready, be welcome\r\n", "speak this protocol"], ["", "does not answer"]]) {
    const server = createServer((socket) => void (greeting && socket.write(greeting)));
    await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", () => resolve()));
    const { port } = server.address() as { port: number };
    const error = await rejection(Group.connect({ ...optionsOf(1, 2, port), secret, timeoutMs: 300 }), 5000);
    assert(
      error.message.startsWith("Cannot join: rank 0 of 2 did not arrive") && error.message.includes(text!),
      error.message,
    );
    server.close();
  }
});
