/**
 * A rank other than 0 of a TCP group: finds rank 0, proves itself, hands its contributions over.
 *
 * In: contributions of one member. Out: outcomes as rank 0 tells them. Rank 0 may start later, or its machine may not
 * have a name yet: everything but a clear refusal is tried again until the deadline.
 */
import { connect, type Socket } from "node:net";
import { clearTimeout, setTimeout } from "node:timers";
import { setTimeout as sleep } from "node:timers/promises";
import { EpError } from "../error.ts";
import { Connection, type End } from "./connection.ts";
import type { Contribution, Failure } from "./exchange.ts";
import { makeHello, NONCE_BYTES } from "./handshake.ts";
import { type Channel, failureError } from "./member.ts";
import { decodeFailure, decodeParts, encodeContribution } from "./messages.ts";
import type { TcpFacts } from "./tcp.ts";
import { WHOLE_GROUP } from "./tcp_server.ts";
import { type Frame, FrameType, WireError } from "./wire.ts";

/** Rank 0 answers a deadline itself; this much later it is taken to be stuck. Milliseconds. */
const GRACE_MS = 2000;
const CONNECT_MS = 5000;

interface Call {
  contribution: Contribution;
  parts: Map<number, Uint8Array>;
  timer: ReturnType<typeof setTimeout>;
}

/** An attempt that may be repeated. The message follows "rank 0". */
class TryAgain extends Error {}

/** Ranks 1 and up. */
export class Client implements Channel {
  readonly #facts: TcpFacts;
  readonly #calls = new Map<number, Call>();
  #connection: Connection | undefined;
  #lost: string | undefined;
  #nextCall = 0;

  constructor(facts: TcpFacts) {
    this.#facts = facts;
  }

  /** Finds rank 0 and waits for all ranks. @throws {EpError} `timeout` naming who is missing, `mismatch` if refused. */
  async join(): Promise<void> {
    const { rank, size, host, port, timeoutMs } = this.#facts;
    const deadline = performance.now() + timeoutMs;
    for (let pauseMs = 20, last = "";; pauseMs = Math.min(500, 1.5 * pauseMs)) {
      const remainingMs = Math.ceil(deadline - performance.now());
      if (remainingMs <= 0) {
        const message = `Cannot join: rank 0 of ${size} did not arrive at ${host}:${port} within ${timeoutMs} ms`;
        const facts = { code: "timeout", op: "connect", rank, peer: 0, waitedNs: timeoutMs * 1e6 } as const;
        throw new EpError(last ? `${message} (${last})` : message, facts);
      }
      try {
        const connection = new Connection(await this.#dial(Math.min(remainingMs, CONNECT_MS)), false);
        return await this.#enter(connection, deadline);
      } catch (error) {
        if (!(error instanceof TryAgain)) throw error;
        last = error.message;
        await sleep(Math.max(1, Math.min(pauseMs * (1 + Math.random()) / 2, deadline - performance.now())));
      }
    }
  }

  contribute(contribution: Contribution): void {
    const { op, ranks, timeoutMs } = contribution;
    if (this.#lost !== undefined) return contribution.settle({ failure: this.#hostFailure(op, this.#lost) });
    const call = this.#nextCall;
    this.#nextCall = (call + 1) % WHOLE_GROUP;
    const patienceMs = Math.min(timeoutMs + GRACE_MS, 2 ** 31 - 1);
    const timer = setTimeout(() => {
      const failure = this.#hostFailure(op, `did not answer within ${patienceMs} ms`);
      this.#settle(call, { ...failure, code: "timeout", waitedNs: patienceMs * 1e6 });
    }, patienceMs);
    this.#calls.set(call, { contribution, parts: new Map(), timer });
    this.#connection!.send(
      FrameType.contribute,
      encodeContribution({ call, ...contribution, ranks }, this.#facts.size),
    );
  }

  async leave(): Promise<void> {
    for (const { timer } of this.#calls.values()) clearTimeout(timer);
    this.#calls.clear();
    await this.#connection!.end();
  }

  #hostFailure(op: string, how: string): Failure {
    return { code: "peerLost", op, peer: 0, message: `Cannot run ${op}: rank 0, which hosts the group, ${how}` };
  }

  #dial(timeoutMs: number): Promise<Socket> {
    const { host, port } = this.#facts;
    return new Promise((resolve, reject) => {
      const socket = connect({ host, port });
      const fail = (error: Error): void => {
        clearTimeout(timer);
        socket.destroy();
        reject(error);
      };
      const timer = setTimeout(() => fail(new TryAgain("no answer")), timeoutMs);
      socket.on("error", (error: NodeJS.ErrnoException) => {
        const forbidden = error.code === "EPERM" || error.name === "NotCapable";
        fail(forbidden ? this.#notAllowed(error) : new TryAgain(explain(error)));
      });
      socket.once("connect", () => {
        clearTimeout(timer);
        resolve(socket);
      });
    });
  }

  #notAllowed(error: Error): EpError {
    const { rank, host, port } = this.#facts;
    const message =
      `Cannot join: rank ${rank} is not allowed to connect to ${host}:${port}; Deno needs --allow-net=${host}:${port}`;
    return new EpError(message, { code: "system", op: "connect", rank, peer: 0, cause: error });
  }

  /** From the challenge to the start of the group. */
  #enter(connection: Connection, deadline: number): Promise<void> {
    const { promise, resolve, reject } = Promise.withResolvers<void>();
    let timer: ReturnType<typeof setTimeout> | undefined;
    const fail = (error: Error): void => {
      clearTimeout(timer);
      connection.destroy();
      reject(error);
    };
    const expect = (graceMs: number, otherwise: string): void => {
      clearTimeout(timer);
      const leftMs = Math.max(1, deadline - performance.now() + graceMs);
      timer = setTimeout(() => fail(new TryAgain(otherwise)), leftMs);
    };
    expect(0, "it listens but does not answer");
    connection.onEnd = ({ how }) => fail(new TryAgain(`it ${how}`));
    connection.onFrame = (frame) => {
      if (frame.type === FrameType.challenge) this.#answer(connection, frame, deadline);
      else if (frame.type === FrameType.refuse) fail(this.#refused(frame));
      // From here on rank 0 knows this rank's deadline and ends the join with the names of the missing.
      else if (frame.type === FrameType.welcome) expect(GRACE_MS, "it does not answer any more");
      else if (frame.type === FrameType.failure) {
        fail(failureError(decodeFailure(frame.payload).failure, this.#facts.rank));
      } else if (frame.type === FrameType.start) {
        clearTimeout(timer);
        this.#begin(connection);
        resolve();
      } else throw new WireError(`it sent a frame of type ${frame.type} during the handshake`);
    };
    return promise;
  }

  #answer(connection: Connection, { payload }: Frame, deadline: number): void {
    if (payload.length !== NONCE_BYTES) throw new WireError("it sent a challenge that does not add up");
    const { secret, rank, size, timeoutMs } = this.#facts;
    const remainingMs = Math.max(1, Math.ceil(deadline - performance.now()));
    const hello = makeHello(secret, payload, { rank, size, timeoutMs, remainingMs });
    connection.send(FrameType.hello, [hello.payload]);
    connection.seal(hello.keys);
  }

  #refused({ payload }: Frame): EpError {
    const { rank, host, port } = this.#facts;
    // Nobody has signed this text.
    const reason = new TextDecoder().decode(payload).replace(/[^ -~]/g, "?");
    const message = `Cannot join: rank 0 at ${host}:${port} refused rank ${rank}: ${reason}`;
    return new EpError(message, { code: "mismatch", op: "connect", rank, peer: 0 });
  }

  #begin(connection: Connection): void {
    this.#connection = connection;
    connection.onFrame = (frame) => this.#receive(frame);
    connection.onEnd = (end) => this.#lose(end);
    connection.unref(); // a pending call's timer keeps the process alive
  }

  #receive({ type, payload }: Frame): void {
    if (type === FrameType.failure) {
      const { call, failure } = decodeFailure(payload);
      return this.#settle(call, failure);
    }
    if (type !== FrameType.parts) throw new WireError(`it sent a frame of type ${type} where an answer is due`);
    const { call, parts } = decodeParts(payload);
    const entry = this.#calls.get(call);
    if (!entry) return; // given up
    for (const { rank, data } of parts) entry.parts.set(rank, data);
    if (entry.contribution.ranks.every((rank) => entry.parts.has(rank))) this.#settle(call);
  }

  #settle(call: number, failure?: Failure): void {
    const entry = this.#calls.get(call);
    if (!entry) return;
    clearTimeout(entry.timer);
    this.#calls.delete(call);
    const { ranks, settle } = entry.contribution;
    settle(failure ? { failure } : { parts: ranks.map((rank) => entry.parts.get(rank)!) });
  }

  #lose({ orderly, how }: End): void {
    this.#lost = how;
    if (!orderly) this.#facts.log(`deepep: rank ${this.#facts.rank}: rank 0, which hosts the group, ${how}`);
    for (const [call, { contribution }] of [...this.#calls]) {
      this.#settle(call, this.#hostFailure(contribution.op, how));
    }
  }
}

function explain(error: NodeJS.ErrnoException): string {
  if (error.code === "ECONNREFUSED") return "nobody listens there; a group that is complete does not listen either";
  return error.code ?? error.message;
}
