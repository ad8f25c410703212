/**
 * The ceiling: the same bytes moved by nothing but copies, in the same run.
 *
 * In: a world and the bytes of a row. Out: a chain that copies every row that the call moves, from its source to a place of
 * its own, one memcpy a row, on the threads that the call runs on (the communication streams, one a rank). Called by the
 * ops. On a GPU a copy a row would measure launches, so there each rank's rows are one copy.
 *
 * A copy through a stream of the cpu backend costs some 0.1 µs beside the memcpy, whose row takes some microseconds; rows are
 * therefore really copied one by one. {@linkcode copyOverheadUs} measures that cost, and the bench prints it.
 */
import type { Tensor } from "../../mod.ts";
import type { Ranks } from "./ranks.ts";
import type { Chain, Stopwatch } from "./timing.ts";
import { type BenchWorld, sum } from "./world.ts";

/** A copy. */
export interface Copy {
  readonly to: bigint;
  readonly from: bigint;
  readonly bytes: number;
}

/** Tokens of rank `s`, once for each rank they go to, in the order of the tokens: what a dispatch reads. */
export function* rowsSent(world: BenchWorld, s: number): Generator<{ token: number; rank: number }> {
  const destinations = world.destinations[s]!;
  for (let i = 0; i < destinations.length; i++) {
    if (destinations[i]! >= 0) yield { token: Math.floor(i / world.destinationsPerToken), rank: destinations[i]! };
  }
}

/** The chain of copies of each rank. */
export function copyChain(ranks: Ranks, copies: readonly (readonly Copy[])[]): Chain {
  return {
    lanes: ranks.lanes,
    callsPerStep: sum(copies.map((ofRank) => ofRank.length)),
    step() {
      copies.forEach((ofRank, r) => {
        const { core } = ranks.buffers[r]!;
        for (const { to, from, bytes } of ofRank) core.copy(to, from, bytes, core.commStream);
      });
    },
  };
}

/** Memory that copies go to, one a rank. */
export function scratch(ranks: Ranks, bytes: readonly number[]): Tensor<"u8">[] {
  return ranks.buffers.map((buffer, r) => buffer.tensor("u8", [Math.max(1, bytes[r]!)]));
}

/** Copies of `numRows` rows to consecutive places of each rank's memory. `from(r, i)`: the i-th row that rank r moves. */
export function rowCopies(
  ranks: Ranks,
  { to, numRows, rowBytes }: { to: readonly Tensor[]; numRows: readonly number[]; rowBytes: number },
  from: (rank: number, i: number) => bigint,
): Copy[][] {
  return ranks.buffers.map(({ backend }, r) => {
    const base = to[r]!.address, count = numRows[r]!;
    if (count === 0) return [];
    if (backend !== "cpu") return [{ to: base, from: from(r, 0), bytes: count * rowBytes }];
    return Array.from(
      { length: count },
      (_, i) => ({ to: base + BigInt(i * rowBytes), from: from(r, i), bytes: rowBytes }),
    );
  });
}

/** What a copy of no size worth mentioning takes in a chain, over all ranks: microseconds. */
export async function copyOverheadUs(ranks: Ranks, stopwatch: Stopwatch): Promise<number> {
  const pieces = scratch(ranks, ranks.buffers.map(() => 64));
  const count = 1000;
  const copies = pieces.map(({ address }) =>
    Array.from({ length: count }, () => ({ to: address, from: address + 32n, bytes: 16 }))
  );
  const { median } = (await stopwatch.measure({ copies: copyChain(ranks, copies) })).copies;
  for (const piece of pieces) piece.release();
  return median / (count * ranks.buffers.length);
}
