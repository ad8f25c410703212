/**
 * Comparison bit for bit, of what ranks gave with what the reference says.
 *
 * In: outputs. Out: an error that names the rank, the field and the first element that differs. Called by the cases. Padding is
 * compared only where a call defines it.
 */
import { bytesOf } from "../../lib/dtype.ts";
import { scaleStrides } from "../../lib/layout.ts";
import type { CombineOutput, LowLatencyOutput, RankInput, RankOutput } from "../../lib/reference/mod.ts";
import type { DispatchCall, Dispatched, LowLatencyCall, LowLatencyDispatched, WorldOptions } from "./driver.ts";

type Elements = Int32Array | BigInt64Array | Float32Array | Uint16Array | Uint8Array;

/** Throws when two arrays differ in type, length or a bit; `width` elements make a row, of which `only` chooses. */
export function assertSame(
  what: string,
  actual: Elements | undefined,
  expected: Elements | undefined,
  rows: { width?: number; only?: (row: number) => boolean } = {},
): void {
  const { width = 1, only = () => true } = rows;
  if (expected === undefined || actual === undefined) {
    if (expected !== actual) {
      throw new Error(`${what}: ${actual ? "given" : "missing"}, not ${expected ? "given" : "missing"}`);
    }
    return;
  }
  if (actual.constructor !== expected.constructor) {
    throw new Error(`${what}: a ${actual.constructor.name}, not a ${expected.constructor.name}`);
  }
  if (actual.length !== expected.length) {
    throw new Error(`${what}: ${actual.length} elements, not ${expected.length}`);
  }
  const [a, e] = [bytesOf(actual), bytesOf(expected)];
  const size = actual.BYTES_PER_ELEMENT;
  for (let i = 0; i < e.length; i++) {
    if (a[i] === e[i]) continue;
    const index = Math.floor(i / size);
    const row = Math.floor(index / width);
    if (!only(row)) continue;
    throw new Error(`${what}: element ${index % width} of row ${row} is ${actual[index]}, not ${expected[index]}`);
  }
}

/** Compares a dispatch on every unmasked rank. */
export function assertDispatched(
  actual: Dispatched,
  expected: readonly RankOutput[],
  about: { inputs: readonly RankInput[]; call: DispatchCall; options: WorldOptions; masked?: readonly number[] },
): void {
  const { inputs, call, options, masked = [] } = about;
  const numTopk = call.layout === "expert" ? 1 : call.numTopk;
  expected.forEach((want, rank) => {
    if (masked.includes(rank)) return;
    const got = actual.ranks[rank]!;
    const { rowBytes, numScales = 0, scaleElemBytes = 0 } = inputs[rank]!;
    const inUse = (row: number): boolean => want.srcIdx[row]! >= 0;
    const only = call.zeroPadding ? () => true : inUse;
    const name = (field: string): string => `rank ${rank}, ${field}`;
    const counts = (output: RankOutput): Int32Array => Int32Array.of(output.numTokens, output.numRows);
    assertSame(name("numTokens and numRows"), counts(got), counts(want));
    assertSame(name("numTokensPerRank"), got.numTokensPerRank, want.numTokensPerRank);
    assertSame(name("numTokensPerExpert"), got.numTokensPerExpert, want.numTokensPerExpert);
    assertSame(name("srcIdx"), got.srcIdx, want.srcIdx);
    assertSame(name("x"), got.x, want.x, { width: rowBytes, only });
    assertSame(name("scales"), got.scales, want.scales, { width: numScales * scaleElemBytes, only });
    // The caller of a cached dispatch has the indices already; giving them again is up to the driver.
    if (got.topkIdx !== undefined || call.cached === undefined) {
      assertSame(name("topkIdx"), got.topkIdx, want.topkIdx, { width: numTopk });
    }
    assertSame(name("topkWeights"), got.topkWeights, want.topkWeights, { width: numTopk, only: inUse });
    if (inputs[rank]!.expertStats) assertSame(name("expertStats"), got.expertStats, want.expertStats);
    const strides = actual.scaleStrides?.[rank];
    // Elements of 16 bytes have no dtype; a driver may carry them as pairs, with strides of its own.
    if (strides !== undefined && call.scalesColumnMajor && numScales > 0 && scaleElemBytes < 16) {
      const maxRows = options.maxRecvTokens ?? options.maxTokensPerRank * options.numRanks;
      assertStrides(name("scale strides"), strides, scaleStrides({ maxRows, numScales, scaleElemBytes }, true));
    }
  });
}

/** Compares a combine on every unmasked rank. */
export function assertCombined(
  actual: readonly CombineOutput[],
  expected: readonly CombineOutput[],
  width: { hidden: number; numTopk: number; masked?: readonly number[] },
): void {
  expected.forEach((want, rank) => {
    if (width.masked?.includes(rank)) return;
    assertSame(`rank ${rank}, combined x`, actual[rank]!.x, want.x, { width: width.hidden });
    const { topkWeights } = actual[rank]!;
    assertSame(`rank ${rank}, combined topkWeights`, topkWeights, want.topkWeights, { width: width.numTopk });
  });
}

/** Compares a low-latency dispatch on every unmasked rank. */
export function assertLowLatencyDispatched(
  actual: LowLatencyDispatched,
  expected: readonly LowLatencyOutput[],
  about: { inputs: readonly RankInput[]; call: LowLatencyCall; options: WorldOptions; masked?: readonly number[] },
): void {
  const { inputs, call, options, masked = [] } = about;
  expected.forEach((want, rank) => {
    if (masked.includes(rank)) return;
    const got = actual.ranks[rank]!;
    assertSame(`rank ${rank}, numTokensPerExpert`, got.numTokensPerExpert, want.numTokensPerExpert);
    assertSame(`rank ${rank}, layoutRange`, got.layoutRange, want.layoutRange, { width: inputs.length });
    if (inputs[rank]!.expertStats) assertSame(`rank ${rank}, expertStats`, got.expertStats, want.expertStats);
    want.experts.forEach((rows, e) => {
      const name = (field: string): string => `rank ${rank}, local expert ${e}, ${field}`;
      const count = Math.max(1, rows.srcInfo.length);
      assertSame(name("srcInfo"), got.experts[e]!.srcInfo, rows.srcInfo);
      assertSame(name("x"), got.experts[e]!.x, rows.x, { width: rows.x.length / count });
      assertSame(name("scales"), got.experts[e]!.scales, rows.scales, { width: (rows.scales?.length ?? 0) / count });
    });
    const strides = actual.scaleStrides?.[rank];
    const { numScales = 0, scaleElemBytes: sentBytes = 0 } = inputs[rank]!, scaleElemBytes = call.fp8 ? 4 : sentBytes;
    if (strides !== undefined && call.scalesColumnMajor && (call.fp8 || numScales > 0) && scaleElemBytes < 16) {
      const maxRows = (options.maxLowLatencyTokensPerRank ?? 0) * options.numRanks;
      const shape = { maxRows, numScales: 1, scaleElemBytes }; // the number of scales is in no column-major stride
      assertStrides(`rank ${rank}, scale strides`, strides, scaleStrides(shape, true));
    }
  });
}

function assertStrides(what: string, actual: object, expected: object): void {
  const [a, e] = [JSON.stringify(actual), JSON.stringify(expected)];
  if (a !== e) throw new Error(`${what}: ${a}, not ${e}`);
}
