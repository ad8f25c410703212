/**
 * Element types, and the casts whose bits every backend shares.
 *
 * In: typed arrays. Out: new typed arrays. Called by tensors (sizes and views), the reference, tests, demo and bench. A bf16
 * is kept as its 16 bits in a `Uint16Array`, an e4m3 as its 8 bits in a `Uint8Array`. Rounding is to nearest even; an f32
 * result is the exact result rounded once (an f32 product, sum or quotient taken in f64 and rounded is that). The loops work on
 * typed arrays and look decodings up, so that megabytes take milliseconds.
 */

/** The name of an element type. */
export type DType = "u8" | "i8" | "i32" | "i64" | "f32" | "bf16" | "f8e4m3" | "bool";

/** Bytes of an element. */
export const itemSize: Readonly<Record<DType, number>> = {
  u8: 1,
  i8: 1,
  i32: 4,
  i64: 8,
  f32: 4,
  bf16: 2,
  f8e4m3: 1,
  bool: 1,
};

const arrays = {
  u8: Uint8Array,
  i8: Int8Array,
  i32: Int32Array,
  i64: BigInt64Array,
  f32: Float32Array,
  bf16: Uint16Array,
  f8e4m3: Uint8Array,
  bool: Uint8Array,
} as const;

/** The typed array that holds a dtype's elements in JS: raw bits for bf16 and e4m3. */
export type TypedArrayOf<D extends DType> = {
  u8: Uint8Array;
  i8: Int8Array;
  i32: Int32Array;
  i64: BigInt64Array;
  f32: Float32Array;
  bf16: Uint16Array;
  f8e4m3: Uint8Array;
  bool: Uint8Array;
}[D];

/** The name of the typed array that holds a dtype's elements. */
export function arrayName(dtype: DType): string {
  return arrays[dtype].name;
}

/** Channels that share an FP8 scale. */
export const FP8_BLOCK = 128;

/**
 * The elements in some bytes, without a copy.
 *
 * @throws {RangeError} When the bytes are no whole number of elements or not aligned to one.
 */
export function viewAs<D extends DType>(dtype: D, bytes: ArrayBufferView): TypedArrayOf<D> {
  const size = itemSize[dtype];
  if (bytes.byteLength % size !== 0 || bytes.byteOffset % size !== 0) {
    throw new RangeError(`Cannot view ${bytes.byteLength} bytes at offset ${bytes.byteOffset} as ${dtype}`);
  }
  return new arrays[dtype](bytes.buffer as ArrayBuffer, bytes.byteOffset, bytes.byteLength / size) as TypedArrayOf<D>;
}

/** The bytes of a typed array, without a copy. */
export function bytesOf(view: ArrayBufferView): Uint8Array {
  return new Uint8Array(view.buffer, view.byteOffset, view.byteLength);
}

/** f32 to bf16: nearest, ties to even; every NaN becomes 0x7FFF; overflow becomes infinity. */
export function bf16FromF32(x: Float32Array): Uint16Array {
  const bits = new Uint32Array(x.buffer, x.byteOffset, x.length);
  const out = new Uint16Array(x.length);
  for (let i = 0; i < bits.length; i++) {
    const u = bits[i]!;
    out[i] = (u & 0x7fffffff) > 0x7f800000 ? 0x7fff : (u + 0x7fff + ((u >>> 16) & 1)) >>> 16;
  }
  return out;
}

/** bf16 to f32: exact. */
export function f32FromBf16(x: Uint16Array): Float32Array {
  const bits = new Uint32Array(x.length);
  for (let i = 0; i < x.length; i++) bits[i] = x[i]! << 16;
  return new Float32Array(bits.buffer);
}

/** f32 to e4m3: nearest, ties to even; beyond ±448, infinity too, it saturates; every NaN becomes 0x7F. */
export function e4m3FromF32(x: Float32Array): Uint8Array {
  const bits = new Uint32Array(x.buffer, x.byteOffset, x.length);
  const out = new Uint8Array(x.length);
  for (let i = 0; i < bits.length; i++) out[i] = e4m3FromBits(bits[i]!);
  return out;
}

/** e4m3 to f32: exact; 0x7F and 0xFF are NaN. */
export function f32FromE4m3(x: Uint8Array): Float32Array {
  const out = new Float32Array(x.length);
  for (let i = 0; i < x.length; i++) out[i] = e4m3Values[x[i]!]!;
  return out;
}

/** How FP8 scales are made and kept. */
export interface Fp8Options {
  /** Round scales up to powers of two. */
  readonly round?: boolean;
  /** Keep scales as 8-bit exponents, four to an i32, the first in the lowest byte. Needs `round`. */
  readonly ue8m0?: boolean;
}

/** Rows cast to FP8. */
export interface Fp8Rows {
  /** e4m3 [rows, hidden]. */
  readonly data: Uint8Array;
  /** f32 [rows, numScales], or with `ue8m0` i32 [rows, numScales]: what an e4m3 value is multiplied by to get the value back. */
  readonly scales: Float32Array | Int32Array;
  /** Scale elements a row. */
  readonly numScales: number;
}

/** Scale elements that a row of `hidden` channels has. */
export function numFp8Scales(hidden: number, options: Fp8Options = {}): number {
  const numBlocks = Math.ceil(hidden / FP8_BLOCK);
  return options.ue8m0 ? Math.ceil(numBlocks / 4) : numBlocks;
}

/**
 * Casts bf16 [rows, hidden] to e4m3 with one scale per 128 channels of a row (the last block may have fewer).
 *
 * A block's `amax` is the largest of 1e-4 and its magnitudes, NaN left out. Its scale is `amax * (1 / 448)`, and values are
 * multiplied by `448 / amax`, each step rounded to f32. With `round` the scale is the least power of two not below that, and
 * values are multiplied by its reciprocal.
 *
 * @throws {RangeError} When `x` has not rows * hidden elements, or `ue8m0` comes without `round`.
 */
export function castToFp8(x: Uint16Array, rows: number, hidden: number, options: Fp8Options = {}): Fp8Rows {
  const { round = false, ue8m0 = false } = options;
  if (ue8m0 && !round) throw new RangeError("Cannot cast to FP8: ue8m0 needs round");
  checkRows("to", x.length, rows, hidden);
  const numBlocks = Math.ceil(hidden / FP8_BLOCK);
  const numScales = numFp8Scales(hidden, options);
  const data = new Uint8Array(rows * hidden);
  const scales = ue8m0 ? new Int32Array(rows * numScales) : new Float32Array(rows * numScales);
  const exponents = bytesOf(scales); // element b of a row of ue8m0 scales is byte b
  const values = new Float32Array(FP8_BLOCK);
  const bits = new Uint32Array(values.buffer);
  for (let row = 0; row < rows; row++) {
    for (let block = 0; block < numBlocks; block++) {
      const begin = row * hidden + block * FP8_BLOCK;
      const count = Math.min(FP8_BLOCK, hidden - block * FP8_BLOCK);
      let amax = 0; // as bits: magnitudes order like their bits
      for (let i = 0; i < count; i++) {
        const magnitude = x[begin + i]! & 0x7fff;
        if (magnitude > amax && magnitude <= 0x7f80) amax = magnitude;
        bits[i] = x[begin + i]! << 16;
      }
      const { scale, inverse } = fp8Scale(Math.max(FP8_MARGIN, bf16Value(amax)), round);
      for (let i = 0; i < count; i++) values[i] = values[i]! * scale;
      for (let i = 0; i < count; i++) data[begin + i] = e4m3FromBits(bits[i]!);
      if (ue8m0) exponents[row * numScales * 4 + block] = f32Bits(inverse) >>> 23;
      else scales[row * numScales + block] = inverse;
    }
  }
  return { data, scales, numScales };
}

/**
 * Casts FP8 rows back to bf16 [rows, hidden]: e4m3 value times scale in f32, rounded to bf16.
 *
 * @param scales As {@linkcode castToFp8} gives them: f32, or i32 of four exponents.
 * @throws {RangeError} When a length does not fit rows and hidden.
 */
export function castFromFp8(
  data: Uint8Array,
  scales: Float32Array | Int32Array,
  rows: number,
  hidden: number,
): Uint16Array {
  const ue8m0 = scales instanceof Int32Array;
  const numScales = numFp8Scales(hidden, { ue8m0 });
  checkRows("from", data.length, rows, hidden);
  checkRows("from", scales.length, rows, numScales);
  const exponents = bytesOf(scales);
  const out = new Float32Array(rows * hidden);
  for (let row = 0; row < rows; row++) {
    for (let i = 0; i < hidden; i++) {
      const block = Math.floor(i / FP8_BLOCK);
      const scale = ue8m0 ? f32Value(exponents[row * numScales * 4 + block]! << 23) : scales[row * numScales + block]!;
      out[row * hidden + i] = e4m3Values[data[row * hidden + i]!]! * scale;
    }
  }
  return bf16FromF32(out);
}

/** The least `amax` of a block, so that a block of zeros has a scale. */
const FP8_MARGIN = Math.fround(1e-4);
const INVERSE_448 = Math.fround(1 / 448);

/** `scale` makes e4m3 values, `inverse` (the one that is sent) brings them back. */
function fp8Scale(amax: number, round: boolean): { scale: number; inverse: number } {
  const inverse = Math.fround(amax * INVERSE_448);
  if (!round) return { scale: Math.fround(448 / amax), inverse };
  const bits = f32Bits(inverse);
  const exponent = (bits >>> 23) - 127 + ((bits & 0x7fffff) !== 0 ? 1 : 0);
  // 2 ** 128 is infinity in f32, as it should be for an infinite amax; 2 ** -128 is a subnormal.
  return { scale: Math.fround(2 ** -exponent), inverse: Math.fround(2 ** exponent) };
}

const scratchF32 = new Float32Array(1);
const scratchU32 = new Uint32Array(scratchF32.buffer);

function f32Bits(x: number): number {
  scratchF32[0] = x;
  return scratchU32[0]!;
}

function f32Value(bits: number): number {
  scratchU32[0] = bits;
  return scratchF32[0]!;
}

function bf16Value(bits: number): number {
  return f32Value(bits << 16);
}

/** The e4m3 code of an f32 given as its bits. */
function e4m3FromBits(u: number): number {
  const sign = (u >>> 24) & 0x80;
  const magnitude = u & 0x7fffffff;
  if (magnitude > 0x7f800000) return 0x7f;
  if (magnitude >= 0x43e00000) return sign | 0x7e; // 448 and more
  if (magnitude < 0x3c800000) { // below 2 ** -6: subnormal, steps of 2 ** -9
    const steps = f32Value(magnitude) * 512;
    const floor = Math.floor(steps);
    const rest = steps - floor;
    return sign | (rest > 0.5 || (rest === 0.5 && (floor & 1) === 1) ? floor + 1 : floor);
  }
  // Keep 3 of 23 mantissa bits; the exponent's bias goes from 127 to 7. A carry into the exponent is right as it is.
  return sign | (((magnitude + 0x7ffff + ((magnitude >>> 20) & 1)) >>> 20) - (120 << 3));
}

const e4m3Values = Float32Array.from({ length: 256 }, (_, code) => {
  const exponent = (code >> 3) & 15;
  const mantissa = code & 7;
  if (exponent === 15 && mantissa === 7) return NaN;
  const magnitude = exponent === 0 ? mantissa * 2 ** -9 : (8 + mantissa) * 2 ** (exponent - 10);
  return code & 0x80 ? -magnitude : magnitude;
});

function checkRows(direction: string, length: number, rows: number, width: number): void {
  if (length !== rows * width) {
    throw new RangeError(`Cannot cast ${direction} FP8: ${length} elements are not ${rows} rows of ${width}`);
  }
}
