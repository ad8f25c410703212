/**
 * The naive way: permute, one copy per peer, unpermute, with the library's own primitives.
 *
 * In: a world, the rows of each rank. Out: a chain that moves them as an all-to-all would: rows are permuted into send
 * buffers that are contiguous per peer, one copy per peer brings them over, one barrier makes them known. In rank layout they
 * land in their final order by themselves; in expert layout the receiver expands them to a row an expert. Called by the ops.
 *
 * Permuting is done by a buffer of one rank whose "experts" are the peers: its dispatch in expert layout is exactly a permute,
 * in the same C++ (or CUDA) as the contender's rows are moved by, with the routing cached. Kinder than life: nothing is
 * counted, nobody says beforehand that memory is free (receive buffers alternate), everything is ready in advance.
 */
import { EpBuffer, Group, type Payload, type ScaledRows, type Tensor } from "../../mod.ts";
import type { DispatchHandle, DispatchResult } from "../../mod.ts";
import type { BenchOptions } from "./options.ts";
import { foreign, type Lane, type Ranks } from "./ranks.ts";
import type { Chain } from "./timing.ts";
import { begins, type BenchWorld, receivedTopkIdx, sourceBegins } from "./world.ts";

/** A buffer of one rank, a routing to its "experts", and a cached handle that permutes by it. */
export class Permuter implements AsyncDisposable {
  readonly buffer: EpBuffer;
  readonly handle: DispatchHandle;
  /** The first dispatch, still held: its slot has the expert-output region that naive combine reduces from. */
  readonly held: DispatchResult;

  private constructor(buffer: EpBuffer, held: DispatchResult) {
    this.buffer = buffer;
    this.held = held;
    this.handle = held.handle.keep();
  }

  /** `bins`: i32 [tokens, width], which bin each copy of a row goes to, -1 = none. */
  static async create(o: BenchOptions, shape: {
    bins: Int32Array;
    width: number;
    numBins: number;
    hidden: number;
    rows: Payload;
  }): Promise<Permuter> {
    const { bins, width, numBins, hidden, rows } = shape;
    const tokens = bins.length / width;
    const [group] = Group.local(1);
    const buffer = await EpBuffer.create(group!, {
      backend: o.backend,
      ...(o.library === undefined ? {} : { library: o.library }),
      hidden,
      numExperts: numBins,
      numTopk: width,
      maxTokensPerRank: Math.max(1, tokens),
      maxRecvTokens: Math.max(1, bins.length),
      numSlots: 3,
    });
    using topkIdx = buffer.tensor("i32", [tokens, width], bins);
    return new Permuter(buffer, await buffer.dispatch(rows, { topkIdx, layout: "expert" }));
  }

  get lane(): Lane {
    return { buffer: this.buffer, stream: this.buffer.commStream };
  }

  /** Enqueues a permute of `rows`. `after`: the stream that it begins after, and that goes on after it. */
  permute(rows: Payload, after: Lane = this.lane): Promise<DispatchResult> {
    return this.buffer.dispatch(rows, { handle: this.handle, stream: after.stream });
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.held.release();
    this.handle.release();
    await this.buffer.close();
  }
}

/** The parts of a payload: payload and, if there are any, scales. */
export const partsOf = (x: Payload): Tensor[] => "data" in x ? [x.data, x.scales] : [x];

const rowBytesOf = (tensor: Tensor): number => tensor.byteLength / Math.max(1, tensor.shape[0]!);

/** The naive dispatch. */
export class NaiveDispatch implements AsyncDisposable {
  readonly #ranks: Ranks;
  readonly #world: BenchWorld;
  readonly #rows: readonly Payload[];
  readonly #senders: readonly Permuter[];
  readonly #expanders: readonly Permuter[];
  /** Receive buffers [turn][rank]: two, since a peer may be a call ahead. */
  readonly #received: readonly (readonly Payload[])[];
  #turn = 0;
  #last: DispatchResult[] = [];

  private constructor(
    ranks: Ranks,
    world: BenchWorld,
    rows: readonly Payload[],
    parts: { senders: Permuter[]; expanders: Permuter[]; received: Payload[][] },
  ) {
    this.#ranks = ranks;
    this.#world = world;
    this.#rows = rows;
    this.#senders = parts.senders;
    this.#expanders = parts.expanders;
    this.#received = parts.received;
  }

  /** `rows`: what each rank sends. `expand`: the receiver makes a row an expert, in expert layout. */
  static async create(
    o: BenchOptions,
    ranks: Ranks,
    world: BenchWorld,
    rows: readonly Payload[],
    expand: boolean,
  ): Promise<NaiveDispatch> {
    const { hidden, destinations, destinationsPerToken: width, rankRows, experts, topk } = world;
    const sent = rows.map((x) => foreignPayload(x));
    const senders = await Promise.all(
      sent.map((x, s) => Permuter.create(o, { bins: destinations[s]!, width, numBins: world.ranks, hidden, rows: x })),
    );
    const received = [0, 1].map(() =>
      ranks.buffers.map((buffer, d) => {
        const [data, scales] = partsOf(rows[d]!).map((part) =>
          buffer.tensor(part.dtype, [rankRows[d]!, part.shape[1]!])
        ) as [Tensor, Tensor?];
        return scales ? { data, scales } satisfies ScaledRows : data;
      })
    );
    const expanders = expand
      ? await Promise.all(received[0]!.map((x, d) =>
        Permuter.create(o, {
          bins: receivedTopkIdx(world, d),
          width: topk,
          numBins: Math.ceil(experts / world.ranks),
          hidden,
          rows: foreignPayload(x),
        })
      ))
      : [];
    await ranks.rest(); // what was written to `rows` is read on other streams
    return new NaiveDispatch(ranks, world, sent, { senders, expanders, received });
  }

  /** The chain. */
  get chain(): Chain {
    const { counts } = this.#world;
    const sendBegins = counts.map(begins), recvBegins = sourceBegins(this.#world);
    return {
      lanes: this.#senders.map((sender) => sender.lane),
      callsPerStep: this.#senders.length * (8 + this.#senders.length),
      step: async () => {
        const received = this.#received[this.#turn ^= 1]!;
        const sent = await Promise.all(this.#senders.map((sender, s) => sender.permute(this.#rows[s]!)));
        sent.forEach((result, s) => {
          const { stream } = this.#senders[s]!.lane, { core } = this.#senders[s]!.buffer;
          for (let i = 0; i < counts.length; i++) {
            const d = (s + i) % counts.length; // not everybody to the same peer at once
            partsOf(received[d]!).forEach((to, part) => {
              const from = partsOf(result.x)[part]!, bytes = rowBytesOf(to);
              if (counts[s]![d] === 0) return;
              const target = to.address + BigInt(recvBegins[d]![s]! * bytes);
              core.copy(target, from.address + BigInt(sendBegins[s]![d]! * bytes), counts[s]![d]! * bytes, stream);
            });
          }
          result.release({ stream });
          this.#ranks.buffers[s]!.barrier({ stream });
        });
        await this.#expand(received);
      },
    };
  }

  async #expand(received: readonly Payload[]): Promise<void> {
    this.#last.forEach((result, d) => result.release({ stream: this.#senders[d]!.lane.stream }));
    this.#last = await Promise.all(
      this.#expanders.map((expander, d) => expander.permute(foreignPayload(received[d]!), this.#senders[d]!.lane)),
    );
  }

  /** What the last step gave to each rank: rows in rank layout, or expanded to expert layout. */
  get result(): readonly Payload[] {
    return this.#expanders.length > 0 ? this.#last.map(({ x }) => x) : this.#received[this.#turn]!;
  }

  /** Releases everything. */
  async [Symbol.asyncDispose](): Promise<void> {
    for (const result of this.#last) result.release();
    await Promise.all([...this.#senders, ...this.#expanders].map((permuter) => permuter[Symbol.asyncDispose]()));
    for (const tensor of this.#received.flat().flatMap(partsOf)) tensor.release();
  }
}

/** The same rows for a buffer that did not make them. */
export function foreignPayload(x: Payload): Payload {
  return "data" in x ? { data: foreign(x.data), scales: foreign(x.scales) } : foreign(x);
}
