/**
 * One rank's view of a group: checks the arguments, counts the rounds, and turns outcomes into promises.
 *
 * In: calls of the user. Out: contributions to a channel, which is the exchange itself (`local.ts`, rank 0 of `tcp.ts`)
 * or a connection to it (the other ranks). Whatever the channel, the checks, the copies and the errors are these.
 */
import { EpError } from "../error.ts";
import type { Collective, Contribution, Failure, Outcome } from "./exchange.ts";
import type { CollectiveOptions, Group } from "./group.ts";
import { MAX_DATA_BYTES } from "./wire.ts";

/** Where contributions go. */
export interface Channel {
  contribute(contribution: Contribution): void;
  /** Leaves the group in good order. Bounded in time, never rejects. */
  leave(): Promise<void>;
}

/** What a {@linkcode Member} is. */
export interface MemberFacts {
  rank: number;
  size: number;
  localRank: number;
  /** Deadline of a collective that gives none, milliseconds. */
  timeoutMs: number;
}

/** The longest deadline, milliseconds: what a timer can hold, about 24 days. */
export const MAX_TIMEOUT_MS = 2 ** 31 - 1;

/** Makes an error of a failure, as seen by `rank`. */
export function failureError({ message, ...facts }: Failure, rank: number): EpError {
  return new EpError(message, { ...facts, rank });
}

/** @throws {RangeError} If `timeoutMs` is not a whole number from 1 to 2^31 - 1. */
export function checkTimeout(what: string, timeoutMs: number): void {
  if (!Number.isInteger(timeoutMs) || timeoutMs < 1 || timeoutMs > MAX_TIMEOUT_MS) {
    throw new RangeError(
      `Cannot ${what}: timeoutMs is ${timeoutMs}, expected a whole number from 1 to ${MAX_TIMEOUT_MS}`,
    );
  }
}

/** A rank of any group. */
export class Member implements Group {
  readonly rank: number;
  readonly size: number;
  readonly localRank: number;
  readonly #timeoutMs: number;
  readonly #channel: Channel;
  readonly #sequences = new Map<string, number>();
  readonly #pending = new Set<(error: EpError) => void>();
  #left: Promise<void> | undefined;

  constructor({ rank, size, localRank, timeoutMs }: MemberFacts, channel: Channel) {
    [this.rank, this.size, this.localRank, this.#timeoutMs] = [rank, size, localRank, timeoutMs];
    this.#channel = channel;
  }

  async allGather(data: Uint8Array, options: CollectiveOptions = {}): Promise<Uint8Array[]> {
    if (!(data instanceof Uint8Array)) throw new TypeError("Cannot run allGather: data is not a Uint8Array");
    if (data.length > MAX_DATA_BYTES) {
      throw new RangeError(`Cannot run allGather: data has ${data.length} bytes, the limit is ${MAX_DATA_BYTES}`);
    }
    const ranks = this.#ranksOf("allGather", options);
    const parts = await this.#run("allGather", ranks, data.slice(), options);
    const all = Array.from({ length: this.size }, () => new Uint8Array(0));
    // Each rank gets its own copy, at the start of its own memory, so that it may write to it and view it as other types.
    ranks.forEach((rank, i) => all[rank] = new Uint8Array(parts[i]!));
    return all;
  }

  async barrier(options: CollectiveOptions = {}): Promise<void> {
    await this.#run("barrier", this.#ranksOf("barrier", options), new Uint8Array(0), options);
  }

  [Symbol.asyncDispose](): Promise<void> {
    this.#left ??= this.#leave();
    return this.#left;
  }

  #leave(): Promise<void> {
    for (const reject of [...this.#pending]) reject(this.#closed("finish a collective"));
    return this.#channel.leave();
  }

  #closed(op: string): EpError {
    return new EpError(`Cannot ${op}: rank ${this.rank} has disposed its group`, {
      code: "closed",
      op,
      rank: this.rank,
    });
  }

  #ranksOf(op: Collective, { ranks }: CollectiveOptions): readonly number[] {
    if (ranks === undefined) return Array.from({ length: this.size }, (_, rank) => rank);
    const bad = ranks.find((rank) => !Number.isInteger(rank) || rank < 0 || rank >= this.size);
    if (bad !== undefined) {
      throw new RangeError(`Cannot run ${op}: ranks has ${bad}, expected 0 to ${this.size - 1}`);
    }
    if (new Set(ranks).size !== ranks.length) {
      throw new RangeError(`Cannot run ${op}: ranks names a rank twice: ${ranks}`);
    }
    if (!ranks.includes(this.rank)) {
      throw new RangeError(`Cannot run ${op}: ranks are ${ranks}, without the caller, rank ${this.rank}`);
    }
    return [...ranks].sort((a, b) => a - b);
  }

  #run(
    op: Collective,
    ranks: readonly number[],
    data: Uint8Array,
    { timeoutMs = this.#timeoutMs }: CollectiveOptions,
  ): Promise<readonly Uint8Array[]> {
    checkTimeout(`run ${op}`, timeoutMs);
    if (this.#left) throw this.#closed(`run ${op}`);
    const key = ranks.join();
    const sequence = this.#sequences.get(key) ?? 0;
    this.#sequences.set(key, sequence + 1);
    const { promise, resolve, reject } = Promise.withResolvers<readonly Uint8Array[]>();
    this.#pending.add(reject);
    const settle = (outcome: Outcome): void => {
      this.#pending.delete(reject); // after a dispose the promise is rejected already and stays so
      if ("parts" in outcome) resolve(outcome.parts);
      else reject(failureError(outcome.failure, this.rank));
    };
    this.#channel.contribute({ rank: this.rank, op, ranks, sequence, data, timeoutMs, settle });
    return promise;
  }
}
