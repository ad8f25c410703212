/**
 * A small seeded generator, so that a failure can be run again from the seed it printed.
 *
 * In: a 32-bit seed. Out: numbers, choices, element arrays. Called by the worlds, the cases and the benchmarks. The step is
 * splitmix32: a counter with a mixing function, period 2 ** 32; good enough to draw shapes and fill rows.
 */
import process from "node:process";

/** The seed of this run: DEEPEP_SEED when it is set, otherwise a new one. Print it. */
export function runSeed(): number {
  const text = process.env["DEEPEP_SEED"];
  return text === undefined ? Math.floor(Math.random() * 2 ** 32) : Number(text) >>> 0;
}

/** A stream of numbers from a seed. */
export class Random {
  /** What it was made from. */
  readonly seed: number;
  #state: number;

  constructor(seed: number) {
    this.seed = seed >>> 0;
    this.#state = this.seed;
  }

  /** 0 … 2 ** 32 - 1. */
  uint32(): number {
    this.#state = (this.#state + 0x9e3779b9) | 0;
    let z = this.#state;
    z = Math.imul(z ^ (z >>> 16), 0x21f0aaad);
    z = Math.imul(z ^ (z >>> 15), 0x735a2d97);
    return (z ^ (z >>> 15)) >>> 0;
  }

  /** An integer, both ends included. */
  int(low: number, high: number): number {
    return low + (this.uint32() % (high - low + 1));
  }

  /** 0 ≤ x < 1. */
  float(): number {
    return this.uint32() / 2 ** 32;
  }

  /** True with a probability. */
  chance(probability: number): boolean {
    return this.float() < probability;
  }

  /** One of them. */
  pick<T>(items: readonly T[]): T {
    return items[this.int(0, items.length - 1)]!;
  }

  /** `count` different integers of 0 … below - 1, in random order. */
  distinct(count: number, below: number): number[] {
    const all = Array.from({ length: below }, (_, i) => i);
    for (let i = 0; i < count; i++) {
      const j = this.int(i, below - 1);
      [all[i], all[j]] = [all[j]!, all[i]!];
    }
    return all.slice(0, count);
  }

  bytes(count: number): Uint8Array {
    const out = new Uint8Array(count);
    for (let i = 0; i < count; i++) out[i] = this.uint32();
    return out;
  }

  /** bf16 of either sign, of magnitudes 2 ** -8 … 2 ** 8. */
  bf16(count: number): Uint16Array {
    const out = new Uint16Array(count); // a plain loop: benchmarks fill hundreds of megabytes
    for (let i = 0; i < count; i++) {
      const u = this.uint32();
      out[i] = ((u & 1) << 15) | ((119 + ((u >>> 1) & 15)) << 7) | ((u >>> 8) & 127);
    }
    return out;
  }

  /** bf16 of any bits but NaN: infinities, zeros of both signs and subnormals come often. */
  wildBf16(count: number): Uint16Array {
    const special = [0x0000, 0x8000, 0x0001, 0x8001, 0x007f, 0x0080, 0x7f7f, 0xff7f, 0x7f80, 0xff80];
    return Uint16Array.from({ length: count }, () => {
      const bits = this.chance(0.3) ? this.pick(special) : this.uint32() & 0xffff;
      return (bits & 0x7fff) > 0x7f80 ? bits & 0xff80 : bits;
    });
  }

  /**
   * bf16 whose blocks of 128, counted from the start, begin with their largest magnitude; the others lie, as near as bf16 can, half way between two e4m3
   * values once they are scaled by it. A scale that is off by one unit in its last place shows.
   */
  edgesOfFp8(count: number): Uint16Array {
    let largest = 0;
    const floats = Float32Array.from({ length: count }, (_, i) => {
      if (i % 128 === 0) largest = (128 + this.int(0, 127)) * 2 ** this.int(-12, 4);
      const middle = (17 + 2 * this.int(0, 7)) * 2 ** this.int(-6, 3); // 448 is 28 * 2 ** 4
      return i % 128 === 0 ? largest : Math.min(largest, middle * largest / 448);
    });
    return Uint16Array.from(new Uint32Array(floats.buffer), (bits) => Math.min(bits + 0x8000, 0x7f7fffff) >>> 16);
  }

  /** bf16 of integers from -limit to limit. */
  smallBf16(count: number, limit: number): Uint16Array {
    const floats = Float32Array.from({ length: count }, () => this.int(-limit, limit));
    return Uint16Array.from(new Uint32Array(floats.buffer), (bits) => bits >>> 16); // up to 256 they are exact in bf16
  }

  /** f32, 0 < x < 1. */
  weights(count: number): Float32Array {
    return Float32Array.from({ length: count }, () => (this.uint32() + 1) / (2 ** 32 + 2));
  }
}
