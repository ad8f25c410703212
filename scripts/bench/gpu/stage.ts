/**
 * The ranks of the bench with what they send: buffers for the largest world, rows on the host and on the device.
 *
 * In: options, the worlds to come. Out: payloads, routings on the device, and the calls of all ranks. Called by the phases. All
 * worlds send the same rows, the smaller ones their first. FP8 rows and their scales are the same bytes seen otherwise: a
 * dispatch does not look into them.
 */
import { type DispatchOptions, type DispatchResult, type Payload, Tensor } from "../../../mod.ts";
import type { DispatchHandle } from "../../../mod.ts";
import { bytesOf } from "../../../lib/dtype.ts";
import type { BenchOptions } from "../options.ts";
import { type Lane, Ranks } from "../ranks.ts";
import { randomRows } from "../world.ts";
import type { Route, Routing } from "./routes.ts";

/** Rows that a dispatch carries. */
export interface Rows {
  readonly dtype: "bf16" | "fp8";
  /** Payload bytes of a row, then bytes of its scales if there are any. */
  readonly partBytes: readonly number[];
  /** The first `tokens` rows of a rank. */
  payload(rank: number, tokens: number): Payload;
  /** Where part `part` of a rank's rows begins. */
  address(rank: number, part: number): bigint;
  /** The same on the host. */
  bytes(rank: number, part: number, token: number): Uint8Array;
}

/** A routing on the device. */
export interface Loaded {
  readonly routing: Routing;
  readonly topkIdx: readonly Tensor<"i32">[];
  readonly topkWeights: readonly Tensor<"f32">[];
}

/** What a stage is made for. */
export interface StageShape {
  readonly numRanks: number;
  /** Tokens that each rank has. */
  readonly tokens: number;
  /** Rows that each rank can receive in normal mode. */
  readonly rows: number;
  readonly numSlots?: number;
  /** For low-latency mode instead of normal mode. */
  readonly lowLatency?: boolean;
  readonly maskOnTimeout?: boolean;
}

const hostRows: Uint16Array[] = [];

/** Rows of a rank on the host, made once. */
function rowsOf(rank: number, count: number): Uint16Array {
  if ((hostRows[rank]?.length ?? 0) < count) hostRows[rank] = randomRows(count, 1000 + rank);
  return hostRows[rank]!.subarray(0, count);
}

/** Ranks, rows and outputs. */
export class Stage implements AsyncDisposable {
  readonly options: BenchOptions;
  readonly ranks: Ranks;
  readonly hidden: number;
  /** Rows that each rank has. */
  readonly tokens: number;
  /** bf16 `[tokens, hidden]` of each rank. */
  readonly x: readonly Tensor<"bf16">[];
  readonly out: readonly Tensor<"bf16">[];
  readonly #values: readonly Uint16Array[];
  #held: DispatchResult<Payload>[] = [];

  private constructor(options: BenchOptions, ranks: Ranks, tokens: number) {
    this.options = options;
    this.ranks = ranks;
    this.tokens = tokens;
    const hidden = this.hidden = options.hidden;
    this.#values = ranks.buffers.map((_, r) => rowsOf(r, tokens * hidden));
    this.x = ranks.buffers.map((b, r) => b.tensor("bf16", [tokens, hidden], this.#values[r]!));
    this.out = ranks.buffers.map((b) => b.tensor("bf16", [tokens, hidden]));
  }

  /** Ranks of such a shape. */
  static async create(
    options: BenchOptions,
    { numRanks, tokens, rows, numSlots = 2, lowLatency = false, maskOnTimeout = false }: StageShape,
  ): Promise<Stage> {
    const ranks = await Ranks.create(numRanks, { ...options, numSms: 0 }, {
      hidden: options.hidden,
      numExperts: options.experts,
      numTopk: options.topk,
      ...(lowLatency
        ? { maxTokensPerRank: 1, maxLowLatencyTokensPerRank: tokens }
        : { maxTokensPerRank: tokens, maxRecvTokens: rows }),
      numSlots,
      maskOnTimeout,
      timeoutMs: 10_000,
    });
    const stage = new Stage(options, ranks, tokens);
    await ranks.rest();
    return stage;
  }

  get numRanks(): number {
    return this.ranks.buffers.length;
  }

  /** The communication streams. */
  get lanes(): Lane[] {
    return this.ranks.lanes;
  }
  /** The buffers' own streams: graphs are captured and replayed there, and the naive way runs there. */
  get ownLanes(): Lane[] {
    return this.ranks.buffers.map((buffer) => ({ buffer, stream: buffer.stream }));
  }
  /** bf16 rows as they are, or FP8 rows with a scale for each 128 channels. */
  rows(dtype: "bf16" | "fp8"): Rows {
    const { hidden, tokens, x } = this, values = this.#values;
    const numScales = Math.floor(hidden / 128), scalesAt = tokens * hidden; // the second half of the bytes of x
    if (dtype === "fp8" && numScales > 0) {
      const partBytes = [hidden, 4 * numScales];
      const begin = [0, scalesAt];
      return {
        dtype,
        partBytes,
        payload: (rank, n) => ({
          data: Tensor.from(x[rank]!.address, "f8e4m3", [n, hidden]),
          scales: Tensor.from(x[rank]!.address + BigInt(scalesAt), "f32", [n, numScales]),
        }),
        address: (rank, part) => x[rank]!.address + BigInt(begin[part]!),
        bytes: (rank, part, token) => {
          const at = begin[part]! + token * partBytes[part]!;
          return bytesOf(values[rank]!).subarray(at, at + partBytes[part]!);
        },
      };
    }
    return {
      dtype: "bf16",
      partBytes: [2 * hidden],
      payload: (rank, n) => x[rank]!.slice(0, n),
      address: (rank) => x[rank]!.address,
      bytes: (rank, _, token) => bytesOf(values[rank]!).subarray(token * 2 * hidden, (token + 1) * 2 * hidden),
    };
  }

  /** A row of x on the host. */
  value(rank: number, token: number): Uint16Array {
    return this.#values[rank]!.subarray(token * this.hidden, (token + 1) * this.hidden);
  }

  /** Puts a routing on the device. */
  load(routing: Routing): Loaded {
    const shape = [routing.tokens, routing.topk];
    return {
      routing,
      topkIdx: this.ranks.buffers.map((b, r) => b.tensor("i32", shape, routing.topkIdx[r]!)),
      topkWeights: this.ranks.buffers.map((b, r) => b.tensor("f32", shape, routing.topkWeights[r]!)),
    };
  }

  /** Dispatches on every rank. `of` gives a rank's options. */
  dispatchAll(rows: Rows, tokens: number, of: (rank: number) => DispatchOptions): Promise<DispatchResult<Payload>[]> {
    return Promise.all(this.ranks.buffers.map((b, r) => b.dispatch(rows.payload(r, tokens), of(r))));
  }

  /** Routes and dispatches on every rank; the host waits for the counts. */
  async route(loaded: Loaded, rows: Rows, layout: "rank" | "expert" = "rank"): Promise<DispatchResult<Payload>[]> {
    const { topkIdx, topkWeights, routing } = loaded;
    const results = await this.dispatchAll(
      rows,
      routing.tokens,
      (r) => ({ topkIdx: topkIdx[r]!, topkWeights: topkWeights[r]!, layout }),
    );
    return this.noted(results);
  }

  /** Notes results, so that their slots can be given back when a check fails. */
  noted(results: DispatchResult<Payload>[]): DispatchResult<Payload>[] {
    this.#held = [...this.#held.filter(({ released }) => !released), ...results];
    return results;
  }

  /** Gives back what a failed check left. */
  dropResults(): void {
    for (const result of this.#held) if (!result.released) result.release();
    this.#held = [];
  }

  /** Whether it can be used: no call failed half-way, every slot is free. */
  get usable(): boolean {
    return this.ranks.buffers.every((buffer) => {
      const { failed, free_slots } = buffer.core.info();
      return failed === 0 && free_slots === 2 ** buffer.options.numSlots - 1;
    });
  }

  /** Handles of a routing that outlive their results. */
  async handles(loaded: Loaded, layout: "rank" | "expert" = "rank"): Promise<DispatchHandle[]> {
    const results = await this.route(loaded, this.rows("bf16"), layout);
    const handles = results.map(({ handle }) => handle.keep());
    for (const result of results) result.release();
    return handles;
  }

  /** Which row of x stands in row `row` of the expert outputs of `rank`. */
  outputSource(rank: number, row: number, shift: number): { rank: number; token: number } {
    return { rank: (rank + shift + Math.floor(row / this.tokens)) % this.numRanks, token: row % this.tokens };
  }

  /** Fills expert outputs of a rank with rows that differ from those of other ranks and other `shift`s. */
  fillOutput(rank: number, y: Tensor, rows: number, shift: number): void {
    const { buffers } = this.ranks, rowBytes = 2 * this.hidden;
    for (let at = 0; at < rows; at += this.tokens) {
      const source = this.outputSource(rank, at, shift).rank, count = Math.min(this.tokens, rows - at);
      const { core, stream } = buffers[rank]!;
      core.copy(y.address + BigInt(at * rowBytes), this.x[source]!.address, count * rowBytes, stream);
    }
  }

  /**
   * Addresses of the rows that each token's hops are in, u64 `[tokens, width]` as an i64 tensor, for one base after another;
   * `base(rank)` has row 0, the rows are `rowBytes` apart.
   */
  addresses(
    route: Route,
    source: number,
    bases: readonly { base: (rank: number) => bigint; rowBytes: number }[],
    rowOf: (hop: number) => number = (hop) => route.rowOf[source]![hop]!,
  ): Tensor<"i64"> {
    const ranks = route.rankOf[source]!, words = new BigInt64Array(ranks.length * bases.length);
    bases.forEach(({ base, rowBytes }, part) => {
      const first = this.ranks.buffers.map((_, r) => base(r));
      ranks.forEach((rank, hop) => {
        if (rank >= 0) words[part * ranks.length + hop] = first[rank]! + BigInt(rowOf(hop) * rowBytes);
      });
    });
    return this.ranks.buffers[source]!.tensor("i64", [words.length], words);
  }

  /** Ends. A buffer that hangs is left behind. */
  async [Symbol.asyncDispose](): Promise<void> {
    for (const tensor of [...this.x, ...this.out]) tensor.release();
    await this.ranks[Symbol.asyncDispose]();
  }
}

/** Releases a routing. */
export function unload({ topkIdx, topkWeights }: Loaded): void {
  for (const tensor of [...topkIdx, ...topkWeights]) tensor.release();
}
