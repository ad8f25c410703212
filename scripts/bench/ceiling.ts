/**
 * The ceiling: the same bytes moved by nothing but copies, in the same run.
 *
 * In: a world and the bytes of a row. Out: a chain that copies every row that the call moves, from its source to a place of
 * its own, one memcpy a row, on the threads that the call runs on (the communication streams, one a rank). Called by the
 * ops. On a GPU a copy a row would measure launches, so there each rank's rows are one copy.
 *
 * On the cpu backend a copy through a stream costs some 0.1 us beside its memcpy, which takes one or two. That would make the
 * bound too easy, so the time of as many empty copies (16 bytes), taken in the same turns, is subtracted from it.
 */
import type { Tensor } from "../../mod.ts";
import type { Ranks } from "./ranks.ts";
import { type Chain, type Spread, spreadOf, type Stopwatch } from "./timing.ts";
import { type BenchWorld, sum } from "./world.ts";

/** A copy. */
export interface Copy {
  readonly to: bigint;
  readonly from: bigint;
  readonly bytes: number;
}

/** Copies of every rank, and the memory that they go to. */
export class Ceiling implements Disposable {
  readonly #ranks: Ranks;
  readonly #to: readonly Tensor<"u8">[];
  readonly #copies: Copy[][];

  /** `numRows[r]` copies of `rowBytes` to consecutive places; the i-th row that rank r moves lies at `from(r, i)`. */
  constructor(
    ranks: Ranks,
    { numRows, rowBytes, moreBytes = 0 }: { numRows: readonly number[]; rowBytes: number; moreBytes?: number },
    from: (rank: number, i: number) => bigint,
  ) {
    this.#ranks = ranks;
    this.#to = ranks.buffers.map((b, r) => b.tensor("u8", [Math.max(256, numRows[r]! * (rowBytes + moreBytes))]));
    this.#copies = this.#to.map(({ address }, r) => {
      const count = numRows[r]!;
      if (count === 0) return [];
      if (!this.#byRow) return [{ to: address, from: from(r, 0), bytes: count * rowBytes }];
      return Array.from(
        { length: count },
        (_, i) => ({ to: address + BigInt(i * rowBytes), from: from(r, i), bytes: rowBytes }),
      );
    });
  }

  /** More copies on rank `r`, to what `moreBytes` left at the end of its memory: `at` bytes from the begin. */
  add(r: number, { at, from, bytes }: { at: number; from: bigint; bytes: number }): void {
    this.#copies[r]!.push({ to: this.#to[r]!.address + BigInt(at), from, bytes });
  }

  get #byRow(): boolean {
    return this.#ranks.buffers[0]!.backend === "cpu";
  }

  /** What the bound is, for people. */
  get words(): string {
    const rows = sum(this.#copies.map((ofRank) => ofRank.length));
    return this.#byRow
      ? `bound: ${rows} copies, one a row, less the time of as many empty ones`
      : `bound: ${rows} copies, one a rank`;
  }

  /** Times a call against its copies and the naive way. */
  async compare(
    stopwatch: Stopwatch,
    measured: Chain,
    naive: Chain,
  ): Promise<Record<"measured" | "bound" | "naive", Spread>> {
    const copies = this.#chain(this.#copies);
    if (!this.#byRow) return await stopwatch.measure({ measured, bound: copies, naive });
    const empty = this.#chain(
      this.#copies.map((ofRank, r) => {
        const { address } = this.#to[r]!;
        return ofRank.map(() => ({ to: address, from: address + 64n, bytes: 16 }));
      }),
    );
    const samples = await stopwatch.samples({ measured, copies, naive, empty });
    return {
      measured: spreadOf(samples.measured),
      bound: spreadOf(samples.copies.map((us, i) => Math.max(us - samples.empty[i]!, us / 10))),
      naive: spreadOf(samples.naive),
    };
  }

  #chain(copies: readonly (readonly Copy[])[]): Chain {
    return {
      lanes: this.#ranks.lanes,
      callsPerStep: sum(copies.map((ofRank) => ofRank.length)),
      step: () => {
        copies.forEach((ofRank, r) => {
          const { core } = this.#ranks.buffers[r]!;
          for (const { to, from, bytes } of ofRank) core.copy(to, from, bytes, core.commStream);
        });
      },
    };
  }

  /** Releases the memory. */
  [Symbol.dispose](): void {
    for (const tensor of this.#to) tensor.release();
  }
}

/** Tokens of rank `s`, once for each rank they go to, in the order of the tokens: what a dispatch reads. */
export function* rowsSent(world: BenchWorld, s: number): Generator<{ token: number; rank: number }> {
  const destinations = world.destinations[s]!;
  for (let i = 0; i < destinations.length; i++) {
    if (destinations[i]! >= 0) yield { token: Math.floor(i / world.destinationsPerToken), rank: destinations[i]! };
  }
}
