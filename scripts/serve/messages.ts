/**
 * What the HTTP server's thread and the ranks' workers say to each other, and the rows they speak of.
 *
 * In: nothing. Out: types, and the routing of a request. Called by serve.ts and the files beside this one.
 */
import type { Backend } from "../../mod.ts";
import type { DecodeShape } from "../decode/draw.ts";
import type { Percentiles } from "./delay.ts";

/** A rank's place, and what it runs. */
export interface RankPlace {
  readonly rank: number;
  readonly size: number;
  readonly port: number;
  readonly secret: string;
  readonly backend: Backend | "auto";
  readonly shape: DecodeShape;
  /** i32: the step before which every rank stops. Rank 0 sets it, see worker.ts. */
  readonly limit: SharedArrayBuffer;
}

/** What a rank tells of itself. */
export interface RankMetrics {
  readonly rank: number;
  readonly backend: Backend;
  readonly steps: number;
  readonly requests: number;
  readonly maskedRanks: readonly number[];
  readonly failures: number;
  /** How long the worker's event loop let an event wait, since it was reset. */
  readonly delay: Percentiles;
}

/** To a rank. Rows are bf16 [n, hidden]. */
export type ToRank =
  | { readonly kind: "open"; readonly place: RankPlace; readonly pulse: MessagePort }
  | { readonly kind: "generate"; readonly id: number; readonly rows: Uint16Array }
  | { readonly kind: "metrics"; readonly id: number; readonly reset: boolean }
  | { readonly kind: "stop" };

/** From a rank. */
export type FromRank =
  | { readonly kind: "listening" }
  | { readonly kind: "open"; readonly backend: Backend }
  | { readonly kind: "generated"; readonly id: number; readonly rows: Uint16Array<ArrayBuffer> }
  | { readonly kind: "metrics"; readonly id: number; readonly metrics: RankMetrics }
  | { readonly kind: "stopped" }
  | { readonly kind: "failed"; readonly message: string };

/**
 * The routing of a row, in place of a gate: different experts, by the row's bits; weights that sum up to 1, so that identity
 * experts give a row back as it was, bit for bit if it survives the cast to FP8.
 */
export function route(row: Uint16Array, { experts, topk }: DecodeShape, idx: Int32Array, weights: Float32Array): void {
  let hash = 0;
  for (let c = 0; c < Math.min(8, row.length); c++) hash = Math.imul(hash ^ row[c]!, 0x21f0aaad) >>> 0;
  const stride = 1 + (hash >>> 16) % Math.max(1, Math.floor(experts / topk));
  for (let k = 0; k < topk; k++) {
    idx[k] = (hash % experts + k * stride) % experts;
    weights[k] = 2 ** -Math.min(k + 1, topk - 1);
  }
}

/** A row of whole numbers that the cast to FP8 keeps: its blocks of 128 channels begin with 448. */
export function exactRow(hidden: number, random: () => number): Uint16Array {
  const floats = Float32Array.from({ length: hidden }, (_, c) => c % 128 === 0 ? 448 : Math.floor(random() * 33) - 16);
  return Uint16Array.from(new Uint32Array(floats.buffer), (bits) => bits >>> 16);
}
