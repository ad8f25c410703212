/**
 * Groups of processes or workers: checks the options, then rank 0 hosts (`tcp_server.ts`) and the others come to it
 * (`tcp_client.ts`). `group.ts` calls.
 */
import type { ConnectOptions, Group } from "./group.ts";
import { isLoopback, jobSecret, normalHost } from "./handshake.ts";
import { type Channel, checkTimeout, Member } from "./member.ts";
import { Client } from "./tcp_client.ts";
import { Host } from "./tcp_server.ts";
import { MAX_RANKS } from "./wire.ts";

/** Options of {@linkcode connectTcp} with every default filled in. Times are milliseconds. */
export interface TcpFacts {
  rank: number;
  size: number;
  host: string;
  port: number;
  secret: string;
  timeoutMs: number;
  handshakeTimeoutMs: number;
  log: (message: string) => void;
}

const checkWhole = (name: string, value: number, from: number, to: number): void => {
  if (!Number.isInteger(value) || value < from || value > to) {
    throw new RangeError(`Cannot join: ${name} is ${value}, expected ${from} to ${to}`);
  }
};

/** Joins a group over TCP. See `Group.connect`. */
export async function connectTcp(options: ConnectOptions): Promise<Group> {
  const { rank, size, port, timeoutMs = 30_000, handshakeTimeoutMs = 5000 } = options;
  checkWhole("size", size, 1, MAX_RANKS);
  checkWhole("rank", rank, 0, size - 1);
  checkWhole("port", port, 1, 65535);
  checkTimeout("join", timeoutMs);
  checkTimeout("join", handshakeTimeoutMs);
  if (typeof options.host !== "string" || !options.host.trim()) {
    throw new RangeError(`Cannot join: host is "${options.host}", expected the name or address of rank 0's machine`);
  }
  const host = normalHost(options.host);
  const localRank = options.localRank ?? (isLoopback(host) ? rank : 0);
  checkWhole("localRank", localRank, 0, size - 1);
  const secret = jobSecret(options.secret, host, port);
  const log = options.log ?? ((message: string) => console.warn(message));
  const facts: TcpFacts = { rank, size, host, port, secret, timeoutMs, handshakeTimeoutMs, log };
  const channel: Channel & { join(): Promise<void> } = rank === 0 ? new Host(facts) : new Client(facts);
  await channel.join();
  return new Member({ rank, size, localRank, timeoutMs }, channel);
}
