/**
 * Casts, exhaustively where the type is small: every bf16, every e4m3 code, and e4m3 against a search for the nearest code.
 */
import { assert, assertEquals, assertThrows } from "@std/assert";
import { describe, test } from "node:test";
import { bf16FromF32, bytesOf, castFromFp8, castToFp8, type DType, e4m3FromF32, f32FromBf16 } from "../lib/dtype.ts";
import { f32FromE4m3, itemSize, numFp8Scales, viewAs } from "../lib/dtype.ts";
import { Random } from "./support/random.ts";

const all = (count: number): number[] => Array.from({ length: count }, (_, i) => i);
const bits = (...x: number[]): Float32Array => new Float32Array(Uint32Array.from(x).buffer);
const f32 = (...x: number[]): Float32Array => Float32Array.from(x);

describe("bf16", () => {
  test("all 65536 codes go there and back; NaN becomes one code", () => {
    const codes = Uint16Array.from(all(65536));
    const back = bf16FromF32(f32FromBf16(codes));
    for (const code of codes) {
      assertEquals(back[code], (code & 0x7fff) > 0x7f80 ? 0x7fff : code);
    }
  });

  test("between two codes the nearer wins, and the even one of equals", () => {
    for (let code = 0; code < 0x7f80; code++) { // the midpoint above code, and the f32 on either side of it
      const middle = code * 65536 + 0x8000;
      const even = code & 1 ? code + 1 : code;
      assertEquals([...bf16FromF32(bits(middle - 1, middle, middle + 1))], [code, even, code + 1]);
      assertEquals([...bf16FromF32(bits(middle + 2 ** 31))], [even + 0x8000]);
    }
  });

  test("overflow, infinity, NaN, zeros", () => {
    assertEquals([...bf16FromF32(f32(3.4e38, Infinity, -Infinity, 0, -0))], [0x7f80, 0x7f80, 0xff80, 0, 0x8000]);
    assertEquals([...bf16FromF32(bits(0x7f800001, 0xff800001, 0x7fffffff, 0xffffffff))], [
      0x7fff,
      0x7fff,
      0x7fff,
      0x7fff,
    ]);
    assertEquals([...bf16FromF32(bits(1, 0x80000001, 0x8000, 0x8001))], [0, 0x8000, 0, 1]);
  });
});

describe("e4m3", () => {
  const codes = Uint8Array.from(all(256));
  const values = f32FromE4m3(codes);

  test("codes mean what the format says", () => {
    assertEquals([...f32FromE4m3(Uint8Array.of(0x00, 0x01, 0x07, 0x08, 0x38, 0x7e, 0xfe, 0xb8))], [
      0,
      2 ** -9,
      7 * 2 ** -9,
      2 ** -6,
      1,
      448,
      -448,
      -1,
    ]);
    assert(Object.is(values[0x80], -0));
    assertEquals([...codes].filter((code) => Number.isNaN(values[code]!)), [0x7f, 0xff]);
  });

  test("all 256 codes go there and back; NaN becomes 0x7F", () => {
    const back = e4m3FromF32(values);
    for (const code of codes) assertEquals(back[code], (code & 0x7f) === 0x7f ? 0x7f : code);
  });

  test("any number becomes the nearest code, the even one of two", () => {
    const finite = all(0x7f).map((code) => values[code]!); // ascending
    const nearest = (x: number): number => {
      let code = 0;
      for (let c = 1; c < finite.length; c++) {
        const [now, best] = [Math.abs(finite[c]! - x), Math.abs(finite[code]! - x)];
        if (now < best || (now === best && c % 2 === 0)) code = c;
      }
      return code;
    };
    const samples: number[] = [2 ** -10, 2 ** -11, 2 ** -149, 1e-30, 463.99, 464, 465, 480, 1e30, Infinity];
    for (let c = 0; c + 1 < finite.length; c++) {
      const middle = (finite[c]! + finite[c + 1]!) / 2;
      samples.push(middle, middle * (1 - 2 ** -23), middle * (1 + 2 ** -23), finite[c]!);
    }
    const random = new Random(1);
    for (let i = 0; i < 20000; i++) samples.push(random.float() * 2 ** random.int(-12, 10));
    const x = Float32Array.from(samples);
    const cast = e4m3FromF32(x);
    const negative = e4m3FromF32(x.map((v) => -v));
    x.forEach((v, i) => {
      const code = v >= 448 ? 0x7e : nearest(v);
      assert(
        cast[i] === code && negative[i] === (code | 0x80),
        `${v} became ${cast[i]} and ${negative[i]}, not ${code}`,
      );
    });
  });

  test("NaN of any kind", () => {
    assertEquals([...e4m3FromF32(bits(0x7fc00000, 0xffc00000, 0x7f800001, 0xffffffff))], [0x7f, 0x7f, 0x7f, 0x7f]);
  });
});

describe("FP8 blocks", () => {
  const cast = (x: Float32Array, options = {}): { codes: number[]; scales: number[] } => {
    const { data, scales } = castToFp8(bf16FromF32(x), 1, x.length, options);
    return { codes: [...data], scales: [...scales] };
  };

  test("a scale per 128 channels, the last block shorter", () => {
    const x = Float32Array.from({ length: 144 }, (_, i) => i < 128 ? 448 : -7);
    const { codes, scales } = cast(x);
    assertEquals(scales, [Math.fround(448 * Math.fround(1 / 448)), Math.fround(7 * Math.fround(1 / 448))]);
    assertEquals(new Set(codes.slice(0, 128)), new Set([0x7e]));
    assertEquals(new Set(codes.slice(128)), new Set([0xfe]));
  });

  test("zeros have the least scale", () => {
    const least = Math.fround(Math.fround(1e-4) * Math.fround(1 / 448));
    assertEquals(cast(f32(0, -0)), { codes: [0, 0x80], scales: [least] });
  });

  test("NaN is left out of the scale, infinity is not", () => {
    assertEquals(cast(f32(NaN, 448, 1)), {
      codes: [0x7f, 0x7e, 0x38],
      scales: [Math.fround(448 * Math.fround(1 / 448))],
    });
    // 448 / Infinity = 0, and Infinity * 0 is NaN.
    assertEquals(cast(f32(Infinity, 5, -5)), { codes: [0x7f, 0, 0x80], scales: [Infinity] });
    // 2 ** -128 is the reciprocal of the next power of two; infinity saturates.
    const largest = f32FromBf16(Uint16Array.of(0x7f7f))[0]!;
    const rounded = cast(f32(Infinity, 5, -largest), { round: true });
    assertEquals(rounded, { codes: [0x7e, 0, 0xb8], scales: [Infinity] });
  });

  test("the quotient 448 / amax itself is the scale", () => {
    // Chosen so that 448 * (1 / amax), or 1 / the scale that is sent, gives another code.
    assertEquals(cast(f32(1.078125, 0.80859375, 0.404296875)).codes, [0x7e, 122, 114]);
    assertEquals(cast(f32(1.203125, 0.01275634765625, 0.0308837890625)).codes, [0x7e, 74, 84]);
    const x = f32FromBf16(new Random(5).edgesOfFp8(128 * 200));
    const codes = castToFp8(bf16FromF32(x), 200, 128).data;
    for (let row = 0; row < 200; row++) {
      const scale = Math.fround(448 / x[row * 128]!);
      assertEquals(
        codes.slice(row * 128, row * 128 + 128),
        e4m3FromF32(x.slice(row * 128, row * 128 + 128).map((v) => v * scale)),
      );
    }
  });

  test("rounded scales are the least power of two that is enough", () => {
    const random = new Random(2);
    for (let i = 0; i < 2000; i++) {
      const x = f32FromBf16(random.bf16(16));
      const amax = Math.max(...x.map(Math.abs));
      const [scale] = cast(x, { round: true }).scales;
      const inverse = Math.fround(amax * Math.fround(1 / 448));
      assert(Number.isInteger(Math.log2(scale!)) && scale! >= inverse && scale! / 2 < inverse, `${amax}: ${scale}`);
    }
    const power = 2 ** 5 / Math.fround(1 / 448); // a product that is itself a power of two stays
    assertEquals(cast(f32(power), { round: true }).scales, [32]);
  });

  test("ue8m0 packs the exponents of the rounded scales, absent ones are 0", () => {
    const hidden = 128 * 5 + 16;
    const x = new Random(3).bf16(3 * hidden);
    const rounded = castToFp8(x, 3, hidden, { round: true });
    const packed = castToFp8(x, 3, hidden, { round: true, ue8m0: true });
    assertEquals([rounded.numScales, packed.numScales], [6, 2]);
    assertEquals(packed.data, rounded.data);
    const exponents = bytesOf(packed.scales);
    for (let row = 0; row < 3; row++) {
      for (let b = 0; b < 8; b++) {
        const expected = b < 6 ? Math.log2(rounded.scales[row * 6 + b]!) + 127 : 0;
        assertEquals(exponents[row * 8 + b], expected);
      }
    }
    assertEquals(
      castFromFp8(packed.data, packed.scales, 3, hidden),
      castFromFp8(rounded.data, rounded.scales, 3, hidden),
    );
  });

  test("back again within a 16th", () => {
    const x = new Random(4).bf16(4 * 400);
    for (const options of [{}, { round: true }]) {
      const { data, scales } = castToFp8(x, 4, 400, options);
      const back = f32FromBf16(castFromFp8(data, scales, 4, 400));
      f32FromBf16(x).forEach((v, i) => {
        const block = scales[Math.floor(i / 400) * 4 + Math.floor((i % 400) / 128)]!;
        // 3 mantissa bits: half a step is a 16th; below 2 ** -6 steps are 2 ** -9; and bf16 rounds once more.
        assert(Math.abs(back[i]! - v) <= Math.max(Math.abs(v) / 15.5, block * 2 ** -9), `${v} came back as ${back[i]}`);
      });
    }
  });

  test("refuses what does not fit", () => {
    assertThrows(() => castToFp8(new Uint16Array(4), 1, 8), RangeError, "4 elements are not 1 rows of 8");
    assertThrows(() => castToFp8(new Uint16Array(8), 1, 8, { ue8m0: true }), RangeError, "ue8m0 needs round");
    assertThrows(() => castFromFp8(new Uint8Array(8), new Float32Array(2), 1, 8), RangeError, "2 elements");
    assertEquals([numFp8Scales(1), numFp8Scales(129), numFp8Scales(513, { ue8m0: true })], [1, 2, 2]);
  });
});

test("views share the bytes, and refuse halves of elements", () => {
  const bytes = new Uint8Array(new ArrayBuffer(32), 8, 16);
  for (const dtype of Object.keys(itemSize) as DType[]) {
    const view = viewAs(dtype, bytes);
    assertEquals([view.length * itemSize[dtype], view.byteOffset, view.BYTES_PER_ELEMENT], [16, 8, itemSize[dtype]]);
  }
  viewAs("i32", bytes)[1] = 0x01020304;
  assertEquals([...bytes.subarray(4, 8)], [4, 3, 2, 1]);
  assertThrows(() => viewAs("i32", bytes.subarray(1, 5)), RangeError, "Cannot view 4 bytes at offset 9 as i32");
  assertThrows(() => viewAs("i64", bytes.subarray(0, 12)), RangeError, "as i64");
});
