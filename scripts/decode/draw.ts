/**
 * What a rank sends in a decode step, and what must come back: decode.cu's drawing and checking, said once more for the host.
 *
 * In: a shape, a seed, a step and a rank. Out: rows, routing and weights, bit for bit those that draw_kernel makes; and the
 * combined tokens, computed from them alone. Called by soak.ts and the tests: on cuda for samples, on cpu for every step.
 */

/** The sizes of a step; the same on every rank. */
export interface DecodeShape {
  /** Tokens of each rank. */
  readonly tokens: number;
  readonly hidden: number;
  readonly experts: number;
  readonly topk: number;
}

/** What stands in for experts: expert e makes `x * (e % multiply + 1) + e % add` of x, rounded to bf16. 1, 1: the identity. */
export interface StandIn {
  readonly multiply: number;
  readonly add: number;
}

/** What a rank sends. */
export interface Drawn {
  /** bf16 [tokens, hidden]. */
  readonly x: Uint16Array;
  /** i32 [tokens, topk]. */
  readonly topkIdx: Int32Array;
  /** f32 [tokens, topk]. */
  readonly topkWeights: Float32Array;
}

function mix(word: number): number {
  let z = Math.imul(word ^ (word >>> 16), 0x21f0aaad);
  z = Math.imul(z ^ (z >>> 15), 0x735a2d97);
  return (z ^ (z >>> 15)) >>> 0;
}

const scratch = new Float32Array(1), bits = new Uint32Array(scratch.buffer);

/** bf16 of an f32, to nearest, ties to even. */
function bf16Of(value: number): number {
  scratch[0] = value;
  return (bits[0]! + 0x7fff + (bits[0]! >>> 16 & 1)) >>> 16;
}

function f32Of(bf16: number): number {
  bits[0] = bf16 << 16;
  return scratch[0]!;
}

/** What a rank sends in a step. */
export function draw(shape: DecodeShape, at: { seed: number; step: number; rank: number }): Drawn {
  const { tokens, hidden, experts, topk } = shape;
  const x = new Uint16Array(tokens * hidden), topkIdx = new Int32Array(tokens * topk);
  const topkWeights = new Float32Array(tokens * topk);
  const ofStep = mix((at.seed + at.step + Math.imul(0x9e3779b9, at.rank + 1)) | 0);
  const spread = Math.max(1, Math.floor(experts / topk)), crowd = Math.floor(experts / 8) + 1;
  for (let token = 0; token < tokens; token++) {
    const ofToken = (ofStep + Math.imul(0x85ebca6b, token + 1)) | 0;
    const drawn = (what: number): number => mix((mix(ofToken) + Math.imul(0xc2b2ae35, what)) | 0);
    const word = drawn(0),
      first = (word >>> 4) % (at.step % 4 === 0 ? crowd : experts),
      stride = 1 + (word >>> 16) % spread;
    for (let k = 0; k < topk; k++) {
      const entry = drawn(1 + k), none = word % 16 === 0 || entry % 16 === 0;
      topkIdx[token * topk + k] = none ? -1 : (first + k * stride) % experts;
      topkWeights[token * topk + k] = (1 + (entry >>> 8) % 255) / 256;
    }
    const power = 2 ** ((word >>> 8) % 7 - 3);
    for (let c = 0; c < hidden; c++) {
      const whole = c % 128 === 0 ? 448 : drawn(64 + c) % 33 - 16;
      x[token * hidden + c] = bf16Of(power * whole);
    }
  }
  return { x, topkIdx, topkWeights };
}

/** bf16 [tokens, hidden]: what must come back. */
export function expected(shape: DecodeShape, { x, topkIdx, topkWeights }: Drawn, standIn: StandIn): Uint16Array {
  const { hidden, topk } = shape, out = new Uint16Array(x.length);
  for (let i = 0; i < x.length; i++) {
    const value = f32Of(x[i]!), entries = Math.floor(i / hidden) * topk;
    let sum = 0;
    for (let k = entries; k < entries + topk; k++) {
      const expert = topkIdx[k]!;
      if (expert < 0) continue;
      const y = Math.fround(Math.fround(value * (expert % standIn.multiply + 1)) + expert % standIn.add);
      sum = Math.fround(sum + Math.fround(topkWeights[k]! * f32Of(bf16Of(y))));
    }
    out[i] = bf16Of(sum);
  }
  return out;
}

/** The first token in which two results differ, or -1. */
export function firstWrong({ hidden }: DecodeShape, got: Uint16Array, want: Uint16Array): number {
  for (let i = 0; i < want.length; i++) if (got[i] !== want[i]) return Math.floor(i / hidden);
  return -1;
}
