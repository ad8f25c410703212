/**
 * Frames of the control plane: a 20-byte header {magic, type, length, sequence}, a payload of bounded length, and, once
 * both sides have proved that they know the job's secret, an HMAC-SHA256 over (direction, header, payload).
 *
 * In: bytes of a socket, in any pieces. Out: frames, in order, or an error that ends the connection. The sequence number
 * counts the sealed frames of a direction and each direction has its own key, so that a frame that was replayed,
 * reordered, dropped or reflected does not verify. The length is checked before anything is kept. `connection.ts` calls.
 */
import { createHmac, timingSafeEqual } from "node:crypto";

/** What a frame says. Open frames, of the handshake, carry no HMAC. */
export const FrameType = {
  /** Rank 0, open: 32 random bytes. */
  challenge: 1,
  /** Another rank, open: who it is and the proof that it knows the secret. */
  hello: 2,
  /** Rank 0, open, instead of `welcome`: why the rank is refused, as text. */
  refuse: 3,
  /** Rank 0: the proof, by its HMAC, that it knows the secret too. */
  welcome: 4,
  /** Rank 0: all ranks have arrived. */
  start: 5,
  /** Another rank: its part of a collective. */
  contribute: 6,
  /** Rank 0: parts of other ranks, as many as fit in a frame. */
  parts: 7,
  /** Rank 0: a collective, or the join, has failed. */
  failure: 8,
  /** Either side leaves in good order. */
  goodbye: 9,
} as const;

/** One of {@linkcode FrameType}. */
export type FrameType = (typeof FrameType)[keyof typeof FrameType];

/** A frame as it came. `payload` is its own memory. */
export interface Frame {
  type: FrameType;
  payload: Uint8Array<ArrayBuffer>;
}

/** Bytes that a rank may contribute to one collective. */
export const MAX_DATA_BYTES: number = 1 << 20;
/** Ranks of a group. */
export const MAX_RANKS = 4096;
/** Bytes of a payload: a contribution, its list of ranks and a few words. */
export const MAX_PAYLOAD_BYTES: number = MAX_DATA_BYTES + 4 * MAX_RANKS + 64;
/** Bytes of a payload before the peer is known. */
export const MAX_OPEN_PAYLOAD_BYTES = 256;

const MAGIC = 0x44504731; // "DPG1": the digit is the version
const HEADER_BYTES = 20;
const MAC_BYTES = 32;

/** The keys of one connection, one for each direction. */
export interface SessionKeys {
  /** Signs what rank 0 sends. */
  fromHost: Uint8Array;
  /** Signs what the other rank sends. */
  toHost: Uint8Array;
}

/** A peer that does not keep to the protocol. The message says how; the connection ends. */
export class WireError extends Error {
  override readonly name = "WireError";
}

const isOpen = (type: number): boolean => type <= FrameType.refuse;

function header(type: FrameType, length: number, sequence: bigint): Uint8Array {
  const bytes = new Uint8Array(HEADER_BYTES);
  const view = new DataView(bytes.buffer);
  view.setUint32(0, MAGIC);
  view.setUint8(4, type); // three zero bytes follow
  view.setUint32(8, length);
  view.setBigUint64(12, sequence);
  return bytes;
}

const mac = (key: Uint8Array, direction: number, head: Uint8Array, chunks: readonly Uint8Array[]): Uint8Array => {
  const hmac = createHmac("sha256", key).update(new Uint8Array([direction])).update(head);
  for (const chunk of chunks) hmac.update(chunk);
  return hmac.digest();
};

/** Makes the frames that one side sends. */
export class FrameWriter {
  #key: Uint8Array | undefined;
  #sequence = 0n;
  readonly #direction: number;

  /** `host` is true on rank 0. */
  constructor(host: boolean) {
    this.#direction = host ? 0 : 1;
  }

  /** From now on frames can be sealed. */
  seal(keys: SessionKeys): void {
    this.#key = this.#direction === 0 ? keys.fromHost : keys.toHost;
  }

  /** The pieces of a frame, ready to be written. Must be written in the order of the calls. */
  frame(type: FrameType, chunks: readonly Uint8Array[]): Uint8Array[] {
    const length = chunks.reduce((sum, chunk) => sum + chunk.length, 0);
    if (isOpen(type)) return [header(type, length, 0n), ...chunks];
    if (!this.#key) throw new WireError(`a frame of type ${type} before the handshake`);
    const head = header(type, length, this.#sequence++);
    return [head, ...chunks, mac(this.#key, this.#direction, head, chunks)];
  }
}

/** Takes bytes of the peer, gives frames. Holds at most one frame of the length that is allowed at the time. */
export class FrameReader {
  #key: Uint8Array | undefined;
  #sequence = 0n;
  #pieces: Uint8Array[] = [];
  #held = 0;
  readonly #direction: number;

  /** `host` is true where the bytes come from rank 0. */
  constructor(host: boolean) {
    this.#direction = host ? 0 : 1;
  }

  /** From now on frames must be sealed. `refuse` alone stays open, and only until the first sealed frame. */
  unseal(keys: SessionKeys): void {
    this.#key = this.#direction === 0 ? keys.fromHost : keys.toHost;
  }

  /** Adds bytes. Call {@linkcode next} until it gives nothing. */
  push(bytes: Uint8Array): void {
    this.#pieces.push(bytes);
    this.#held += bytes.length;
  }

  /** The next whole frame, verified, or `undefined` when more bytes are needed. @throws {WireError} */
  next(): Frame | undefined {
    if (this.#held < HEADER_BYTES) return undefined;
    const head = this.#peek(HEADER_BYTES);
    const view = new DataView(head.buffer, head.byteOffset, HEADER_BYTES);
    const { type, length } = this.#checkHeader(view);
    const macBytes = isOpen(type) ? 0 : MAC_BYTES;
    if (this.#held < HEADER_BYTES + length + macBytes) return undefined;
    const bytes = this.#take(HEADER_BYTES + length + macBytes);
    const payload = bytes.subarray(HEADER_BYTES, HEADER_BYTES + length);
    if (macBytes) this.#verify(bytes, payload);
    return { type, payload: payload.slice() };
  }

  #checkHeader(view: DataView): { type: FrameType; length: number } {
    if (view.getUint32(0) !== MAGIC) throw new WireError("it does not speak this protocol");
    const type = view.getUint8(4), length = view.getUint32(8), sequence = view.getBigUint64(12);
    const refusable = type === FrameType.refuse && this.#sequence === 0n;
    const known = type >= FrameType.challenge && type <= FrameType.goodbye;
    if (!known || (view.getUint32(4) & 0xffffff) !== 0 || isOpen(type) !== (this.#key === undefined) && !refusable) {
      throw new WireError(`it sent a frame of type ${type} where none is expected`);
    }
    const limit = isOpen(type) ? MAX_OPEN_PAYLOAD_BYTES : MAX_PAYLOAD_BYTES;
    if (length > limit) throw new WireError(`it announced ${length} bytes, the limit is ${limit}`);
    if (sequence !== (isOpen(type) ? 0n : this.#sequence)) {
      throw new WireError(`it sent frame ${sequence} where ${this.#sequence} is due`);
    }
    return { type: type as FrameType, length };
  }

  #verify(bytes: Uint8Array, payload: Uint8Array): void {
    const expected = mac(this.#key!, this.#direction, bytes.subarray(0, HEADER_BYTES), [payload]);
    if (!timingSafeEqual(expected, bytes.subarray(bytes.length - MAC_BYTES))) {
      throw new WireError("it sent a frame with a wrong signature");
    }
    this.#sequence++;
  }

  /** The first `count` bytes, left in place. */
  #peek(count: number): Uint8Array {
    const first = this.#pieces[0]!;
    if (first.length >= count) return first.subarray(0, count);
    return this.#join().subarray(0, count);
  }

  #take(count: number): Uint8Array {
    const all = this.#pieces[0]!.length >= count ? this.#pieces[0]! : this.#join();
    if (all.length === count) this.#pieces.shift();
    else this.#pieces[0] = all.subarray(count);
    this.#held -= count;
    return all.subarray(0, count);
  }

  #join(): Uint8Array {
    const all = new Uint8Array(this.#held);
    let at = 0;
    for (const piece of this.#pieces) {
      all.set(piece, at);
      at += piece.length;
    }
    this.#pieces = [all];
    return all;
  }
}
