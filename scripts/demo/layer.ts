/**
 * The Mixture-of-Experts layer itself: seeded embeddings, gate and experts, and the arithmetic on them. In: token ids, or
 * rows. Out: bf16 rows, a routing, expert outputs. It knows no ranks: called by the modes for the rows that a rank
 * received, and by the dense check for all rows.
 *
 * A row's result never depends on the rows beside it: every inner product is summed in f64 in ascending order and rounded
 * to f32 once. That is why a distributed result can be compared bit for bit.
 */
import { bf16FromF32, f32FromBf16 } from "../../lib/dtype.ts";
import { gateDeepSeekV3, type Routing } from "../../lib/reference/gate.ts";
import { Random } from "../../tests/support/random.ts";

/** Experts of the layer, and how many a token takes: DeepSeek-V3's. */
export const NUM_EXPERTS = 256, NUM_TOPK = 8, NUM_GROUPS = 8, NUM_TOPK_GROUPS = 4;
/** Width of an expert. Small, so that JavaScript computes thousands of rows in a second. */
export const INTERMEDIATE = 64;

/** The weights of a gated feed-forward: `down(silu(gate(x)) * up(x))`. */
export interface Expert {
  /** f32 [INTERMEDIATE, hidden]. */
  readonly gate: Float32Array;
  /** f32 [INTERMEDIATE, hidden]. */
  readonly up: Float32Array;
  /** f32 [hidden, INTERMEDIATE]. */
  readonly down: Float32Array;
}

/** `out[r, c]` = the sum over k of `x[r, k] * w[c, k]`. */
export function matmul(
  out: Float32Array,
  x: Float32Array,
  w: Float32Array,
  shape: { rows: number; inner: number; columns: number },
): void {
  const { rows, inner, columns } = shape;
  // Four rows by two columns at a time, so that a loaded value serves several products. At an edge the last row or
  // column stands in for those that are missing: it is computed again, to the same value.
  for (let r = 0; r < rows; r += 4) {
    const r1 = Math.min(r + 1, rows - 1), r2 = Math.min(r + 2, rows - 1), r3 = Math.min(r + 3, rows - 1);
    const x0 = r * inner, x1 = r1 * inner, x2 = r2 * inner, x3 = r3 * inner;
    for (let c = 0; c < columns; c += 2) {
      const d = Math.min(c + 1, columns - 1), wc = c * inner, wd = d * inner;
      let c0 = 0, c1 = 0, c2 = 0, c3 = 0, d0 = 0, d1 = 0, d2 = 0, d3 = 0;
      for (let k = 0; k < inner; k++) {
        const u = w[wc + k]!, v = w[wd + k]!;
        const a = x[x0 + k]!, b = x[x1 + k]!, e = x[x2 + k]!, f = x[x3 + k]!;
        c0 += u * a;
        c1 += u * b;
        c2 += u * e;
        c3 += u * f;
        d0 += v * a;
        d1 += v * b;
        d2 += v * e;
        d3 += v * f;
      }
      out[r * columns + c] = c0, out[r * columns + d] = d0;
      out[r1 * columns + c] = c1, out[r1 * columns + d] = d1;
      out[r2 * columns + c] = c2, out[r2 * columns + d] = d2;
      out[r3 * columns + c] = c3, out[r3 * columns + d] = d3;
    }
  }
}

/** What an expert makes of f32 [rows, hidden]; out f32 [rows, hidden]. */
export function feedForward(expert: Expert, x: Float32Array, hidden: number): Float32Array {
  const rows = x.length / hidden;
  const gate = new Float32Array(rows * INTERMEDIATE), up = new Float32Array(rows * INTERMEDIATE);
  matmul(gate, x, expert.gate, { rows, inner: hidden, columns: INTERMEDIATE });
  matmul(up, x, expert.up, { rows, inner: hidden, columns: INTERMEDIATE });
  for (let i = 0; i < gate.length; i++) gate[i] = gate[i]! / (1 + Math.exp(-gate[i]!)) * up[i]!; // SiLU, gated
  const out = new Float32Array(rows * hidden);
  matmul(out, gate, expert.down, { rows, inner: INTERMEDIATE, columns: hidden });
  return out;
}

/** Where the seeds of the parts begin; experts and tokens count from there. */
const SEED = { gate: 0x6a7e, bias: 0xb1a5, embeddings: 0x10000, experts: 0x20000 };

/** A layer of a given width. The same width gives the same weights in every process. */
export class Layer {
  readonly hidden: number;
  readonly #gate: Float32Array;
  readonly #bias: Float32Array;

  constructor(hidden: number) {
    this.hidden = hidden;
    this.#gate = uniform(SEED.gate, NUM_EXPERTS * hidden, hidden);
    this.#bias = uniform(SEED.bias, NUM_EXPERTS, 1).map((b) => 0.02 * b); // balances the load, in a trained model
  }

  /** Weights in all. */
  get numWeights(): number {
    return NUM_EXPERTS * (3 * INTERMEDIATE * this.hidden + this.hidden);
  }

  /** The weights of an expert. Made anew at each call: that is faster than reading them from far memory. */
  expert(index: number): Expert {
    const { hidden } = this, all = uniform(SEED.experts + index, 3 * INTERMEDIATE * hidden, hidden);
    const part = INTERMEDIATE * hidden;
    const down = all.subarray(2 * part).map((w) => w * Math.sqrt(hidden / INTERMEDIATE));
    return { gate: all.subarray(0, part), up: all.subarray(part, 2 * part), down };
  }

  /**
   * The layer's input for tokens `first` … `first + count - 1` of a text, bf16 [count, hidden]: the embedding of each token
   * plus half the state before it, brought to unit size. So each row depends on all words before it, and two rows that
   * changed places would be noticed.
   */
  embed(ids: Int32Array, { first, count }: { first: number; count: number }): Uint16Array {
    const { hidden } = this, known = new Map<number, Float32Array>();
    const state = new Float32Array(hidden), rows = new Float32Array(count * hidden);
    for (let t = 0; t < first + count; t++) {
      const id = ids[t]!, embedding = known.get(id) ?? uniform(SEED.embeddings + id, hidden, 1);
      known.set(id, embedding);
      let squares = 0;
      for (let i = 0; i < hidden; i++) {
        state[i] = embedding[i]! + 0.5 * state[i]!;
        squares += state[i]! * state[i]!;
      }
      const scale = 1 / Math.sqrt(squares / hidden);
      for (let i = 0; t >= first && i < hidden; i++) rows[(t - first) * hidden + i] = state[i]! * scale;
    }
    return bf16FromF32(rows);
  }

  /** The routing of bf16 [count, hidden]. */
  route(x: Uint16Array): Routing {
    const rows = x.length / this.hidden, logits = new Float32Array(rows * NUM_EXPERTS);
    matmul(logits, f32FromBf16(x), this.#gate, { rows, inner: this.hidden, columns: NUM_EXPERTS });
    return gateDeepSeekV3(logits, rows, {
      numExperts: NUM_EXPERTS,
      numGroups: NUM_GROUPS,
      numTopkGroups: NUM_TOPK_GROUPS,
      numTopk: NUM_TOPK,
      bias: this.#bias,
    });
  }
}

/** `count` seeded numbers of mean 0 and variance `1 / fanIn`. */
function uniform(seed: number, count: number, fanIn: number): Float32Array {
  const random = new Random(Math.imul(seed, 0x9e3779b1)), out = new Float32Array(count);
  const scale = Math.sqrt(3 / fanIn) / 2 ** 31;
  for (let i = 0; i < count; i++) out[i] = (random.uint32() - 2 ** 31) * scale;
  return out;
}
