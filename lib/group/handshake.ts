/**
 * The proof that both sides know the job's secret, without sending it.
 *
 * Rank 0 opens with a nonce; the other rank answers with its own nonce, who it is, and an HMAC that only the secret and
 * both nonces give; rank 0 proves itself by the HMAC of its first sealed frame. Both nonces make the session keys, so a
 * recorded handshake is worth nothing on another connection. `tcp_server.ts` and `tcp_client.ts` call.
 */
import { createHmac, randomBytes, timingSafeEqual } from "node:crypto";
import type { SessionKeys } from "./wire.ts";

/** Bytes of a nonce. */
export const NONCE_BYTES = 32;
const LABEL = "deepep group 1\0";
const FIELDS_BYTES = 16;
const HELLO_BYTES = NONCE_BYTES + FIELDS_BYTES + 32;

/** What a rank says of itself. Times are milliseconds. */
export interface Hello {
  rank: number;
  size: number;
  /** How long it is willing to wait for all ranks, counted from its start. */
  timeoutMs: number;
  /** How much of that is left. */
  remainingMs: number;
}

const hmac = (key: Uint8Array | string, ...parts: (Uint8Array | string)[]): Uint8Array => {
  const h = createHmac("sha256", key);
  for (const part of parts) h.update(part);
  return h.digest();
};

const sessionOf = (secret: string, challenge: Uint8Array, claims: Uint8Array): Uint8Array =>
  hmac(secret, LABEL, challenge, claims);

const keysOf = (session: Uint8Array): SessionKeys => ({
  fromHost: hmac(session, "from rank 0"),
  toHost: hmac(session, "to rank 0"),
});

/** A fresh nonce. */
export function nonce(): Uint8Array {
  return randomBytes(NONCE_BYTES);
}

/** The payload of `hello` for a challenge, and the keys that follow from it. */
export function makeHello(
  secret: string,
  challenge: Uint8Array,
  hello: Hello,
): { payload: Uint8Array; keys: SessionKeys } {
  const payload = new Uint8Array(HELLO_BYTES);
  payload.set(nonce());
  const view = new DataView(payload.buffer, NONCE_BYTES);
  [hello.rank, hello.size, hello.timeoutMs, hello.remainingMs].forEach((value, i) => view.setUint32(4 * i, value));
  const session = sessionOf(secret, challenge, payload.subarray(0, NONCE_BYTES + FIELDS_BYTES));
  payload.set(hmac(session, "hello"), NONCE_BYTES + FIELDS_BYTES);
  return { payload, keys: keysOf(session) };
}

/** Checks a `hello` against the challenge sent. `undefined` when it is malformed or the secret is not ours. */
export function openHello(
  secret: string,
  challenge: Uint8Array,
  payload: Uint8Array,
): { hello: Hello; keys: SessionKeys } | undefined {
  if (payload.length !== HELLO_BYTES) return undefined;
  const claims = payload.subarray(0, NONCE_BYTES + FIELDS_BYTES);
  const session = sessionOf(secret, challenge, claims);
  if (!timingSafeEqual(hmac(session, "hello"), payload.subarray(NONCE_BYTES + FIELDS_BYTES))) return undefined;
  const view = new DataView(payload.buffer, payload.byteOffset + NONCE_BYTES, FIELDS_BYTES);
  const [rank, size, timeoutMs, remainingMs] = [0, 4, 8, 12].map((at) => view.getUint32(at)) as [
    number,
    number,
    number,
    number,
  ];
  return { hello: { rank, size, timeoutMs, remainingMs }, keys: keysOf(session) };
}

/** Strips brackets and turns `localhost` into the address that both sides mean. */
export function normalHost(host: string): string {
  const bare = host.trim().replace(/^\[(.*)\]$/, "$1");
  return bare.toLowerCase() === "localhost" ? "127.0.0.1" : bare;
}

/** Whether a normal host is this machine alone, by its spelling: names are not looked up. */
export function isLoopback(host: string): boolean {
  return /^127(\.\d{1,3}){3}$/.test(host) || host === "::1";
}

/**
 * The secret to use: the one given, or, on the loopback interface only, one that follows from the port. The latter keeps
 * jobs apart that meet by mistake; it does not keep out another user of the same machine.
 *
 * @throws {RangeError} If the host is not loopback and no secret, or one shorter than 16 characters, is given.
 */
export function jobSecret(secret: string | undefined, host: string, port: number): string {
  const how =
    "set the environment variable DEEPEP_SECRET, or the option `secret`, to the same random text of at least " +
    "16 characters on every rank, for example the output of `openssl rand -hex 32`";
  if (secret) {
    if (!isLoopback(host) && secret.length < 16) {
      throw new RangeError(`Cannot join at ${host}:${port}: the job's secret has ${secret.length} characters: ${how}`);
    }
    return secret;
  }
  if (isLoopback(host)) return `deepep loopback ${port}`;
  throw new RangeError(`Cannot join at ${host}:${port}: a host other than loopback needs a job secret: ${how}`);
}
