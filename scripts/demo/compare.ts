/**
 * How far a result is from what it must be. In: a rank's output and the dense layer's for the same tokens. Out: counts and
 * the first difference, small enough to send to rank 0. Called by `scripts/demo.ts` on every rank.
 */
import { f32FromBf16 } from "../../lib/dtype.ts";
import type { DenseResult } from "./dense.ts";

/** A value that is not what it must be. */
export interface Difference {
  /** Index among the rank's tokens. */
  readonly token: number;
  readonly channel: number;
  readonly got: number;
  readonly expected: number;
}

/** A rank's output against the dense layer's. */
export interface Comparison {
  readonly values: number;
  /** Values whose bits are equal. */
  readonly equal: number;
  readonly maxAbsError: number;
  readonly wrongTokens: number;
  readonly first: Difference | null;
  /** Sum of squares of the difference to the unrounded layer, and of that layer's values. */
  readonly squaredError: number;
  readonly squaredNorm: number;
  /** FNV-1a of the output, by 16-bit values. */
  readonly checksum: number;
}

/**
 * The largest relative root-mean-square distance from the unrounded layer that rounding explains. bf16 rounds by at most
 * 2 ** -9 of a value, at three steps or fewer: 1 % leaves room. e4m3 rounds by at most 2 ** -4, 2.6 % in the mean square when
 * errors are spread evenly, and the gated product of two projections doubles that: 10 % leaves room.
 */
export const RMS_BOUND = { bf16: 0.01, fp8: 0.1 };

/** Compares bf16 [tokens, hidden]. */
export function compare(out: Uint16Array, expected: DenseResult, unrounded: Float32Array, hidden: number): Comparison {
  const got = f32FromBf16(out), want = f32FromBf16(expected.rounded), wrong = new Set<number>();
  let equal = 0, maxAbsError = 0, squaredError = 0, squaredNorm = 0, checksum = 0x811c9dc5;
  let first: Difference | null = null;
  for (let i = 0; i < out.length; i++) {
    checksum = Math.imul(checksum ^ out[i]!, 0x01000193);
    squaredError += (got[i]! - unrounded[i]!) ** 2;
    squaredNorm += unrounded[i]! ** 2;
    if (out[i] === expected.rounded[i]) {
      equal++;
      continue;
    }
    const token = Math.floor(i / hidden), error = Math.abs(got[i]! - want[i]!);
    wrong.add(token);
    maxAbsError = Math.max(maxAbsError, Number.isNaN(error) ? Infinity : error);
    first ??= { token, channel: i % hidden, got: got[i]!, expected: want[i]! };
  }
  return {
    values: out.length,
    equal,
    maxAbsError,
    wrongTokens: wrong.size,
    first,
    squaredError,
    squaredNorm,
    checksum: checksum >>> 0,
  };
}
