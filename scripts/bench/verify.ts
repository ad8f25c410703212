/**
 * The verification before the clock: a wrong result is never timed.
 *
 * In: what a backend gave, and the reference. Out: nothing, or a {@linkcode VerificationError} that names the first
 * difference. Called by the ops. Dispatches are compared whole. Of a combine the reference computes some tokens of every rank
 * (the first, the last and others between them): it is slow on purpose, and a whole prefill would take it minutes.
 */
import { Buffer } from "node:buffer";
import { type DispatchResult, type LowLatencyResult, type Payload, Tensor } from "../../mod.ts";
import { bytesOf } from "../../lib/dtype.ts";
import { expertRank, localExperts } from "../../lib/layout.ts";
import {
  type LowLatencyOutput,
  type RankOutput,
  referenceCombine,
  type ReferenceHandle,
  referenceLowLatencyCombine,
} from "../../lib/reference/mod.ts";
import type { BenchWorld } from "./world.ts";

/** What was computed is not what the reference computes. */
export class VerificationError extends Error {
  override readonly name = "VerificationError";
}

/** Compares. With `corrupt` it flips a bit first, to show that it would notice. */
export class Verifier {
  #corrupt: boolean;

  constructor(corrupt: boolean) {
    this.#corrupt = corrupt;
  }

  /** Throws unless the bytes are the same. */
  same(what: string, got: ArrayBufferView, want: ArrayBufferView): void {
    const a = bytesOf(got), b = bytesOf(want);
    if (this.#corrupt && a.length > 0) a[a.length - 1]! ^= 1;
    if (a.length !== b.length) {
      throw new VerificationError(`${what} has ${a.length} bytes, the reference ${b.length}`);
    }
    const at = firstDifference(a, b);
    if (at >= 0) {
      throw new VerificationError(`${what} differs from the reference: byte ${at} is ${a[at]}, not ${b[at]}`);
    }
  }

  /** A dispatch in normal mode, all of it. */
  async dispatch(name: string, got: DispatchResult<Payload>, want: RankOutput): Promise<void> {
    const { data, scales } = "data" in got.x ? got.x : { data: got.x, scales: undefined };
    this.same(`${name}: x`, await data.read(), want.x);
    if (scales && want.scales) this.same(`${name}: scales`, await scales.read(), want.scales);
    this.same(`${name}: srcIdx`, await got.srcIdx.read(), want.srcIdx);
    if (got.topkIdx && want.topkIdx) this.same(`${name}: topkIdx`, await got.topkIdx.read(), want.topkIdx);
    if (got.topkWeights && want.topkWeights) {
      this.same(`${name}: topkWeights`, await got.topkWeights.read(), want.topkWeights);
    }
    this.same(`${name}: counts`, Int32Array.from(got.numTokensPerExpert), want.numTokensPerExpert);
  }

  /** A dispatch in low-latency mode: counts, and each expert's rows. */
  async lowLatencyDispatch(name: string, got: LowLatencyResult, want: LowLatencyOutput): Promise<void> {
    await got.received();
    this.same(`${name}: count`, await got.count.read(), want.numTokensPerExpert);
    this.same(`${name}: layoutRange`, await got.layoutRange.read(), want.layoutRange);
    const { data, scales } = "data" in got.x ? got.x : { data: got.x, scales: undefined };
    for (const [e, rows] of want.experts.entries()) {
      if (rows.srcInfo.length === 0) continue;
      this.same(`${name}: x of expert ${e}`, await expertRows(data, e, rows.srcInfo.length).read(), rows.x);
      if (scales) {
        this.same(
          `${name}: scales of expert ${e}`,
          await expertRows(scales, e, rows.srcInfo.length).read(),
          rows.scales!,
        );
      }
    }
  }
}

/** The first `rows` rows of one expert of a low-latency tensor. */
export function expertRows(tensor: Tensor, expert: number, rows: number): Tensor {
  const { address, dtype, shape } = tensor.slice(expert, expert + 1);
  const hold = tensor.hold === undefined ? {} : { hold: tensor.hold };
  return new Tensor(address, dtype, [rows, shape[2]!], { strides: tensor.strides.slice(1), ...hold });
}

function firstDifference(a: Uint8Array, b: Uint8Array): number {
  if (Buffer.compare(a, b) === 0) return -1;
  return a.findIndex((byte, i) => byte !== b[i]);
}

/** Tokens whose combine is computed by the reference. */
export function sampledTokens(tokens: number, most = 8): number[] {
  const count = Math.min(tokens, most);
  return [...new Set(Array.from({ length: count }, (_, i) => Math.round(i * (tokens - 1) / Math.max(1, count - 1))))];
}

/** Rows of a matrix, one after another. */
export function gatherRows(x: Uint16Array, rows: readonly number[], hidden: number): Uint16Array {
  const out = new Uint16Array(rows.length * hidden);
  rows.forEach((row, i) => out.set(x.subarray(row * hidden, (row + 1) * hidden), i * hidden));
  return out;
}

/** What combine gives for some tokens of each rank, in rank layout. `y`: bf16 expert outputs of each rank. */
export function expectedCombine(
  world: BenchWorld,
  handle: ReferenceHandle,
  y: readonly Uint16Array[],
  tokens: readonly number[],
): Uint16Array[] {
  const { hidden, topk } = world;
  const newIndex = new Map(tokens.map((token, i) => [token, i]));
  const kept = handle.rows.map((rows) =>
    rows.flatMap((row, at) =>
      row && newIndex.has(row.token) ? [{ at, row: { ...row, token: newIndex.get(row.token)! } }] : []
    )
  );
  const inputs = handle.inputs.map((input, rank) => {
    const topkIdx = Int32Array.from(
      tokens.flatMap((token) => [...world.inputs[rank]!.topkIdx.subarray(token * topk, (token + 1) * topk)]),
    );
    return { numTokens: tokens.length, x: new Uint8Array(0), rowBytes: input.rowBytes, topkIdx };
  });
  const part: ReferenceHandle = {
    options: handle.options,
    inputs,
    rows: kept.map((rows) => rows.map(({ row }) => row)),
  };
  const outputs = kept.map((rows, rank) => ({ x: gatherRows(y[rank]!, rows.map(({ at }) => at), hidden) }));
  return referenceCombine(part, outputs, { hidden }).map(({ x }) => x);
}

/** What a low-latency combine gives for some tokens of each rank. `y[rank][e]`: bf16 rows of each local expert. */
export function expectedLowLatencyCombine(
  world: BenchWorld,
  y: readonly (readonly Uint16Array[])[],
  tokens: readonly number[],
): Uint16Array[] {
  const { hidden, topk, experts, ranks } = world;
  const wanted = new Set(tokens);
  const rowsSoFar = new Array<number>(experts).fill(0);
  const kept: number[][] = rowsSoFar.map(() => []);
  for (const { topkIdx } of world.inputs) {
    topkIdx.forEach((expert, i) => {
      const row = rowsSoFar[expert]!++;
      if (wanted.has(Math.floor(i / topk))) kept[expert]!.push(row);
    });
  }
  const pick = <T extends Int32Array | Float32Array>(from: T): number[] =>
    tokens.flatMap((token) => [...from.subarray(token * topk, (token + 1) * topk)]);
  const parts = world.inputs.map(({ topkIdx, topkWeights }, rank) => {
    const { first, count } = localExperts(experts, ranks, rank);
    return {
      numTokens: tokens.length,
      topkIdx: Int32Array.from(pick(topkIdx)),
      topkWeights: Float32Array.from(pick(topkWeights)),
      x: Array.from({ length: count }, (_, e) => gatherRows(y[rank]![e]!, kept[first + e]!, hidden)),
    };
  });
  const options = { numExperts: experts, numTopk: topk, maxTokensPerRank: tokens.length, hidden };
  return referenceLowLatencyCombine(parts, options);
}

/** The expert that owns an entry, as a rank and its local index. */
export function ownerOf(world: BenchWorld, expert: number): { rank: number; local: number } {
  const rank = expertRank(expert, world.experts, world.ranks);
  return { rank, local: expert - localExperts(world.experts, world.ranks, rank).first };
}
