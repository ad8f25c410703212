/**
 * The rounds of a group, apart from any transport: contributions come in, each is settled once, with everybody's data
 * or with a failure that names who is to blame.
 *
 * `Group.local` calls it for all ranks, `tcp_server.ts` for rank 0 and on behalf of the others, so both mean the same.
 * A round is known by its set of ranks and by how many rounds this set has had before. A failed round is remembered
 * until every member has heard of it: a rank that comes late gets the failure and never meets the next round's data.
 */
import { clearTimeout, setTimeout } from "node:timers";
import type { EpErrorCode } from "../error.ts";

/** A kind of round. */
export type Collective = "allGather" | "barrier";

/** Why a round failed, as every member hears it. */
export interface Failure {
  code: EpErrorCode;
  op: string;
  message: string;
  peer?: number;
  waitedNs?: number;
}

/** How a round ended for one member: the data of its ranks in the order of `ranks`, or a failure. */
export type Outcome = { readonly parts: readonly Uint8Array[] } | { readonly failure: Failure };

/** One rank's part in a round. `ranks` ascends and contains `rank`; `data` belongs to the exchange. */
export interface Contribution {
  rank: number;
  op: Collective;
  ranks: readonly number[];
  /** How many rounds of this rank with these ranks came before. */
  sequence: number;
  data: Uint8Array;
  timeoutMs: number;
  /** The deadline does not keep this process alive: the rank that waits lives in another one. */
  remote?: boolean;
  settle(outcome: Outcome): void;
}

interface Round {
  key: string;
  op: Collective;
  ranks: readonly number[];
  arrived: Map<number, { contribution: Contribution; timer: ReturnType<typeof setTimeout> }>;
}

const MAX_REMEMBERED = 1024;

/** `rank 2` or `ranks 2, 5`, at most 16 of them. */
export function nameRanks(ranks: readonly number[]): string {
  const shown = ranks.slice(0, 16).join(", ") + (ranks.length > 16 ? ` and ${ranks.length - 16} more` : "");
  return `${ranks.length === 1 ? "rank" : "ranks"} ${shown}`;
}

/** Matches contributions to rounds. */
export class Exchange {
  readonly #size: number;
  readonly #rounds = new Map<string, Round>();
  readonly #failed = new Map<string, { failure: Failure; unheard: Set<number> }>();
  /** For each rank the rounds that it waits in, oldest first. */
  readonly #waiting: Round[][];
  readonly #gone = new Map<number, string>();

  /** Of `size` ranks, all present. */
  constructor(size: number) {
    this.#size = size;
    this.#waiting = Array.from({ length: size }, () => []);
  }

  /** Takes one rank's part. Settles it at once or when the round ends, never later than its deadline. */
  contribute(contribution: Contribution): void {
    const { rank, op, ranks, sequence } = contribution;
    const key = `${ranks.length === this.#size ? "all" : ranks.join()}#${sequence}`;
    const failed = this.#hear(key, rank);
    if (failed) return contribution.settle({ failure: failed });
    const round = this.#rounds.get(key) ?? { key, op, ranks, arrived: new Map() };
    this.#rounds.set(key, round);
    const timer = setTimeout(() => this.#expire(round, contribution), contribution.timeoutMs);
    if (contribution.remote) timer.unref();
    round.arrived.set(rank, { contribution, timer });
    this.#waiting[rank]!.push(round);
    const lost = ranks.find((r) => this.#gone.has(r));
    if (lost !== undefined) return this.#fail(round, this.#lossOf(op, lost));
    if (round.op !== op) return this.#failMismatch(round, `rank ${rank} is in ${op}`, rank);
    if (round.arrived.size === ranks.length) return this.#complete(round);
    this.#checkOrder([rank]);
  }

  /** From now on every round with `rank` fails, saying that it `how`: "has left the group", "has ended (...)". */
  remove(rank: number, how: string): void {
    if (this.#gone.has(rank)) return;
    this.#gone.set(rank, how);
    for (const round of [...this.#rounds.values()]) {
      if (round.ranks.includes(rank)) this.#fail(round, this.#lossOf(round.op, rank));
    }
    for (const [key, { unheard }] of this.#failed) {
      if (unheard.delete(rank) && unheard.size === 0) this.#failed.delete(key);
    }
  }

  #lossOf(op: Collective, peer: number): Failure {
    return { code: "peerLost", op, peer, message: `Cannot run ${op}: rank ${peer} ${this.#gone.get(peer)}` };
  }

  #hear(key: string, rank: number): Failure | undefined {
    const failed = this.#failed.get(key);
    if (!failed) return undefined;
    failed.unheard.delete(rank);
    if (failed.unheard.size === 0) this.#failed.delete(key);
    return failed.failure;
  }

  #expire(round: Round, { op, timeoutMs }: Contribution): void {
    const missing = round.ranks.filter((rank) => !round.arrived.has(rank));
    const message = `Cannot run ${op}: ${nameRanks(missing)} of ${this.#size} did not arrive within ${timeoutMs} ms`;
    this.#fail(round, { code: "timeout", op, peer: missing[0]!, message, waitedNs: timeoutMs * 1e6 });
  }

  #failMismatch(round: Round, other: string, peer: number): void {
    const message = `Cannot run ${round.op} among ${nameRanks(round.ranks)}: ${other}`;
    this.#fail(round, { code: "mismatch", op: round.op, peer, message });
  }

  /** Two ranks that each wait for the other in different rounds would wait for ever: both rounds fail. */
  #checkOrder(ranks: readonly number[]): void {
    for (const rank of ranks) {
      const round = this.#waiting[rank]![0];
      for (const other of round?.ranks ?? []) {
        const theirs = this.#waiting[other]![0];
        if (!round || !theirs || theirs === round || !theirs.ranks.includes(rank)) continue;
        this.#failMismatch(round, `rank ${other} is in ${theirs.op} among ${nameRanks(theirs.ranks)}`, other);
        this.#failMismatch(theirs, `rank ${rank} is in ${round.op} among ${nameRanks(round.ranks)}`, rank);
        break;
      }
    }
  }

  #complete(round: Round): void {
    const parts = round.ranks.map((rank) => round.arrived.get(rank)!.contribution.data);
    this.#settle(round, { parts });
  }

  #fail(round: Round, failure: Failure): void {
    if (!this.#rounds.has(round.key)) return;
    const unheard = new Set(round.ranks.filter((rank) => !round.arrived.has(rank) && !this.#gone.has(rank)));
    if (unheard.size > 0) this.#failed.set(round.key, { failure, unheard });
    // A rank that never calls again would let this grow; the oldest is forgotten, its late member then meets a deadline.
    if (this.#failed.size > MAX_REMEMBERED) this.#failed.delete(this.#failed.keys().next().value!);
    this.#settle(round, { failure });
  }

  #settle(round: Round, outcome: Outcome): void {
    this.#rounds.delete(round.key);
    for (const [rank, { timer }] of round.arrived) {
      clearTimeout(timer);
      const list = this.#waiting[rank]!;
      list.splice(list.indexOf(round), 1);
    }
    for (const { contribution } of round.arrived.values()) contribution.settle(outcome);
    if ("failure" in outcome) this.#checkOrder(round.ranks);
  }
}
