/**
 * Work that the bench gives to the kernels of naive.cu: lists of commands on streams of all ranks.
 *
 * In: a stage, and what subclasses make of it. Out: chains and graphs, memory that goes with them, comparisons on the device. Called by
 * naive.ts and plain_kernels.ts. Each rank has a stream, as the library's ranks have; the ranks meet by events of one process.
 */
import type { Tensor } from "../../../mod.ts";
import type { Lane } from "../ranks.ts";
import type { Chain } from "../timing.ts";
import type { Verifier } from "../verify.ts";
import { type Command, type NaiveLibrary, Program } from "./naive_library.ts";
import type { Route } from "./routes.ts";
import type { Loaded, Stage } from "./stage.ts";

/** What a naive way is made of. */
export interface NaiveWork {
  readonly library: NaiveLibrary;
  readonly stage: Stage;
  readonly loaded: Loaded;
  readonly route: Route;
}
/** Commands, and the memory that they use. */
export class Work implements Disposable {
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
export async function compareAll(
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
