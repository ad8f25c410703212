/**
 * One rank of a world under test: an `EpBuffer`, driven by calls whose arguments and results are plain typed arrays.
 *
 * In: the inputs of this rank. Out: its outputs, in the reference's types. Called directly by the local driver, by messages in
 * a worker (rank_worker.ts) and over pipes in a process (rank_process.ts).
 */
import { EpBuffer, type Group, itemSize, Tensor, type TypedArrayOf } from "@deepep/deepep";
import type { DispatchResult, LowLatencyCombineResult, LowLatencyResult, Payload } from "@deepep/deepep";
import { bytesOf, type DType } from "../../lib/dtype.ts";
import { constants } from "../../lib/ffi/abi.ts";
import { struct } from "../../lib/ffi/struct.ts";
import { localExperts, type ScaleStrides } from "../../lib/layout.ts";
import type { CombineInput, CombineOutput, DispatchLayout, ExpertRows } from "../../lib/reference/mod.ts";
import type { LowLatencyCombineInput, LowLatencyOutput, RankInput, RankOutput } from "../../lib/reference/mod.ts";
import type { CombineCall, Delay, DispatchCall, InputStrides, LowLatencyCall } from "./driver.ts";
import type { LowLatencyCombineCall, WorldOptions } from "./driver.ts";

const injectStruct = struct("deepep_inject_args");
/** Scale elements by their bytes; what they mean does not matter to a dispatch. */
const scaleDtype: Record<number, DType> = { 1: "u8", 2: "bf16", 4: "f32", 8: "i64" };
const upper = (word: string): string => word.replace(/[A-Z]/g, (c) => `_${c}`).toUpperCase();

/** Bytes between the rows and the elements of scales, whose rows are dimension `rows`. */
const stridesOf = ({ strides, dtype }: Tensor, rows: number): ScaleStrides => ({
  row: strides[rows]! * itemSize[dtype],
  elem: strides[rows + 1]! * itemSize[dtype],
});

/** What a low-latency dispatch received, each expert's rows by themselves. */
export async function readLowLatency(recv: LowLatencyResult, stats?: Tensor<"i32">): Promise<HostLowLatency> {
  const [counts, srcInfo] = await Promise.all([recv.count.read(), recv.srcInfo.read()]);
  const maxRows = recv.srcInfo.shape[1]!;
  const { data, scales } = "data" in recv.x ? recv.x : { data: recv.x, scales: undefined };
  const rows = bytesOf(await data.read()), scaleBytes = scales && bytesOf(await scales.read());
  const rowBytes = data.shape[2]! * itemSize[data.dtype];
  const perRow = scales ? scales.shape[2]! * itemSize[scales.dtype] : 0;
  const experts = [...counts].map((n, e): ExpertRows => ({
    x: rows.slice(e * maxRows * rowBytes, (e * maxRows + n) * rowBytes),
    ...(scaleBytes && { scales: scaleBytes.slice(e * maxRows * perRow, (e * maxRows + n) * perRow) }),
    srcInfo: srcInfo.slice(e * maxRows, e * maxRows + n),
  }));
  const output = {
    experts,
    numTokensPerExpert: counts,
    layoutRange: await recv.layoutRange.read(),
    expertStats: stats ? await stats.read() : new Int32Array(counts.length),
  };
  return { output, scaleStrides: scales && stridesOf(scales, 1) };
}

/** Writes expert outputs, each expert's rows at the begin of its part of bf16 [experts, maxRows, hidden]. */
export function writeExpertRows(region: Tensor<"bf16">, experts: readonly Uint16Array[]): void {
  const flat = region.reshape(region.size), perExpert = region.shape[1]! * region.shape[2]!;
  experts.forEach((rows, e) => {
    if (rows.length > 0) flat.slice(e * perExpert, e * perExpert + rows.length).write(rows);
  });
}

/** A call of a host by name, as it travels to workers and processes. */
export type HostCall = {
  [M in keyof RankHost]: RankHost[M] extends (...args: infer A) => unknown ? { method: M; args: A } : never;
}[keyof RankHost];

/** A dispatch as it was received. */
export interface HostDispatch {
  readonly output: RankOutput;
  readonly scaleStrides: ScaleStrides | undefined;
}

/** A low-latency dispatch as it was received; the strides are those of an expert's scales. */
export interface HostLowLatency {
  readonly output: LowLatencyOutput;
  readonly scaleStrides: ScaleStrides | undefined;
}

/** One rank. Results are kept by a number that the driver chooses; -1 is none. */
export class RankHost {
  readonly #buffer: EpBuffer;
  readonly #options: WorldOptions;
  readonly #results = new Map<number, DispatchResult>();
  readonly #lowLatency = new Map<number, LowLatencyResult>();
  readonly #stats = new Map<number, Tensor<"i32">>();
  readonly #combines = new Map<number, { out: LowLatencyCombineResult; uses: Disposable[] }>();
  readonly #garbage: Disposable[] = [];

  private constructor(buffer: EpBuffer, options: WorldOptions) {
    this.#buffer = buffer;
    this.#options = options;
  }

  /** Connects the buffer of this rank. `timeoutMs` bounds every wait, so that a bug is a failure and no hang. */
  static async create(
    group: Group,
    options: WorldOptions & { backend?: "cpu" | "cuda" },
  ): Promise<RankHost> {
    const buffer = await EpBuffer.create(group, { backend: "cpu", timeoutMs: 20_000, ...options });
    return new RankHost(buffer, options);
  }

  #tensor<D extends DType>(dtype: D, shape: readonly number[], data?: TypedArrayOf<D>): Tensor<D> {
    const tensor = this.#buffer.tensor(dtype, shape, data);
    this.#garbage.push(tensor);
    return tensor;
  }

  #collect(): void {
    for (const tensor of this.#garbage.splice(0)) tensor[Symbol.dispose]();
  }

  #topkIdx(input: { topkIdx?: Int32Array | BigInt64Array; numTokens: number }, numTopk: number): Tensor | undefined {
    const { topkIdx, numTokens } = input;
    if (topkIdx === undefined) return undefined;
    const shape = [numTokens, numTopk];
    return topkIdx instanceof Int32Array ? this.#tensor("i32", shape, topkIdx) : this.#tensor("i64", shape, topkIdx);
  }

  #f32(data: Float32Array | undefined, shape: readonly number[]): { tensor: Tensor<"f32"> } | undefined {
    return data && { tensor: this.#tensor("f32", shape, data) };
  }

  /** Rows `gap` bytes apart. */
  #rows(dtype: DType, numTokens: number, data: Uint8Array, rowBytes: number, gap: number): Tensor {
    const columns = rowBytes / itemSize[dtype];
    const wide = new Uint8Array(numTokens * (rowBytes + gap)).fill(0xa5);
    for (let t = 0; t < numTokens; t++) wide.set(data.subarray(t * rowBytes, (t + 1) * rowBytes), t * (rowBytes + gap));
    const whole = this.#tensor("u8", [numTokens, rowBytes + gap], wide);
    const strides = [(rowBytes + gap) / itemSize[dtype], 1];
    return new Tensor(whole.address, dtype, [numTokens, columns], { strides, ...(whole.hold && { hold: whole.hold }) });
  }

  #payload(input: RankInput, strides: InputStrides = {}): Payload {
    const { numTokens, rowBytes, scales, numScales = 0, scaleElemBytes = 0 } = input;
    const plain = rowBytes === 2 * this.#options.hidden && numScales === 0;
    const x = this.#rows(plain ? "bf16" : "u8", numTokens, input.x, rowBytes, strides.rowGap ?? 0);
    if (!scales || numScales === 0) return x;
    // There is no 16-byte dtype: such elements travel as pairs.
    const pair = scaleElemBytes === 16 ? 2 : 1, columns = numScales * pair;
    const dtype = scaleDtype[scaleElemBytes / pair]!, width = scaleElemBytes / pair;
    const gap = strides.scaleGap ?? 0;
    if (!strides.scalesColumnMajor || pair === 2) {
      return { data: x, scales: this.#rows(dtype, numTokens, scales, numScales * scaleElemBytes, gap * width) };
    }
    const columnElems = numTokens + gap;
    const turned = new Uint8Array(columns * columnElems * width).fill(0xa5);
    for (let t = 0; t < numTokens; t++) {
      for (let s = 0; s < columns; s++) {
        const from = (t * columns + s) * width;
        turned.set(scales.subarray(from, from + width), (s * columnElems + t) * width);
      }
    }
    const whole = this.#tensor("u8", [turned.length], turned);
    return {
      data: x,
      scales: new Tensor(whole.address, dtype, [numTokens, columns], {
        strides: [1, Math.max(1, columnElems)],
        ...(whole.hold && { hold: whole.hold }),
      }),
    };
  }

  async dispatchLayout(input: RankInput, numTopk: number): Promise<DispatchLayout> {
    using layout = this.#buffer.getDispatchLayout(this.#topkIdx(input, numTopk)!);
    try {
      return {
        numTokensPerRank: await layout.numTokensPerRank.read(),
        numTokensPerExpert: await layout.numTokensPerExpert.read(),
        isTokenInRank: await layout.isTokenInRank.read(),
      };
    } finally {
      this.#collect();
    }
  }

  async dispatch(id: number, input: RankInput, call: DispatchCall, cached: number): Promise<HostDispatch> {
    const { numTopk, layout, expertAlignment, zeroPadding, noCpuSync, scalesColumnMajor } = call;
    const { numRanks, numExperts } = this.#options;
    const stats = input.expertStats && this.#tensor("i32", [this.#buffer.numLocalExperts], input.expertStats);
    const topkIdx = cached < 0 ? this.#topkIdx(input, numTopk) : undefined;
    const dispatchLayout = input.isTokenInRank && cached < 0 && {
      isTokenInRank: this.#tensor("bool", [input.numTokens, numRanks], input.isTokenInRank),
      ...(input.numTokensPerExpert &&
        { numTokensPerExpert: this.#tensor("i32", [numExperts], input.numTokensPerExpert) }),
    };
    const weights = this.#f32(input.topkWeights, [input.numTokens, numTopk]);
    const handle = cached < 0 ? undefined : this.#results.get(cached)!.handle;
    try {
      const recv = await this.#buffer.dispatch(this.#payload(input, call.inputStrides), {
        ...(topkIdx && { topkIdx }),
        ...(weights && { topkWeights: weights.tensor }),
        ...(dispatchLayout && { dispatchLayout }),
        ...(handle && { handle }),
        ...(layout && { layout }),
        ...(expertAlignment && { expertAlignment }),
        ...(zeroPadding && { zeroPadding }),
        ...(scalesColumnMajor && { scalesColumnMajor }),
        ...(noCpuSync && { cpuSync: false }),
        ...(stats && { expertStats: stats }),
      });
      recv.handle.keep();
      this.#results.set(id, recv);
      return await this.#received(recv, input, call, stats);
    } finally {
      this.#collect();
    }
  }

  async #received(
    recv: DispatchResult,
    input: RankInput,
    call: DispatchCall,
    stats?: Tensor<"i32">,
  ): Promise<HostDispatch> {
    const [numTokens, inUse] = await recv.counts.numRows.read() as unknown as [number, number];
    const numRows = call.layout === "expert" ? inUse : numTokens;
    const { data, scales } = "data" in recv.x ? recv.x : { data: recv.x, scales: undefined };
    const cut = async <D extends DType>(t: Tensor<D>) => await t.slice(0, numRows).read();
    const { numScales = 0 } = input;
    const output: RankOutput = {
      numTokens,
      numRows,
      x: bytesOf(await cut(data)),
      ...(scales && { scales: bytesOf(await cut(scales)) }),
      ...(!scales && input.scales && numScales === 0 && { scales: new Uint8Array(0) }),
      // Without a host count, indices go on with -1 up to the capacity.
      ...(recv.topkIdx &&
        { topkIdx: await (call.noCpuSync ? recv.topkIdx : recv.topkIdx.slice(0, numRows)).read() as Int32Array }),
      ...(recv.topkWeights && { topkWeights: await cut(recv.topkWeights) }),
      srcIdx: await cut(recv.srcIdx),
      numTokensPerExpert: await recv.counts.numTokensPerExpert.read(),
      numTokensPerRank: await recv.counts.numTokensPerRank.read(),
      expertStats: stats ? await stats.read() : new Int32Array(this.#buffer.numLocalExperts),
    };
    return { output, scaleStrides: scales && stridesOf(scales, 0) };
  }

  /** Releases a result; its handle goes on for later cached dispatches and combines. */
  release(id: number): void {
    this.#results.get(id)?.release();
    this.#lowLatency.get(id)?.release();
    this.#lowLatency.delete(id);
  }

  /** Releases what is held, whatever became of it. */
  releaseAll(): void {
    for (const id of [...this.#results.keys(), ...this.#lowLatency.keys()]) this.release(id);
  }

  async combine(
    id: number,
    input: CombineInput,
    call: CombineCall,
    tokens: { numTokens: number; numTopk: number; expertLayout: boolean },
  ): Promise<CombineOutput> {
    const recv = this.#results.get(id)!, { hidden } = call, { numTokens, numTopk } = tokens;
    const rows = input.x.length / hidden;
    // Any other slot: the dispatch's is given back, so that the call has to look for one.
    if (call.anySlot) recv.release();
    let y: Tensor<"bf16">;
    if (call.zeroCopy) {
      const region = recv.handle.expertOutput();
      if (rows > 0) region.reshape(region.size).slice(0, input.x.length).write(input.x);
      y = region;
    } else {
      y = this.#tensor("bf16", [rows, hidden], input.x);
    }
    const bias = [input.bias0, input.bias1].filter((b) => b !== undefined).map((b) =>
      this.#tensor("bf16", [numTokens, hidden], b)
    );
    const back = this.#f32(input.topkWeights, tokens.expertLayout ? [rows] : [rows, numTopk]);
    const weights = this.#f32(input.weights, [numTokens, numTopk]);
    try {
      using out = await this.#buffer.combine(y, recv.handle, {
        ...(back && { topkWeights: back.tensor }),
        ...(weights && { weights: weights.tensor }),
        ...(bias.length > 0 && { bias: bias as [Tensor] }),
      });
      const x = await out.x.read();
      return { x, ...(out.topkWeights && { topkWeights: await out.topkWeights.read() }) };
    } finally {
      this.#collect();
    }
  }

  /** Sends; the stats tensor lives until the receive. Its other tensors are released at once: what was enqueued keeps them. */
  lowLatencySend(id: number, input: RankInput, call: LowLatencyCall): void {
    const { numTopk, fp8, round, ue8m0, scalesColumnMajor, recvHook } = call;
    const stats = input.expertStats && this.#buffer.tensor("i32", [this.#buffer.numLocalExperts], input.expertStats);
    try {
      const recv = this.#buffer.lowLatencyDispatch(this.#payload(input, call.inputStrides), {
        topkIdx: this.#topkIdx(input, numTopk)!,
        fp8: fp8 ?? false,
        ...(round && { roundScale: true }),
        ...(ue8m0 && { useUe8m0: true }),
        scalesColumnMajor: scalesColumnMajor ?? false,
        ...(recvHook && { recvHook }),
        ...(stats && { expertStats: stats }),
      });
      this.#lowLatency.set(id, recv);
      if (stats) this.#stats.set(id, stats);
    } finally {
      this.#collect();
    }
  }

  async lowLatencyReceive(id: number): Promise<HostLowLatency> {
    const recv = this.#lowLatency.get(id)!, stats = this.#stats.get(id);
    try {
      await recv.received();
      return await readLowLatency(recv, stats);
    } catch (error) {
      this.release(id);
      throw error;
    } finally {
      stats?.release();
      this.#stats.delete(id);
    }
  }

  /** Sends expert outputs, each expert's rows at the begin of its region. */
  async lowLatencyCombineSend(id: number, input: LowLatencyCombineInput, call: LowLatencyCombineCall): Promise<void> {
    const recv = this.#lowLatency.get(id)!, { numExperts, numRanks } = this.#options, { hidden } = call;
    const { count } = localExperts(numExperts, numRanks, this.#buffer.rank), maxRows = recv.srcInfo.shape[1]!;
    const region = call.zeroCopy ? recv.handle.expertOutput() : this.#tensor("bf16", [count, maxRows, hidden]);
    writeExpertRows(region, input.x);
    const numTopk = input.numTokens === 0 ? this.#options.numTopk : input.topkIdx.length / input.numTokens;
    const shape = [input.numTokens, numTopk];
    const ones = new Float32Array(input.topkIdx.length).fill(1);
    const topkWeights = this.#tensor("f32", shape, input.topkWeights ?? ones);
    const topkIdx = this.#topkIdx(input, numTopk)!;
    const out = this.#buffer.lowLatencyCombine(region, {
      topkIdx,
      topkWeights,
      handle: recv.handle,
      ...(call.recvHook && { recvHook: true }),
      ...(call.fp8 && { fp8: true }),
    });
    // The receiving half reads the routing and the weights: they stay until then.
    this.#combines.set(id, { out, uses: this.#garbage.splice(0) });
    await Promise.resolve();
  }

  async lowLatencyCombineReceive(id: number): Promise<Uint16Array> {
    const { out, uses } = this.#combines.get(id)!;
    this.#combines.delete(id);
    try {
      await out.received();
      return await out.x.read();
    } finally {
      out[Symbol.dispose]();
      for (const tensor of uses) tensor[Symbol.dispose]();
    }
  }

  mask(ranks: readonly number[]): void {
    for (const rank of ranks) if (rank !== this.#buffer.rank) this.#buffer.maskRank(rank);
  }

  inject({ op, phase, delayUs = 0, action = "delay" }: Delay): void {
    injectStruct.pack({
      op: constants.OP[upper(op) as keyof typeof constants.OP][0],
      phase: constants.PHASE[upper(phase) as keyof typeof constants.PHASE][0],
      action: constants.INJECT[upper(action) as keyof typeof constants.INJECT][0],
      delay_us: delayUs,
      count: 1,
    });
    this.#buffer.core.call("deepep_inject", injectStruct, "inject");
  }

  /** Which ranks are masked here, and how many operations failed. */
  state(): { maskedRanks: number[]; numFailures: number } {
    return { maskedRanks: this.#buffer.maskedRanks, numFailures: this.#buffer.stats().numFailures };
  }

  /** A fresh start with the ranks that are left. */
  recover(masked: readonly number[]): Promise<void> {
    return this.#buffer.recover({ masked });
  }

  /** Frees everything. */
  async close(): Promise<void> {
    this.#collect();
    for (const recv of this.#results.values()) recv.handle.release();
    await this.#buffer.close();
  }
}
