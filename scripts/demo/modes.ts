/**
 * The three ways through the layer: normal BF16 in rank layout, normal FP8 in expert layout, low latency. In: a rank with
 * its tokens. Out: the layer's output for them, and what the rank received meanwhile. These are the calls that a user's
 * inference loop makes. Called by `scripts/demo.ts` on all ranks together.
 */
import type { ScaledRows } from "../../mod.ts";
import { bf16FromF32, bytesOf, castFromFp8, castToFp8, f32FromBf16 } from "../../lib/dtype.ts";
import { throughExperts } from "./experts.ts";
import { feedForward, NUM_TOPK } from "./layer.ts";
import type { ModeName } from "./options.ts";
import type { Laps, Rank } from "./world.ts";

/** What a rank got out of a mode. */
export interface Delivery {
  /** bf16 [numTokens, hidden]: the layer's output for the rank's tokens. */
  readonly out: Uint16Array;
  /** Entries received for each local expert. */
  readonly load: readonly number[];
  /** Rows received from each source rank. */
  readonly sources: readonly number[];
}

/** A mode, and where it rounds: the dense check does the same. */
export interface Mode {
  readonly title: string;
  /** What a received row is. */
  readonly rows: string;
  /** Rows travel as e4m3 with a scale per 128 channels. */
  readonly fp8: boolean;
  /** A rank sums its experts' weighted outputs in f32 and rounds the sum; else each expert's output is rounded. */
  readonly sumsPerRank: boolean;
  run(rank: Rank, laps: Laps): Promise<Delivery>;
}

/** The modes by name. */
export const modes: Readonly<Record<ModeName, Mode>> = {
  "bf16": {
    title: "Normal BF16, rank layout",
    rows: "a token once for each rank",
    fp8: false,
    sumsPerRank: true,
    run: normalBf16,
  },
  "fp8": {
    title: "Normal FP8, expert layout",
    rows: "a token for each expert",
    fp8: true,
    sumsPerRank: false,
    run: normalFp8,
  },
  "low-latency": {
    title: "Low latency, FP8",
    rows: "a token for each expert",
    fp8: true,
    sumsPerRank: false,
    run: lowLatency,
  },
};

/** With --corrupt: turns the sign of one channel of the first row. */
function corrupt(rank: Rank, received: ArrayBufferView): void {
  if (rank.corrupt && received.byteLength > 1) bytesOf(received)[1]! ^= 0x80;
}

/** A row is a token with all its experts on this rank: the rank weights and sums them, combine adds the ranks' sums. */
async function normalBf16(rank: Rank, laps: Laps): Promise<Delivery> {
  const { buffer, layer, numTokens, experts, progress } = rank, { hidden } = layer;
  using x = buffer.tensor("bf16", [numTokens, hidden], rank.x);
  using topkIdx = buffer.tensor("i32", [numTokens, NUM_TOPK], rank.routing.topkIdx);
  using topkWeights = buffer.tensor("f32", [numTokens, NUM_TOPK], rank.routing.topkWeights);
  await laps.lap();

  using recv = await buffer.dispatch(x, { topkIdx, topkWeights });
  await recv.event;
  await laps.lap("dispatch");

  progress.begin("experts", experts.count);
  const rows = await recv.x.read(), idx = await recv.topkIdx!.read(), weights = await recv.topkWeights!.read();
  corrupt(rank, rows);
  const sums = new Float32Array(recv.numTokens * hidden);
  const routed = { x: f32FromBf16(rows), topkIdx: idx as Int32Array, numTopk: NUM_TOPK, experts };
  await throughExperts(layer, routed, {
    progress,
    visit: (entries, outputs) =>
      entries.forEach((entry, i) => {
        const weight = weights[entry]!, at = Math.floor(entry / NUM_TOPK) * hidden;
        for (let c = 0; c < hidden; c++) sums[at + c]! += Math.fround(weight * outputs[i * hidden + c]!);
      }),
  });
  using y = buffer.tensor("bf16", [recv.numTokens, hidden], sums); // rounds to bf16
  await laps.lap("experts");

  using combined = await buffer.combine(y, recv.handle);
  await combined.event;
  await laps.lap("combine");
  return { out: await combined.x.read(), load: recv.numTokensPerExpert, sources: recv.numTokensPerRank };
}

/** Groups of rows per expert begin at multiples of this, as a grouped GEMM wants them. */
const ALIGNMENT = 8;

/** A row is a token for one expert: groups go through their expert as they lie, zero padding too; combine weights. */
async function normalFp8(rank: Rank, laps: Laps): Promise<Delivery> {
  const { buffer, layer, numTokens, experts, progress } = rank, { hidden } = layer;
  const cast = castToFp8(rank.x, numTokens, hidden);
  using data = buffer.tensor("f8e4m3", [numTokens, hidden], cast.data);
  using scales = buffer.tensor("f32", [numTokens, cast.numScales], cast.scales as Float32Array);
  using topkIdx = buffer.tensor("i32", [numTokens, NUM_TOPK], rank.routing.topkIdx);
  using weights = buffer.tensor("f32", [numTokens, NUM_TOPK], rank.routing.topkWeights);
  await laps.lap();

  using recv = await buffer.dispatch({ data, scales }, {
    topkIdx,
    layout: "expert",
    expertAlignment: ALIGNMENT,
    zeroPadding: true,
  });
  await recv.event;
  await laps.lap("dispatch");

  progress.begin("experts", experts.count);
  const rows = await recv.x.data.read() as Uint8Array, rowScales = await recv.x.scales.read() as Float32Array;
  corrupt(rank, rows);
  const values = f32FromBf16(castFromFp8(rows, rowScales, recv.numRows, hidden));
  const outputs = new Float32Array(values.length);
  let begin = 0;
  for (const [local, count] of recv.numTokensPerExpert.entries()) {
    const end = begin + count * hidden;
    if (count > 0) {
      outputs.set(feedForward(layer.expert(experts.first + local), values.subarray(begin, end), hidden), begin);
    }
    begin = end;
    await progress.step();
  }
  const y = recv.handle.expertOutput(); // where peers read: nothing is copied
  y.slice(0, recv.numRows).write(bf16FromF32(outputs));
  await laps.lap("experts");

  using combined = await buffer.combine(y, recv.handle, { weights });
  await combined.event;
  await laps.lap("combine");
  const srcIdx = await recv.srcIdx.read();
  return { out: await combined.x.read(), ...countRows(srcIdx, recv.numTokensPerExpert, rank) };
}

/** Rows of each group and from each rank, padding left out. */
function countRows(
  srcIdx: Int32Array,
  groups: readonly number[],
  { buffer }: Rank,
): { load: number[]; sources: number[] } {
  const sources: number[] = new Array(buffer.numRanks).fill(0);
  let begin = 0;
  const load = groups.map((size) => {
    const rows = srcIdx.subarray(begin, begin += size).filter((source) => source >= 0);
    rows.forEach((source) => sources[Math.floor(source / buffer.options.maxTokensPerRank)]!++);
    return rows.length;
  });
  return { load, sources };
}

/** An expert's rows are packed from the beginning of its own part; the library casts, and weights in combine. */
async function lowLatency(rank: Rank, laps: Laps): Promise<Delivery> {
  const { buffer, layer, numTokens, experts, progress } = rank, { hidden } = layer;
  using x = buffer.tensor("bf16", [numTokens, hidden], rank.x);
  using topkIdx = buffer.tensor("i32", [numTokens, NUM_TOPK], rank.routing.topkIdx);
  using topkWeights = buffer.tensor("f32", [numTokens, NUM_TOPK], rank.routing.topkWeights);
  await laps.lap();

  using recv = buffer.lowLatencyDispatch(x, { topkIdx, scalesColumnMajor: false });
  await recv.received();
  await laps.lap("dispatch");

  progress.begin("experts", experts.count);
  const { data, scales } = recv.x as ScaledRows;
  const y = recv.handle.expertOutput(); // bf16 [experts, maxRows, hidden], as the received rows
  const maxRows = y.shape[1]!, flat = (t: typeof data) => t.reshape(t.shape[0]! * maxRows, t.shape[2]!);
  const counts = await recv.count.read();
  for (const [local, count] of counts.entries()) {
    const part = (t: typeof data) => flat(t).slice(local * maxRows, local * maxRows + count);
    const rows = await part(data).read() as Uint8Array, rowScales = await part(scales).read() as Float32Array;
    if (local === counts.findIndex((n) => n > 0)) corrupt(rank, rows);
    const values = f32FromBf16(castFromFp8(rows, rowScales, count, hidden));
    if (count > 0) part(y).write(bf16FromF32(feedForward(layer.expert(experts.first + local), values, hidden)));
    await progress.step();
  }
  await laps.lap("experts");

  using combined = buffer.lowLatencyCombine(y, { topkIdx, topkWeights, handle: recv.handle });
  await combined.received();
  await laps.lap("combine");
  const ranges = await recv.layoutRange.read(); // begin << 32 | count, [experts, ranks]
  const sources: number[] = new Array(buffer.numRanks).fill(0);
  ranges.forEach((range, i) => sources[i % buffer.numRanks]! += Number(range & 0xffffffffn));
  return { out: await combined.x.read(), load: [...counts], sources };
}
