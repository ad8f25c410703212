/** Frames and payloads: what was changed, repeated, reordered, left out or sent back is not accepted. */
import { test } from "node:test";
import { assert, assertEquals, assertThrows } from "@std/assert";
import { isLoopback, jobSecret, makeHello, nonce, normalHost, openHello } from "../lib/group/handshake.ts";
import {
  decodeContribution,
  decodeFailure,
  decodeParts,
  encodeContribution,
  encodeFailure,
  encodeParts,
} from "../lib/group/messages.ts";
import { FrameReader, FrameType, FrameWriter, MAX_DATA_BYTES, WireError } from "../lib/group/wire.ts";

const keys = makeHello("secret", nonce(), { rank: 1, size: 2, timeoutMs: 1, remainingMs: 1 }).keys;

const join = (pieces: readonly Uint8Array[]): Uint8Array<ArrayBuffer> =>
  Uint8Array.from(pieces.flatMap((piece) => [...piece]));

function pair(): { writer: FrameWriter; reader: FrameReader } {
  const writer = new FrameWriter(false), reader = new FrameReader(false);
  writer.seal(keys);
  reader.unseal(keys);
  return { writer, reader };
}

test("wire: frames come back whole from pieces of any size", () => {
  for (const step of [1, 7, 64, 1000]) {
    const { writer, reader } = pair();
    const sent = [0, 1, 500].map((length) => new Uint8Array(length).fill(length));
    const bytes = join(
      sent.flatMap((data) => writer.frame(FrameType.contribute, [data.subarray(0, 1), data.subarray(1)])),
    );
    const received: Uint8Array[] = [];
    for (let at = 0; at < bytes.length; at += step) {
      reader.push(bytes.subarray(at, at + step));
      for (let frame; (frame = reader.next());) received.push(frame.payload);
    }
    assertEquals(received, sent);
  }
});

test("wire: any changed bit, a repetition, a gap and a reflection are refused", () => {
  const frame = join(pair().writer.frame(FrameType.contribute, [new Uint8Array([1, 2, 3])]));
  for (let i = 0; i < frame.length; i++) {
    const changed = frame.slice();
    changed[i]! ^= 1 << (i % 8);
    const { reader } = pair();
    reader.push(changed);
    let result: unknown;
    try {
      result = reader.next(); // a greater length only waits for more
      assert(result === undefined && i >= 8 && i < 12, `byte ${i}`);
    } catch (error) {
      assert(error instanceof WireError);
    }
  }
  const { writer, reader } = pair();
  const [first, second, third] = [1, 2, 3].map((n) => join(writer.frame(FrameType.contribute, [new Uint8Array([n])])));
  reader.push(first!);
  assertEquals(reader.next()?.payload[0], 1);
  reader.push(first!);
  assertThrows(() => reader.next(), WireError, "it sent frame 0 where 1 is due");
  const skipping = pair().reader;
  skipping.push(join([first!, third!, second!]));
  skipping.next();
  assertThrows(() => skipping.next(), WireError, "it sent frame 2 where 1 is due");
  const host = new FrameReader(true); // reads what rank 0 sends
  host.unseal(keys);
  host.push(first!);
  assertThrows(() => host.next(), WireError, "wrong signature");
});

test("wire: open frames end with the handshake, sealed ones begin there", () => {
  const writer = new FrameWriter(true), reader = new FrameReader(true);
  assertThrows(() => writer.frame(FrameType.welcome, []), WireError);
  const refusal = join(writer.frame(FrameType.refuse, [new Uint8Array(3)]));
  writer.seal(keys);
  reader.unseal(keys);
  reader.push(join([refusal, ...writer.frame(FrameType.welcome, []), refusal]));
  assertEquals([reader.next()?.type, reader.next()?.type], [FrameType.refuse, FrameType.welcome]);
  assertThrows(() => reader.next(), WireError, "type 3 where none is expected");
});

test("wire: a hello holds for its challenge, its claims and its secret only", () => {
  const challenge = nonce();
  const { payload, keys: theirs } = makeHello("secret", challenge, { rank: 3, size: 8, timeoutMs: 5, remainingMs: 4 });
  const opened = openHello("secret", challenge, payload);
  assertEquals(opened?.hello, { rank: 3, size: 8, timeoutMs: 5, remainingMs: 4 });
  assertEquals(opened?.keys, theirs);
  assert(opened?.keys.fromHost.join() !== opened?.keys.toHost.join());
  assertEquals(openHello("other", challenge, payload), undefined);
  assertEquals(openHello("secret", nonce(), payload), undefined);
  assertEquals(openHello("secret", challenge, payload.subarray(1)), undefined);
  payload[35]! ^= 1; // the rank
  assertEquals(openHello("secret", challenge, payload), undefined);
});

test("wire: payloads come back, and those that do not add up are refused", () => {
  const message = {
    call: 9,
    op: "barrier",
    sequence: 4,
    timeoutMs: 100,
    ranks: [1, 3],
    data: new Uint8Array([5, 6]),
  } as const;
  const bytes = join(encodeContribution(message, 4));
  assertEquals(decodeContribution(bytes, 3, 4), message as unknown as ReturnType<typeof decodeContribution>);
  const all = join(encodeContribution({ ...message, ranks: [0, 1, 2, 3] }, 4));
  assertEquals(decodeContribution(all, 2, 4).ranks, [0, 1, 2, 3]);
  assertThrows(() => decodeContribution(bytes, 2, 4), WireError); // not in its own subset
  assertThrows(() => decodeContribution(bytes, 3, 3), WireError); // rank 3 of 3
  for (const length of [0, 8, 24]) assertThrows(() => decodeContribution(bytes.slice(0, length), 3, 4), WireError);
  const part = (rank: number, length: number) => ({ rank, data: new Uint8Array(length).fill(rank) });
  const parts = [part(0, 0), part(1, MAX_DATA_BYTES), part(2, 10), part(3, 20)];
  const frames = [...encodeParts(7, parts)].map((chunks) => new Uint8Array(join(chunks)));
  assertEquals(frames.length, 3);
  assertEquals(frames.flatMap((frame) => decodeParts(frame).parts), parts);
  for (const cut of [new Uint8Array(4), frames[2]!.slice(0, -1), new Uint8Array([...frames[2]!, 0])]) {
    assertThrows(() => decodeParts(cut), WireError);
  }
  const failure = { code: "timeout", op: "barrier", message: "m", peer: 2, waitedNs: 5 } as const;
  assertEquals(decodeFailure(join(encodeFailure(3, failure))), { call: 3, failure: { ...failure } });
  for (const text of ["", "{}", "null", '{"code":"nonsense"}']) {
    assertThrows(() => decodeFailure(join([new Uint8Array(4), new TextEncoder().encode(text)])), WireError);
  }
});

test("wire: hosts and secrets", () => {
  assertEquals(["localhost", "LocalHost ", "[::1]", "node1"].map(normalHost), [
    "127.0.0.1",
    "127.0.0.1",
    "::1",
    "node1",
  ]);
  assertEquals(["127.0.0.1", "127.3.4.5", "::1", "0.0.0.0", "127.example.com"].map(isLoopback), [
    true,
    true,
    true,
    false,
    false,
  ]);
  assertEquals(jobSecret(undefined, "127.0.0.1", 5), "deepep loopback 5");
  assertEquals(jobSecret("x", "::1", 5), "x");
  assertThrows(() => jobSecret("", "node1", 5), RangeError, "DEEPEP_SECRET");
});
