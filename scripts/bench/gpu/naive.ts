/**
 * The naive way on a GPU: rows are permuted into a send buffer, one memcpy per peer brings them over, and what has come is
 * unpermuted or summed.
 *
 * In: a stage, a routing. Out: chains and graphs that do a dispatch's or a combine's work, and comparisons on the device. Called by
 * the phases. Kinder than life: the counts are known, all index lists are on the device, nobody says beforehand that memory is
 * free, and the ranks meet by events of one process, once a call. Each rank has a stream, as the library's ranks have.
 */
import type { Tensor } from "../../../mod.ts";
import type { Lane } from "../ranks.ts";
import type { Chain } from "../timing.ts";
import type { Verifier } from "../verify.ts";
import { type Command, type NaiveLibrary, Program } from "./naive_library.ts";
import type { Route } from "./routes.ts";
import type { Loaded, Rows, Stage } from "./stage.ts";

/** What a naive way is made of. */
export interface NaiveWork {
  readonly library: NaiveLibrary;
  readonly stage: Stage;
  readonly loaded: Loaded;
  readonly route: Route;
}

/** Commands, and the memory that they use. */
class Work implements Disposable {
  readonly library: NaiveLibrary;
  readonly stage: Stage;
  protected readonly lanes: readonly Lane[];
  protected readonly owned: Tensor[] = [];
  #steps: readonly (readonly Command[])[] = [];
  #programs: Program[] = [];
  #graphs: bigint[] = [];
  #turn = 0;
  #callsPerStep = 1;

  constructor({ library, stage }: Pick<NaiveWork, "library" | "stage">) {
    this.library = library;
    this.stage = stage;
    this.lanes = stage.ownLanes;
  }

  /** The steps, taken in turns. */
  protected use(steps: readonly (readonly Command[])[]): void {
    this.#steps = steps;
    this.#programs = steps.map((commands) => new Program(commands));
    this.#callsPerStep = Math.ceil(steps[0]!.length / this.lanes.length); // what a stream takes
  }

  /** Memory that what was computed must overwrite. */
  protected bytes(rank: number, count: number): bigint {
    const buffer = this.stage.ranks.buffers[rank]!, tensor = buffer.tensor("u8", [Math.max(16, count)]);
    buffer.fill(tensor, 0xa5);
    this.owned.push(tensor);
    return tensor.address;
  }

  protected indices(rank: number, values: Int32Array): bigint {
    const tensor = this.stage.ranks.buffers[rank]!.tensor("i32", [values.length], values);
    this.owned.push(tensor);
    return tensor.address;
  }

  /** Every rank waits for every other's present work. */
  protected meet(turn: number): Command[] {
    const event = (rank: number): number => turn % 2 * 16 + rank;
    return [
      ...this.lanes.map((on, r): Command => ({ op: "record", on, n: event(r) })),
      ...this.lanes.flatMap((on, r) =>
        this.lanes.flatMap((_, peer): Command[] => peer === r ? [] : [{ op: "wait", on, n: event(peer) }])
      ),
    ];
  }

  /** One step a call. */
  get chain(): Chain {
    return {
      lanes: this.lanes,
      callsPerStep: this.#callsPerStep,
      step: () => this.library.run(this.#programs[this.#turn++ % this.#programs.length]!),
    };
  }

  /** `calls` calls, captured as one graph of all ranks. */
  graph(calls: number): Chain {
    const [lane] = this.lanes;
    const commands = Array.from({ length: calls }, (_, i) => this.#steps[i % this.#steps.length]!).flat();
    const graph = this.library.capture(new Program(commands));
    this.#graphs.push(graph);
    return { lanes: [lane!], calls, callsPerStep: 50, step: () => this.library.replay(graph, lane!) };
  }

  /** Runs one step and waits for its end. */
  async once(): Promise<void> {
    await this.stage.ranks.rest();
    this.#turn = 0;
    this.library.run(this.#programs[this.#turn++]!);
    await Promise.all(this.lanes.map(({ buffer, stream }) => buffer.record(stream)));
  }

  /** Gives the memory back. Nothing may run. */
  [Symbol.dispose](): void {
    for (const graph of this.#graphs) this.library.free(graph);
    for (const tensor of this.owned) tensor.release();
    this.owned.length = 0;
  }
}

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

/** A ceiling of combines: one kernel a rank that sums rows where they lie, without a word between the ranks. */
export class PlainPull extends Work {
  readonly #result: readonly bigint[];
  readonly #bytes: number;

  /** `y`, `weights`: as of {@linkcode NaiveCombine}. */
  constructor(work: NaiveWork, y: readonly bigint[], weights?: readonly Tensor[]) {
    super(work);
    const { stage, loaded: { routing }, route } = work, rowBytes = 2 * stage.hidden;
    this.#bytes = routing.tokens * rowBytes;
    this.#result = this.lanes.map((_, s) => this.bytes(s, this.#bytes));
    this.use([this.lanes.map((on, s): Command => {
      const table = stage.addresses(route, s, [{ base: (rank) => y[rank]!, rowBytes }]);
      this.owned.push(table);
      const [a, b, c] = [this.#result[s]!, table.address, weights?.[s]?.address ?? 0n];
      return { op: "reduce", on, a, b, c, n: routing.tokens, m: rowBytes, k: route.width };
    })]);
  }

  /** Compares every byte with the naive way's. */
  async compare(what: string, verifier: Verifier, naive: NaiveCombine): Promise<void> {
    const pairs = this.#result.map((a, rank) => ({ rank, a, b: naive.result[rank]!, bytes: this.#bytes }));
    await compareAll(this, what, verifier, pairs);
  }
}

/**
 * The other way of a combine between devices: one kernel a rank that pushes rows to where their owner is, and one that sums them
 * there. Rows of the same device are summed where they lie. The ranks meet once, by events.
 */
export class PlainPush extends Work {
  readonly #result: readonly bigint[];
  readonly #bytes: number;

  /** `y`, `weights`: as of {@linkcode NaiveCombine}. */
  constructor(work: NaiveWork, y: readonly bigint[], weights?: readonly Tensor[]) {
    super(work);
    const { stage, loaded: { routing: { tokens } }, route } = work, { width } = route, rowBytes = 2 * stage.hidden;
    const { buffers } = stage.ranks, deviceOf = buffers.map(({ deviceIndex }) => deviceIndex);
    this.#bytes = tokens * rowBytes;
    this.#result = this.lanes.map((_, s) => this.bytes(s, this.#bytes));
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
        a: this.#result[s]!,
        b: from[s]!,
        c: weights?.[s]?.address ?? 0n,
        n: tokens,
        m: rowBytes,
        k: width,
      })),
    ]));
  }

  /** Compares every byte with the naive way's. */
  async compare(what: string, verifier: Verifier, naive: NaiveCombine): Promise<void> {
    const pairs = this.#result.map((a, rank) => ({ rank, a, b: naive.result[rank]!, bytes: this.#bytes }));
    await compareAll(this, what, verifier, pairs);
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

/** Arithmetic on every rank that stands for experts; chains add it to their streams. */
export class StandIn extends Work {
  readonly #out: readonly bigint[];

  constructor(work: Pick<NaiveWork, "library" | "stage">) {
    super(work);
    this.#out = this.lanes.map((_, s) => this.bytes(s, 16));
  }

  /** A program of `blocks` blocks on a stream of a rank, which take as long as `steps` do. */
  program(rank: number, on: Lane, { blocks, steps }: { blocks: number; steps: number }): Program {
    return new Program([{ op: "work", on, a: this.#out[rank]!, n: blocks, m: steps }]);
  }
}

/** Compares pairs of memory on the device. */
async function compareAll(
  { library, stage }: Work,
  what: string,
  verifier: Verifier,
  pairs: readonly { rank: number; a: bigint; b: bigint; bytes: number }[],
): Promise<void> {
  const [on] = stage.ownLanes as [Lane], { buffer, stream } = on;
  await stage.ranks.rest();
  using counters = buffer.tensor("i64", [pairs.length], new BigInt64Array(pairs.length), { stream });
  const commands = pairs.map(({ a, b, bytes }, i): Command => ({
    op: "compare",
    on,
    a,
    b,
    c: counters.address + BigInt(8 * i),
    n: bytes,
  }));
  library.run(new Program(commands));
  const differ = await counters.read({ stream });
  verifier.same(`${what}: 16-byte words that differ from the naive way's`, differ, new BigInt64Array(pairs.length));
}
