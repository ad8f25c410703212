/**
 * Worlds over `EpBuffer`: the driver of the case suite, with ranks in one thread, in workers or in processes.
 *
 * In: options of a world. Out: a `WorldDriver`. Called by cpu_test.ts, worker_test.ts and process_test.ts, and later for other
 * backends.
 */
import { createServer } from "node:net";
import { Group } from "@deepep/deepep";
import type { CombineInput, CombineOutput, DispatchLayout, LowLatencyCombineInput } from "../../lib/reference/mod.ts";
import type { RankInput } from "../../lib/reference/mod.ts";
import { type NewWorld, settleWorld, type WorldDriver, type WorldOptions } from "./driver.ts";
import type { CombineCall, Delay, DispatchCall, Dispatched, LowLatencyCall, LowLatencyCombineCall } from "./driver.ts";
import type { LowLatencyDispatched, Receive } from "./driver.ts";
import type { HostDispatch, HostLowLatency } from "./rank_host.ts";
import { localRank, pooled, processRank, type RankPlace, type RemoteRank, workerRank } from "./transport.ts";

/** The backend under test. */
export type DriverBackend = "cpu" | "cuda";

/** A port that nobody listens on just now. */
export function freePort(): Promise<number> {
  const { promise, resolve, reject } = Promise.withResolvers<number>();
  const server = createServer().once("error", reject).listen(0, "127.0.0.1", () => {
    const { port } = server.address() as { port: number };
    server.close(() => resolve(port));
  });
  return promise;
}

/** Ranks of one thread. */
export const localWorlds = (backend: DriverBackend) => async (options: WorldOptions): Promise<WorldDriver> => {
  const groups = Group.local(options.numRanks);
  const ranks = await Promise.all(groups.map((g) => localRank(g, { ...options, backend })));
  return new BufferDriver(options, ranks);
};

async function farWorld(
  options: WorldOptions,
  backend: DriverBackend,
  start: (place: RankPlace) => Promise<RemoteRank>,
): Promise<WorldDriver> {
  const port = await freePort(), secret = crypto.randomUUID();
  const ranks = await Promise.all(
    Array.from(
      { length: options.numRanks },
      (_, rank) => start({ rank, size: options.numRanks, port, secret, options: { ...options, backend } }),
    ),
  );
  return new BufferDriver(options, ranks);
}

/** Ranks in Web Workers. */
export function workerWorlds(backend: DriverBackend): NewWorld {
  const start = pooled(workerRank);
  return (options) => farWorld(options, backend, start);
}

/** Ranks in processes. */
export function processWorlds(backend: DriverBackend): NewWorld {
  const start = pooled(processRank);
  return (options) => farWorld(options, backend, start);
}

interface Remembered {
  readonly id: number;
  readonly inputs: readonly RankInput[];
  readonly call: DispatchCall;
}

class BufferDriver implements WorldDriver {
  readonly options: WorldOptions;
  readonly #ranks: readonly RemoteRank[];
  readonly #results = new WeakMap<Dispatched | LowLatencyDispatched, Remembered>();
  #masked: readonly number[] = [];
  #nextId = 0;

  constructor(options: WorldOptions, ranks: readonly RemoteRank[]) {
    this.options = options;
    this.#ranks = ranks;
  }

  /** Calls a method on every rank that takes part, without waiting between ranks. */
  #all<T>(method: string, args: (rank: number) => readonly unknown[]): Promise<T[]> {
    return settleWorld(
      this.#ranks.map((host, rank) =>
        (this.#masked.includes(rank) ? Promise.resolve(undefined) : host.call(method, args(rank))) as Promise<T>
      ),
    );
  }

  dispatchLayout(inputs: readonly RankInput[], numTopk: number): Promise<DispatchLayout[]> {
    return this.#all("dispatchLayout", (rank) => [inputs[rank], numTopk]);
  }

  async dispatch(inputs: readonly RankInput[], call: DispatchCall): Promise<Dispatched> {
    const id = this.#nextId++, { cached, ...plain } = call;
    const before = cached && this.#results.get(cached);
    const got = await this.#all<HostDispatch>("dispatch", (rank) => [id, inputs[rank], plain, before?.id ?? -1]);
    const result: Dispatched = {
      ranks: got.map((g) => g?.output),
      scaleStrides: got.map((g) => g?.scaleStrides),
      release: async () => void await this.#all("release", () => [id]),
    };
    this.#results.set(result, { id, inputs, call });
    return result;
  }

  combine(from: Dispatched, inputs: readonly CombineInput[], call: CombineCall): Promise<CombineOutput[]> {
    const { id, inputs: sent, call: { numTopk, layout } } = this.#results.get(from)!;
    const expertLayout = layout === "expert";
    return this.#all(
      "combine",
      (rank) => [id, inputs[rank], call, { numTokens: sent[rank]!.numTokens, numTopk, expertLayout }],
    );
  }

  async lowLatencyDispatch(
    inputs: readonly RankInput[],
    call: LowLatencyCall,
  ): Promise<Receive<LowLatencyDispatched>> {
    const id = this.#nextId++;
    await this.#all("lowLatencySend", (rank) => [id, inputs[rank], call]);
    return async () => {
      const got = await this.#all<HostLowLatency>("lowLatencyReceive", () => [id]);
      const result = {
        ranks: got.map((g) => g?.output),
        scaleStrides: got.map((g) => g?.scaleStrides),
        release: async () => void await this.#all("release", () => [id]),
      };
      this.#results.set(result, { id, inputs, call });
      return result;
    };
  }

  async lowLatencyCombine(
    from: LowLatencyDispatched,
    inputs: readonly LowLatencyCombineInput[],
    call: LowLatencyCombineCall,
  ): Promise<Receive<Uint16Array[]>> {
    const { id } = this.#results.get(from)!;
    await this.#all("lowLatencyCombineSend", (rank) => [id, inputs[rank], call]);
    return () => this.#all("lowLatencyCombineReceive", () => [id]);
  }

  async mask(ranks: readonly number[]): Promise<void> {
    this.#masked = [...this.#masked, ...ranks];
    await this.#all("mask", () => [ranks]);
  }

  async delay(rank: number, delay: Delay): Promise<void> {
    await this.#ranks[rank]!.call("inject", [delay]);
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all(this.#ranks.map((r) => r.close()));
  }
}
