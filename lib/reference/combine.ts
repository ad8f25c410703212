/**
 * Combine in normal mode: the meaning of `deepep_combine`.
 *
 * In: the handle of a dispatch and every rank's expert outputs, laid out as the dispatch laid its rows out. Out: each token
 * reduced on the rank it came from. Called by tests as the oracle of every backend. Every product and every sum is rounded to
 * f32 by itself, in a fixed order, so that all backends give the same bits.
 */
import { bf16FromF32, f32FromBf16 } from "../dtype.ts";
import type { ReferenceHandle } from "./dispatch.ts";
import { expertOf, isMasked } from "./world.ts";

/** What one rank brings to a combine. */
export interface CombineInput {
  /** bf16 [numRows, hidden]: expert outputs, row for row what the dispatch received. */
  readonly x: Uint16Array;
  /** f32, shaped as the received `topkWeights`: brought back to the tokens. */
  readonly topkWeights?: Float32Array;
  /** f32 [numTokens, numTopk], expert layout only: the row of entry k is multiplied by it. */
  readonly weights?: Float32Array;
  /** bf16 [numTokens, hidden]: what the sum begins with. */
  readonly bias0?: Uint16Array;
  /** bf16 [numTokens, hidden]: added next. */
  readonly bias1?: Uint16Array;
}

/** What one rank gets back. */
export interface CombineOutput {
  /** bf16 [numTokens, hidden]. */
  readonly x: Uint16Array;
  /** f32 [numTokens, numTopk], when the inputs have `topkWeights`. */
  readonly topkWeights?: Float32Array;
}

/** A row of a token: which rank holds it and where. */
interface Place {
  readonly rank: number;
  readonly row: number;
  readonly k: number;
}

/**
 * Combines a world.
 *
 * The sum of a token starts at 0 (or at `bias0`), `bias1` is added, then the token's rows: in ascending rank order in rank
 * layout, in ascending k in expert layout, each multiplied by its weight first when there are weights. So the sum of no rows is
 * +0, and a lone row of -0 gives +0. The end is rounded to bf16. Rows on masked ranks are left out.
 *
 * `topkWeights` come back as `out[t, k]` = the sum, from 0 and in the same order, of the `[row, k]` of the token's rows in
 * rank layout, and the value of the row of (t, k) in expert layout; 0 where the entry has no expert that takes part.
 *
 * @throws {TypeError} When an array has not the length of its shape.
 * @throws {RangeError} When `weights` are given in rank layout.
 */
export function referenceCombine(
  handle: ReferenceHandle,
  ranks: readonly CombineInput[],
  options: { hidden: number; masked?: readonly number[] },
): CombineOutput[] {
  const { hidden } = options;
  checkCombine(handle, ranks, options);
  const values = ranks.map((input) => f32FromBf16(input.x));
  return ranks.map((input, source) => {
    const numTokens = isMasked(options, source) ? 0 : handle.inputs[source]!.numTokens;
    const places = placesOf(handle, source, options);
    const out = new Float32Array(numTokens * hidden);
    const bias0 = input.bias0 && f32FromBf16(input.bias0);
    const bias1 = input.bias1 && f32FromBf16(input.bias1);
    for (let token = 0; token < numTokens; token++) {
      for (let i = 0; i < hidden; i++) {
        let sum = bias0 ? bias0[token * hidden + i]! : 0;
        if (bias1) sum = Math.fround(sum + bias1[token * hidden + i]!);
        for (const { rank, row, k } of places[token]!) {
          const value = values[rank]![row * hidden + i]!;
          const weight = input.weights?.[token * handle.options.numTopk + k];
          sum = Math.fround(sum + (weight === undefined ? value : Math.fround(weight * value)));
        }
        out[token * hidden + i] = sum;
      }
    }
    const withWeights = ranks.some((r) => r.topkWeights !== undefined);
    return { x: bf16FromF32(out), ...(withWeights ? { topkWeights: weightsBack(handle, ranks, source, places) } : {}) };
  });
}

/** For each token of a rank the rows it became, in the order of the reduction. */
function placesOf(handle: ReferenceHandle, source: number, options: { masked?: readonly number[] }): Place[][] {
  const places: Place[][] = Array.from({ length: handle.inputs[source]!.numTokens }, () => []);
  handle.rows.forEach((rows, rank) => {
    if (isMasked(options, rank)) return;
    rows.forEach((from, row) => {
      if (from?.source === source) places[from.token]!.push({ rank, row, k: from.k });
    });
  });
  // Rank layout has one row a rank and k = -1 everywhere: the order by rank stays. Expert layout has one row a k.
  for (const ofToken of places) ofToken.sort((a, b) => a.k - b.k || a.rank - b.rank);
  return places;
}

function weightsBack(
  handle: ReferenceHandle,
  ranks: readonly CombineInput[],
  source: number,
  places: readonly Place[][],
): Float32Array {
  const { numTopk, layout } = handle.options;
  const out = new Float32Array(places.length * numTopk);
  places.forEach((ofToken, token) => {
    for (const { rank, row, k } of ofToken) {
      const weights = ranks[rank]!.topkWeights!;
      if (layout === "expert") out[token * numTopk + k] = weights[row]!;
      else for (let j = 0; j < numTopk; j++) out[token * numTopk + j]! += weights[row * numTopk + j]!;
    }
    for (let k = 0; k < numTopk; k++) {
      if (expertOf(handle.inputs[source]!, numTopk, token, k) < 0) out[token * numTopk + k] = 0;
    }
  });
  return out;
}

function checkCombine(
  handle: ReferenceHandle,
  ranks: readonly CombineInput[],
  options: { hidden: number; masked?: readonly number[] },
): void {
  const { numTopk, layout } = handle.options;
  ranks.forEach((input, rank) => {
    if (isMasked(options, rank)) return;
    const numRows = handle.rows[rank]!.length;
    const numTokens = handle.inputs[rank]!.numTokens;
    const lengths: [string, ArrayLike<unknown> | undefined, number][] = [
      ["x", input.x, numRows * options.hidden],
      ["topkWeights", input.topkWeights, layout === "expert" ? numRows : numRows * numTopk],
      ["weights", input.weights, numTokens * numTopk],
      ["bias0", input.bias0, numTokens * options.hidden],
      ["bias1", input.bias1, numTokens * options.hidden],
    ];
    for (const [name, array, length] of lengths) {
      if (array !== undefined && array.length !== length) {
        throw new TypeError(`Cannot combine: ${name} of rank ${rank} has ${array.length} elements, not ${length}`);
      }
    }
    if (input.weights !== undefined && layout !== "expert") {
      throw new RangeError("Cannot combine: weights need expert layout");
    }
  });
}
