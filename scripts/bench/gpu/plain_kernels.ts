/**
 * Kernels that move the rows of a call without any word between the ranks, or with one, and copies between devices: what calls are
 * held against.
 *
 * In: a stage, a routing whose places are known. Out: chains, and comparisons with the naive way. Called by plain.ts and links.ts.
 */
import type { Tensor } from "../../../mod.ts";
import type { Verifier } from "../verify.ts";
import type { NaiveCombine, NaiveDispatch } from "./naive.ts";
import type { Command } from "./naive_library.ts";
import type { Rows } from "./stage.ts";
import { compareAll, type NaiveWork, Work } from "./work.ts";

/**
 * A ceiling of dispatches: one kernel a rank that reads each row once and writes it to all its places, which it knows beforehand,
 * without a word between the ranks.
 */
export class PlainScatter extends Work {
  /** Where each rank's rows are in the end, by part. */
  readonly result: readonly (readonly bigint[])[];
  readonly #pairs: readonly { rank: number; part: number; bytes: number }[];

  /** `blocks`: of a rank's kernel, at most. */
  constructor(work: NaiveWork, rows: Rows, blocks: number) {
    super(work);
    const { stage, loaded: { routing }, route } = work, [bytes = 0, scaleBytes = 0] = rows.partBytes;
    this.#pairs = route.sources.flatMap(({ length }, rank) =>
      rows.partBytes.map((rowBytes, part) => ({ rank, part, bytes: length * rowBytes }))
    );
    const result = this.result = route.sources.map((): bigint[] => []);
    for (const { rank, bytes } of this.#pairs) result[rank]!.push(this.bytes(rank, bytes));
    this.use([this.lanes.map((on, s): Command => {
      const bases = rows.partBytes.map((rowBytes, p) => ({ base: (rank: number) => result[rank]![p]!, rowBytes }));
      const table = stage.addresses(route, s, bases);
      this.owned.push(table);
      return {
        op: "scatter",
        on,
        a: rows.address(s, 0),
        b: table.address,
        c: rows.partBytes.length > 1 ? rows.address(s, 1) : 0n,
        n: routing.tokens,
        m: [bytes, scaleBytes],
        k: [route.width, blocks],
      };
    })]);
  }

  /** Compares every byte with the naive way's. */
  async compare(what: string, verifier: Verifier, naive: NaiveDispatch): Promise<void> {
    const pairs = this.#pairs.map(({ rank, part, bytes }) => ({
      rank,
      a: this.result[rank]![part]!,
      b: naive.result[rank]![part]!,
      bytes,
    }));
    await compareAll(this, what, verifier, pairs);
  }
}

/** A ceiling of everything that few multiprocessors store: a kernel on one device that does nothing else. */
export class PlainStore extends Work {
  constructor(work: Pick<NaiveWork, "library" | "stage">, bytes: number, blocks: number) {
    super(work);
    this.use([[{ op: "store", on: this.lanes[0]!, a: this.bytes(0, bytes), n: bytes, k: blocks }]]);
  }
}

/** Sums of a rank's tokens, a row each. */
abstract class PlainSum extends Work {
  protected readonly result: readonly bigint[];
  readonly #bytes: number;

  constructor(work: NaiveWork) {
    super(work);
    const { stage, loaded: { routing } } = work, bytes = this.#bytes = routing.tokens * 2 * stage.hidden;
    this.result = this.lanes.map((_, s) => this.bytes(s, bytes));
  }

  /** Compares every byte with the naive way's. */
  async compare(what: string, verifier: Verifier, naive: NaiveCombine): Promise<void> {
    const pairs = this.result.map((a, rank) => ({ rank, a, b: naive.result[rank]!, bytes: this.#bytes }));
    await compareAll(this, what, verifier, pairs);
  }
}

/** A ceiling of combines: one kernel a rank that sums rows where they lie, without a word between the ranks. */
export class PlainPull extends PlainSum {
  /** `y`, `weights`: as of {@linkcode NaiveCombine}. */
  constructor(work: NaiveWork, y: readonly bigint[], weights?: readonly Tensor[]) {
    super(work);
    const { stage, loaded: { routing }, route } = work, rowBytes = 2 * stage.hidden;
    this.use([this.lanes.map((on, s): Command => {
      const table = stage.addresses(route, s, [{ base: (rank) => y[rank]!, rowBytes }]);
      this.owned.push(table);
      const [a, b, c] = [this.result[s]!, table.address, weights?.[s]?.address ?? 0n];
      return { op: "reduce", on, a, b, c, n: routing.tokens, m: rowBytes, k: route.width };
    })]);
  }
}

/**
 * The other way of a combine between devices: one kernel a rank that pushes rows to where their owner is, and one that sums them
 * there. Rows of the same device are summed where they lie. The ranks meet once, by events.
 */
export class PlainPush extends PlainSum {
  /** `y`, `weights`: as of {@linkcode NaiveCombine}. */
  constructor(work: NaiveWork, y: readonly bigint[], weights?: readonly Tensor[]) {
    super(work);
    const { stage, loaded: { routing: { tokens } }, route } = work, { width } = route, rowBytes = 2 * stage.hidden;
    const { buffers } = stage.ranks, deviceOf = buffers.map(({ deviceIndex }) => deviceIndex);
    const table = (words: BigInt64Array<ArrayBuffer>, rank: number): bigint => {
      const tensor = buffers[rank]!.tensor("i64", [words.length], words);
      this.owned.push(tensor);
      return tensor.address;
    };
    // Where rows go and what is summed. Two turns: a rank may be a call ahead of one that still sums.
    const turns = [0, 1].map(() => {
      const landing = this.lanes.map((_, s) => this.bytes(s, tokens * width * rowBytes));
      const pushed = route.sources.map(({ length }) => new BigInt64Array(Math.max(1, length)));
      const summed = route.rankOf.map((ranks, s) => {
        const rows = new BigInt64Array(ranks.length);
        ranks.forEach((rank, hop) => {
          if (rank < 0) return;
          const row = route.rowOf[s]![hop]!, at = landing[s]! + BigInt(hop * rowBytes);
          if (deviceOf[rank] !== deviceOf[s]) pushed[rank]![row] = at;
          rows[hop] = deviceOf[rank] === deviceOf[s] ? y[rank]! + BigInt(row * rowBytes) : at;
        });
        return rows;
      });
      return { to: pushed.map(table), from: summed.map(table) };
    });
    this.use(turns.map(({ to, from }, turn) => [
      ...this.lanes.map((on, d): Command => ({
        op: "scatter",
        on,
        a: y[d]!,
        b: to[d]!,
        n: route.sources[d]!.length,
        m: [rowBytes, 0],
        k: [1, 65535],
      })),
      ...this.meet(turn),
      ...this.lanes.map((on, s): Command => ({
        op: "reduce",
        on,
        a: this.result[s]!,
        b: from[s]!,
        c: weights?.[s]?.address ?? 0n,
        n: tokens,
        m: rowBytes,
        k: width,
      })),
    ]));
  }
}

/** Copies between devices, of one kind. */
export class LinkCopies extends Work {
  /**
   * `pairs`: from which rank to which; those of a rank run one after another. `by`: the driver, or a kernel of `blocks` blocks that
   * runs where the bytes are (push) or where they go (pull).
   */
  constructor(
    work: Pick<NaiveWork, "library" | "stage">,
    { pairs, by, bytes, blocks }: {
      pairs: readonly (readonly [from: number, to: number])[];
      by: "memcpy" | "push" | "pull";
      bytes: number;
      blocks: number;
    },
  ) {
    super(work);
    const sides = this.lanes.map((_, r) => [this.bytes(r, bytes), this.bytes(r, bytes)] as const);
    this.use([pairs.map(([from, to]): Command => ({
      op: by === "memcpy" ? "copy" : "stream",
      on: this.lanes[by === "pull" ? to : from]!,
      a: sides[to]![1],
      b: sides[from]![0],
      n: bytes,
      k: blocks,
    }))]);
  }
}
