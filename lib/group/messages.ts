/**
 * Payloads of the sealed frames: a contribution to a round, the parts that come back, a failure.
 *
 * In: values of `exchange.ts`. Out: bytes, and back, checked: a payload that does not add up is a {@linkcode WireError}.
 * A call id is the sender's own and comes back with the answer. Numbers are big-endian 32-bit. `tcp_server.ts` and
 * `tcp_client.ts` call.
 */
import type { EpErrorCode } from "../error.ts";
import type { Collective, Failure } from "./exchange.ts";
import { MAX_DATA_BYTES, WireError } from "./wire.ts";

const COLLECTIVES: readonly Collective[] = ["allGather", "barrier"];
const CODES: readonly EpErrorCode[] = ["timeout", "peerLost", "mismatch", "closed", "internal"];
const CONTRIBUTION_BYTES = 20;

/** A contribution as it travels; whose it is follows from the connection. */
export interface ContributionMessage {
  call: number;
  op: Collective;
  sequence: number;
  timeoutMs: number;
  ranks: readonly number[];
  data: Uint8Array;
}

/** A part of a round's outcome. */
export interface Part {
  rank: number;
  data: Uint8Array;
}

const words = (...values: number[]): Uint8Array => {
  const bytes = new Uint8Array(4 * values.length);
  const view = new DataView(bytes.buffer);
  values.forEach((value, i) => view.setUint32(4 * i, value));
  return bytes;
};

const viewOf = (bytes: Uint8Array): DataView => new DataView(bytes.buffer, bytes.byteOffset, bytes.length);

/** The pieces of a `contribute` payload. All ranks of the group are sent as none. */
export function encodeContribution(message: ContributionMessage, size: number): Uint8Array[] {
  const { call, op, sequence, timeoutMs, ranks, data } = message;
  const listed = ranks.length === size ? [] : ranks;
  return [words(call, COLLECTIVES.indexOf(op), sequence, timeoutMs, listed.length, ...listed), data];
}

/** Reads a `contribute` payload of `rank`. @throws {WireError} */
export function decodeContribution(payload: Uint8Array, rank: number, size: number): ContributionMessage {
  if (payload.length < CONTRIBUTION_BYTES) throw new WireError("it sent a contribution that is cut short");
  const view = viewOf(payload);
  const [call, kind, sequence, timeoutMs, count] = [0, 4, 8, 12, 16].map((at) => view.getUint32(at)) as [
    number,
    number,
    number,
    number,
    number,
  ];
  const op = COLLECTIVES[kind];
  const end = CONTRIBUTION_BYTES + 4 * count;
  if (!op || timeoutMs === 0 || timeoutMs > 2 ** 31 - 1 || count >= size || end > payload.length) {
    throw new WireError("it sent a contribution that does not add up");
  }
  const ranks = count === 0
    ? Array.from({ length: size }, (_, r) => r)
    : Array.from({ length: count }, (_, i) => view.getUint32(CONTRIBUTION_BYTES + 4 * i));
  const ascends = ranks.every((r, i) => r < size && (i === 0 || r > ranks[i - 1]!));
  const data = payload.subarray(end);
  if (!ascends || !ranks.includes(rank) || data.length > MAX_DATA_BYTES) {
    throw new WireError("it sent a contribution that does not add up");
  }
  return { call, op, sequence, timeoutMs, ranks, data };
}

/** The payloads of `parts` frames for one call: as many parts in each as the limit of a frame allows. */
export function* encodeParts(call: number, parts: readonly Part[]): Generator<Uint8Array[]> {
  for (let next = 0; next < parts.length;) {
    const chunks: Uint8Array[] = [];
    for (let bytes = 0; next < parts.length; next++) {
      const { rank, data } = parts[next]!;
      bytes += 8 + data.length;
      if (chunks.length > 0 && bytes > MAX_DATA_BYTES) break;
      chunks.push(words(rank, data.length), data);
    }
    yield [words(call, chunks.length / 2), ...chunks];
  }
}

/** Reads a `parts` payload. @throws {WireError} */
export function decodeParts(payload: Uint8Array): { call: number; parts: Part[] } {
  const view = viewOf(payload);
  const parts: Part[] = [];
  let at = 8;
  for (let left = payload.length < 8 ? -1 : view.getUint32(4); left > 0; left--) {
    if (at + 8 > payload.length) break;
    const [rank, length] = [view.getUint32(at), view.getUint32(at + 4)];
    parts.push({ rank, data: payload.subarray(at + 8, at + 8 + length) });
    at += 8 + length;
  }
  if (at !== payload.length || parts.length !== view.getUint32(4)) {
    throw new WireError("it sent parts that do not add up");
  }
  return { call: view.getUint32(0), parts };
}

/** The payload of a `failure` frame. */
export function encodeFailure(call: number, failure: Failure): Uint8Array[] {
  return [words(call), new TextEncoder().encode(JSON.stringify(failure))];
}

/** Reads a `failure` payload. @throws {WireError} */
export function decodeFailure(payload: Uint8Array): { call: number; failure: Failure } {
  try {
    const call = viewOf(payload).getUint32(0);
    const { code, op, message, peer, waitedNs } = JSON.parse(new TextDecoder().decode(payload.subarray(4)));
    if (!CODES.includes(code)) throw new TypeError(`code is ${code}`);
    const failure: Failure = { code, op: String(op), message: String(message) };
    if (Number.isInteger(peer)) failure.peer = peer;
    if (Number.isFinite(waitedNs)) failure.waitedNs = waitedNs;
    return { call, failure };
  } catch {
    throw new WireError("it sent a failure that does not add up");
  }
}
