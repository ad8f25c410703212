/**
 * The naive way on a GPU: rows are permuted into a send buffer, one memcpy per peer brings them over, and what has come is
 * unpermuted or summed.
 *
 * In: a stage, a routing. Out: chains and graphs that do a dispatch's or a combine's work, and comparisons on the device. Called by
 * the phases. Kinder than life: the counts are known, all index lists are on the device, nobody says beforehand that memory is
 * free, and the ranks meet by events of one process, once a call. Each rank has a stream, as the library's ranks have.
 */
import type { Tensor } from "../../../mod.ts";
import type { Verifier } from "../verify.ts";
import type { Command } from "./naive_library.ts";
import type { Route } from "./routes.ts";
import type { Rows } from "./stage.ts";
import { compareAll, type NaiveWork, Work } from "./work.ts";

/** Rows that source `s` sends to rank `d`, in the order that they have there. */
function sent(route: Route, tokens: number): number[][][] {
  const ranks = route.sources.length;
  const out = Array.from({ length: ranks }, () => Array.from({ length: ranks }, (): number[] => []));
  route.sources.forEach((sources, d) =>
    sources.forEach((source) => out[Math.floor(source / tokens)]![d]!.push(source % tokens))
  );
  return out;
}

/** The naive dispatch. */
export class NaiveDispatch extends Work {
  /** Where each rank's rows are in the end, by part. */
  readonly result: readonly (readonly bigint[])[];
  readonly #rows: Rows;
  readonly #route: Route;

  constructor(work: NaiveWork, rows: Rows) {
    super(work);
    const { loaded: { routing }, route } = work, { ranks, tokens } = routing;
    this.#rows = rows;
    this.#route = route;
    const lists = sent(route, tokens);
    const staged = route.layout === "expert"; // rows of a source are not together at the receiver
    const send = lists.map((ofSource, s) => {
      const index = this.indices(s, Int32Array.from(ofSource.flat()));
      const count = ofSource.reduce((n, list) => n + list.length, 0);
      return { index, count, parts: rows.partBytes.map((bytes) => this.bytes(s, count * bytes)) };
    });
    const take = (): bigint[][] =>
      route.sources.map((sources, d) => rows.partBytes.map((bytes) => this.bytes(d, sources.length * bytes)));
    const result = this.result = take();
    // A sender may be a call ahead of a receiver that still unpermutes.
    const received = staged ? [take(), take()] : [result];
    const places = staged ? route.sources.map((_, d) => this.indices(d, unpermuted(route, d, tokens))) : [];
    this.use([0, 1].map((turn) => {
      const to = received[turn % received.length]!;
      const pack = this.lanes.flatMap((on, s) =>
        rows.partBytes.map((m, p): Command => ({
          op: "gather",
          on,
          a: send[s]!.parts[p]!,
          b: rows.address(s, p),
          c: send[s]!.index,
          n: send[s]!.count,
          m,
        }))
      );
      const copies = this.lanes.flatMap((on, s) =>
        Array.from({ length: ranks }, (_, i) => (s + i) % ranks).flatMap((d) =>
          rows.partBytes.flatMap((bytes, p): Command[] => {
            const count = lists[s]![d]!.length;
            if (count === 0) return [];
            const from = lists[s]!.slice(0, d).reduce((n, list) => n + list.length, 0);
            const at = lists.slice(0, s).reduce((n, ofSource) => n + ofSource[d]!.length, 0);
            const a = to[d]![p]! + BigInt(at * bytes), b = send[s]!.parts[p]! + BigInt(from * bytes);
            return [{ op: "copy", on, a, b, n: count * bytes }];
          })
        )
      );
      const unpack = places.flatMap((c, d) =>
        rows.partBytes.map((m, p): Command => ({
          op: "gather",
          on: this.lanes[d]!,
          a: result[d]![p]!,
          b: to[d]![p]!,
          c,
          n: route.sources[d]!.length,
          m,
        }))
      );
      return [...pack, ...copies, ...this.meet(turn), ...unpack];
    }));
  }

  /** Compares every byte of a low-latency dispatch's rows with the naive way's in expert layout. */
  async compareExperts(what: string, verifier: Verifier, got: readonly MaskedRows[]): Promise<void> {
    const [rowBytes = 0] = this.#rows.partBytes;
    const pairs = got.flatMap(({ x, count, begins }, rank) =>
      [...count.keys()].filter((e) => count[e]! > 0).map((e) => ({
        rank,
        a: x.slice(e, e + 1).address,
        b: this.result[rank]![0]! + BigInt(begins[e]! * rowBytes),
        bytes: count[e]! * rowBytes,
      }))
    );
    await compareAll(this, what, verifier, pairs);
  }

  /** Compares every byte of a dispatch's rows with the naive way's. */
  async compare(what: string, verifier: Verifier, got: readonly (readonly Tensor[])[]): Promise<void> {
    await compareAll(
      this,
      what,
      verifier,
      got.flatMap((parts, d) =>
        parts.map((part, p) => ({
          rank: d,
          a: part.address,
          b: this.result[d]![p]!,
          bytes: this.#route.sources[d]!.length * this.#rows.partBytes[p]!,
        }))
      ),
    );
  }
}

/** The rows of a rank in low-latency mode: `x` has room for as many of each expert. */
export interface MaskedRows {
  readonly x: Tensor;
  /** Rows of each expert, and where they begin when they stand one expert after another. */
  readonly count: Int32Array;
  readonly begins: readonly number[];
}

/** For each row of rank d, where it stands when the sources' rows come one source after another. */
function unpermuted(route: Route, d: number, tokens: number): Int32Array {
  const sources = route.sources[d]!, ranks = route.sources.length;
  const next = new Array<number>(ranks).fill(0);
  for (const source of sources) next[Math.floor(source / tokens)]! += 1;
  let at = 0;
  for (let s = 0; s < ranks; s++) {
    const count = next[s]!;
    next[s] = at;
    at += count;
  }
  return sources.map((source) => next[Math.floor(source / tokens)]!++);
}

/** The naive combine: rows come back by a memcpy per peer and are summed, with weights where there are any. */
export class NaiveCombine extends Work {
  /** bf16 `[tokens, hidden]` of each rank. */
  readonly result: readonly bigint[];
  readonly #bytes: number;

  /** `y`: expert outputs of each rank. `weights`: f32 `[tokens, width]` of each rank. */
  constructor(work: NaiveWork, y: readonly bigint[], weights?: readonly Tensor[]) {
    super(work);
    const { stage, loaded: { routing }, route } = work, { ranks, tokens } = routing, rowBytes = 2 * stage.hidden;
    const lists = sent(route, tokens);
    const staged = route.layout === "expert";
    const total = (list: readonly (readonly number[])[]): number => list.reduce((n, { length }) => n + length, 0);
    const packed = staged
      ? [0, 1].map(() => route.sources.map(({ length }, d) => this.bytes(d, length * rowBytes)))
      : [];
    // Row i of the packed ones is the one that stands at packIndex[i].
    const packIndex = staged
      ? route.sources.map((_, d) => {
        const place = unpermuted(route, d, tokens), index = new Int32Array(place.length);
        place.forEach((to, row) => index[to] = row);
        return this.indices(d, index);
      })
      : [];
    const back = lists.map((ofSource, s) => this.bytes(s, total(ofSource) * rowBytes));
    this.result = this.lanes.map((_, s) => this.bytes(s, tokens * rowBytes));
    this.#bytes = tokens * rowBytes;
    const fromAt = (d: number, s: number): number =>
      lists.slice(0, s).reduce((n, ofSource) => n + ofSource[d]!.length, 0);
    const tables = this.lanes.map((_, s) => {
      const places = route.sources.map((_, d) => staged ? unpermuted(route, d, tokens) : undefined);
      const begins = route.sources.map((_, d) => total(lists[s]!.slice(0, d)) - fromAt(d, s));
      const { rankOf, rowOf } = route;
      const table = stage.addresses(route, s, [{ base: () => back[s]!, rowBytes }], (hop) => {
        const d = rankOf[s]![hop]!, row = rowOf[s]![hop]!;
        return begins[d]! + (places[d]?.[row] ?? row);
      });
      this.owned.push(table);
      return table.address;
    });
    this.use([0, 1].map((turn) => {
      const pack = packIndex.map((c, d): Command => ({
        op: "gather",
        on: this.lanes[d]!,
        a: packed[turn]![d]!,
        b: y[d]!,
        c,
        n: route.sources[d]!.length,
        m: rowBytes,
      }));
      const copies = this.lanes.flatMap((on, s) =>
        Array.from({ length: ranks }, (_, i) => (s + i) % ranks).flatMap((d): Command[] => {
          const count = lists[s]![d]!.length;
          if (count === 0) return [];
          const a = back[s]! + BigInt(total(lists[s]!.slice(0, d)) * rowBytes);
          const b = (staged ? packed[turn]! : y)[d]! + BigInt(fromAt(d, s) * rowBytes);
          return [{ op: "copy", on, a, b, n: count * rowBytes }];
        })
      );
      const sums = this.lanes.map((on, s): Command => ({
        op: "reduce",
        on,
        a: this.result[s]!,
        b: tables[s]!,
        c: weights?.[s]?.address ?? 0n,
        n: tokens,
        m: rowBytes,
        k: route.width,
      }));
      return [...pack, ...this.meet(turn), ...copies, ...sums];
    }));
  }

  /** Compares every byte of a combine's tokens with the naive way's. */
  async compare(what: string, verifier: Verifier, out: readonly Tensor[]): Promise<void> {
    const pairs = out.map(({ address }, r) => ({ rank: r, a: address, b: this.result[r]!, bytes: this.#bytes }));
    await compareAll(this, what, verifier, pairs);
  }
}
