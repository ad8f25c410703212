/**
 * Rank 0 of a TCP group: listens, lets in who knows the secret, runs the exchange for all.
 *
 * In: connections of ranks and of strangers. Out: a channel for rank 0's own calls. Until all ranks are there a stranger
 * costs one entry of a bounded set for the time of a handshake; once they are, nobody listens any more. A rank whose
 * connection breaks before that may come again.
 */
import { createServer, type Server, type Socket } from "node:net";
import { clearTimeout, setTimeout } from "node:timers";
import { setTimeout as sleep } from "node:timers/promises";
import { EpError } from "../error.ts";
import { Connection, CUT_OFF, type End } from "./connection.ts";
import { type Contribution, Exchange, type Failure, nameRanks, type Outcome } from "./exchange.ts";
import { type Hello, isLoopback, nonce, openHello } from "./handshake.ts";
import { type Channel, failureError } from "./member.ts";
import { decodeContribution, encodeFailure, encodeParts } from "./messages.ts";
import type { TcpFacts } from "./tcp.ts";
import { type Frame, FrameType, type SessionKeys, WireError } from "./wire.ts";

/** The call id of a failure that ends the whole group. */
export const WHOLE_GROUP = 0xffffffff;
/** How long an address in use is tried again: the previous job may be on its way out. Milliseconds. */
const LISTEN_RETRY_MS = 2000;
const MAX_REPORTS = 20;

/** Rank 0. */
export class Host implements Channel {
  readonly #facts: TcpFacts;
  readonly #exchange: Exchange;
  readonly #ranks = new Map<number, Connection>();
  /** Connections that have not proved anything, oldest first. */
  readonly #strangers = new Set<Connection>();
  /** By rank: when its patience ends. */
  readonly #deadlines = new Map<number, ReturnType<typeof setTimeout>>();
  readonly #reported = new Set<string>();
  readonly #joined = Promise.withResolvers<void>();
  #server: Server | undefined;
  #open = true;

  constructor(facts: TcpFacts) {
    this.#facts = facts;
    this.#exchange = new Exchange(facts.size);
  }

  /** Listens and waits for all ranks. @throws {EpError} `timeout` naming who is missing, `system` if it cannot listen. */
  async join(): Promise<void> {
    const { size, timeoutMs } = this.#facts;
    if (size === 1) return;
    const started = performance.now();
    this.#server = await this.#listen(Math.min(timeoutMs, LISTEN_RETRY_MS));
    this.#expectAll(0, timeoutMs, timeoutMs - (performance.now() - started));
    await this.#joined.promise;
  }

  contribute(contribution: Contribution): void {
    this.#exchange.contribute(contribution);
  }

  async leave(): Promise<void> {
    this.#exchange.remove(0, "has left the group");
    await Promise.all([...this.#ranks.values()].map((connection) => connection.end()));
  }

  async #listen(retryMs: number): Promise<Server> {
    const { host, port } = this.#facts;
    // A name or an outward address stands for the machine, however it is routed to it: all interfaces, guarded by the secret.
    const wanted = isLoopback(host) ? [host] : ["::", "0.0.0.0"];
    const addresses = wanted.filter((address) => mayListen(address, port));
    if (addresses.length === 0) throw this.#notAllowed();
    for (let waited = 0, i = 0;; i++) {
      try {
        return await listen(addresses[i % addresses.length]!, port, (socket) => this.#accept(socket));
      } catch (error) {
        const { code } = error as NodeJS.ErrnoException;
        const again = code === "EADDRINUSE" && waited < retryMs || i < addresses.length - 1;
        if (!again) throw this.#cannotListen(error as NodeJS.ErrnoException);
        if (code === "EADDRINUSE") waited += await sleep(50, 50);
      }
    }
  }

  #notAllowed(): EpError {
    const { host, port } = this.#facts;
    const flag = isLoopback(host) ? `--allow-net=${host}:${port}` : "--allow-net";
    const message = `Cannot join: rank 0 is not allowed to listen at ${host}:${port}; Deno needs ${flag}`;
    return new EpError(message, { code: "system", op: "connect", rank: 0 });
  }

  #cannotListen(error: NodeJS.ErrnoException): EpError {
    const { host, port } = this.#facts;
    const hint = error.code === "EADDRINUSE"
      ? `the port is in use by another program; set DEEPEP_PORT to a free one, the same on every rank`
      : `${error.code ?? error.message}`;
    const message = `Cannot join: rank 0 cannot listen at ${host}:${port}: ${hint}`;
    return new EpError(message, { code: "system", op: "connect", rank: 0, cause: error });
  }

  #accept(socket: Socket): void {
    const { size, handshakeTimeoutMs } = this.#facts;
    const connection = new Connection(socket, true);
    if (!this.#open) return connection.destroy();
    if (this.#strangers.size >= 64 + 2 * size) {
      const [oldest] = this.#strangers;
      this.#report(oldest!, "too many connections at once");
      this.#drop(oldest!);
    }
    this.#strangers.add(connection);
    const deadline = setTimeout(() => {
      this.#report(connection, `no handshake within ${handshakeTimeoutMs} ms`);
      this.#drop(connection);
    }, handshakeTimeoutMs);
    const challenge = nonce();
    connection.onEnd = ({ how }) => {
      clearTimeout(deadline);
      this.#strangers.delete(connection);
      // A port check connects and goes, which is not worth a line.
      if (how.startsWith(CUT_OFF)) this.#report(connection, how.slice(CUT_OFF.length));
    };
    connection.onFrame = (frame) => {
      clearTimeout(deadline);
      this.#greet(connection, challenge, frame);
    };
    connection.send(FrameType.challenge, [challenge]);
  }

  #drop(connection: Connection): void {
    this.#strangers.delete(connection);
    connection.destroy();
  }

  #greet(connection: Connection, challenge: Uint8Array, { type, payload }: Frame): void {
    if (type !== FrameType.hello) throw new WireError(`it sent a frame of type ${type} where a hello is due`);
    const opened = openHello(this.#facts.secret, challenge, payload);
    const reason = opened ? this.#objection(opened.hello) : "its job secret is not this job's";
    if (opened && reason === undefined) return this.#admit(connection, opened.hello, opened.keys);
    this.#report(connection, reason!);
    connection.end(FrameType.refuse, [new TextEncoder().encode(reason!)])
      .then(() => this.#strangers.delete(connection));
  }

  #objection({ rank, size }: Hello): string | undefined {
    if (size !== this.#facts.size) return `its job has ${size} ranks, this one ${this.#facts.size}`;
    if (rank === 0 || rank >= size) return `its rank is ${rank}, expected 1 to ${size - 1}`;
    const present = this.#ranks.get(rank);
    return present && `rank ${rank} has already joined from ${present.address}`;
  }

  #admit(connection: Connection, { rank, timeoutMs, remainingMs }: Hello, keys: SessionKeys): void {
    this.#strangers.delete(connection);
    this.#ranks.set(rank, connection);
    connection.seal(keys);
    connection.onFrame = (frame) => this.#serve(rank, connection, frame);
    connection.onEnd = (end) => this.#lose(rank, end);
    connection.send(FrameType.welcome);
    this.#expectAll(rank, timeoutMs, remainingMs);
    if (this.#ranks.size === this.#facts.size - 1) this.#start();
  }

  /** The first rank whose patience ends, ends the join for all: without it the group would not be whole anyway. */
  #expectAll(rank: number, timeoutMs: number, remainingMs: number): void {
    const timer = setTimeout(() => {
      const { size, host, port } = this.#facts;
      const missing = Array.from({ length: size }, (_, rank) => rank).filter((r) => r !== 0 && !this.#ranks.has(r));
      const message = `Cannot join: ${
        nameRanks(missing)
      } of ${size} did not arrive at ${host}:${port} within ${timeoutMs} ms`;
      this.#abandon({ code: "timeout", op: "connect", peer: missing[0]!, message, waitedNs: timeoutMs * 1e6 });
    }, Math.max(1, remainingMs));
    this.#deadlines.set(rank, timer);
  }

  #start(): void {
    this.#close();
    this.#server!.unref();
    for (const connection of this.#ranks.values()) {
      connection.send(FrameType.start);
      connection.unref();
    }
    this.#joined.resolve();
  }

  #abandon(failure: Failure): void {
    this.#close();
    const told = [...this.#ranks.values()].map((connection) => {
      return connection.end(FrameType.failure, encodeFailure(WHOLE_GROUP, failure));
    });
    Promise.all(told).then(() => this.#joined.reject(failureError(failure, 0)));
  }

  /** Nobody is let in any more. */
  #close(): void {
    this.#open = false;
    this.#server!.close();
    for (const timer of this.#deadlines.values()) clearTimeout(timer);
    for (const connection of [...this.#strangers]) this.#drop(connection);
  }

  #lose(rank: number, { orderly, how }: End): void {
    const { log } = this.#facts;
    if (this.#open) {
      this.#ranks.delete(rank);
      clearTimeout(this.#deadlines.get(rank));
      log(`deepep: rank ${rank} ${how} before all ranks had arrived`);
      return;
    }
    if (!orderly) log(`deepep: rank ${rank} ${how}`);
    this.#exchange.remove(rank, how);
  }

  #serve(rank: number, connection: Connection, { type, payload }: Frame): void {
    if (type !== FrameType.contribute) {
      throw new WireError(`it sent a frame of type ${type} where a contribution is due`);
    }
    const { call, ...contribution } = decodeContribution(payload, rank, this.#facts.size);
    const settle = (outcome: Outcome): void => {
      if ("failure" in outcome) return connection.send(FrameType.failure, encodeFailure(call, outcome.failure));
      const parts = outcome.parts.map((data, i) => ({ rank: contribution.ranks[i]!, data }));
      for (const chunks of encodeParts(call, parts)) connection.send(FrameType.parts, chunks);
    };
    this.#exchange.contribute({ ...contribution, rank, remote: true, settle });
  }

  /** Logs a refusal, once for each reason and address, and not without end. */
  #report(connection: Connection, reason: string): void {
    const { host, port, log } = this.#facts;
    const key = `${connection.address.replace(/:\d+$/, "")} ${reason}`;
    if (this.#reported.has(key) || this.#reported.size > MAX_REPORTS) return;
    this.#reported.add(key);
    const last = this.#reported.size > MAX_REPORTS;
    log(
      last
        ? `deepep: further refusals at ${host}:${port} are not reported`
        : `deepep: refused ${connection.address} at ${host}:${port}: ${reason}`,
    );
  }
}

// The part of Deno's API in use: node:net throws a refusal where nobody can catch it, so it is asked for before.
interface DenoPermissions {
  permissions: { requestSync(descriptor: { name: "net"; host: string }): { state: string } };
}

/** Whether Deno lets this program listen; asks the user where it can. */
function mayListen(address: string, port: number): boolean {
  const { Deno: deno } = globalThis as { Deno?: DenoPermissions };
  const host = address.includes(":") ? `[${address}]:${port}` : `${address}:${port}`;
  return !deno || deno.permissions.requestSync({ name: "net", host }).state === "granted";
}

function listen(host: string, port: number, accept: (socket: Socket) => void): Promise<Server> {
  return new Promise((resolve, reject) => {
    const server = createServer(accept);
    server.once("error", reject);
    server.listen({ host, port, backlog: 1024 }, () => {
      server.off("error", reject);
      server.on("error", () => {}); // a failed accept concerns the one who knocked
      resolve(server);
    });
  });
}
