/**
 * Plans: pure functions from options and shapes to sizes, tested without a device. In: what the user gives
 * `EpBuffer.create`. Out: checked options with every default filled in, and what a dispatch moves. Called by connect.ts,
 * by the bench for its lower bounds, and by anyone who wants to print them.
 */
import { limits } from "./ffi/abi.ts";

/** Options of a buffer that every rank must give alike. */
export interface BufferShape {
  /** Channels a token. A multiple of 8. */
  hidden: number;
  /** Experts in all. They need not divide by the ranks: the first `numExperts % ranks` ranks own one more. */
  numExperts: number;
  /** Largest number of experts a token, 1 to 32. */
  numTopk: number;
  /** Largest number of tokens a rank dispatches in normal mode, 0 to 65536. */
  maxTokensPerRank: number;
  /** Largest number of tokens a rank dispatches in low-latency mode. Default 0: no low-latency mode. */
  maxLowLatencyTokensPerRank?: number;
  /**
   * Rows a slot holds in normal mode. Default: the worst case of both layouts, with an `expertAlignment` up to 128 and no
   * expert twice in a token, while a slot's rows stay under 1 GiB; beyond it the worst case of the rank layout, but no less
   * than twice the mean of the expert layout (`2 * maxTokensPerRank * numTopk`).
   */
  maxRecvTokens?: number;
  /** Results that can be held at once, 1 to 8. Default 2. */
  numSlots?: number;
  /** Largest payload row, bytes. Default `2 * hidden` (bf16). */
  maxRowBytes?: number;
  /** Largest row of scales, bytes. Default 4 bytes per 128 channels. */
  maxScaleBytes?: number;
}

/** Every option with its value. */
export interface ResolvedOptions extends Required<BufferShape> {
  /** Ranks in the group. */
  numRanks: number;
}

const GIB = 2 ** 30;

/** The value of an option, checked. @throws {TypeError} when it is no number @throws {RangeError} when out of range */
export function whole(name: string, value: number, least: number, most: number): number {
  if (typeof value !== "number") {
    throw new TypeError(`Cannot create a buffer: ${name} is ${typeof value}, needs a number`);
  }
  if (!(Number.isSafeInteger(value) && value >= least && value <= most)) {
    throw new RangeError(`Cannot create a buffer: ${name} is ${value}, needs a whole number from ${least} to ${most}`);
  }
  return value;
}

/** Checks options and fills in the defaults. @throws {RangeError} naming the option, its value and the range */
export function resolveOptions(shape: BufferShape, numRanks: number): ResolvedOptions {
  whole("numRanks", numRanks, 1, limits.RANKS[0]);
  const hidden = whole("hidden", shape.hidden, 8, limits.HIDDEN[0]);
  if (hidden % 8 !== 0) {
    throw new RangeError(
      `Cannot create a buffer: hidden is ${hidden}, ${2 * hidden} bytes in bf16, needs a multiple of 16 bytes`,
    );
  }
  const numExperts = whole("numExperts", shape.numExperts, 1, limits.EXPERTS[0]);
  const numTopk = whole("numTopk", shape.numTopk, 1, limits.TOPK[0]);
  const maxTokensPerRank = whole("maxTokensPerRank", shape.maxTokensPerRank, 0, limits.TOKENS[0]);
  const maxLowLatencyTokensPerRank = whole(
    "maxLowLatencyTokensPerRank",
    shape.maxLowLatencyTokensPerRank ?? 0,
    0,
    limits.TOKENS[0],
  );
  const maxRowBytes = whole("maxRowBytes", shape.maxRowBytes ?? 2 * hidden, 16, limits.ROW_BYTES[0]);
  if (maxRowBytes % 16 !== 0) {
    throw new RangeError(`Cannot create a buffer: maxRowBytes is ${maxRowBytes}, needs a multiple of 16`);
  }
  const maxScaleBytes = whole(
    "maxScaleBytes",
    shape.maxScaleBytes ?? 4 * Math.ceil(hidden / 128),
    0,
    limits.ROW_BYTES[0],
  );
  const rowBytes = maxRowBytes + maxScaleBytes + 2 * hidden; // received and expert output
  const localExperts = Math.ceil(numExperts / numRanks);
  const rankWorst = maxTokensPerRank * numRanks;
  const expertWorst = rankWorst * Math.min(numTopk, localExperts) + 128 * localExperts;
  const affordable = Math.max(rankWorst, expertWorst) * rowBytes <= GIB;
  const fallback = Math.max(rankWorst, 2 * maxTokensPerRank * numTopk);
  return {
    hidden,
    numExperts,
    numTopk,
    maxTokensPerRank,
    maxLowLatencyTokensPerRank,
    maxRecvTokens: whole(
      "maxRecvTokens",
      shape.maxRecvTokens ?? Math.max(1, affordable ? Math.max(rankWorst, expertWorst) : fallback),
      1,
      limits.RECV_TOKENS[0],
    ),
    numSlots: whole("numSlots", shape.numSlots ?? 2, 1, limits.SLOTS[0]),
    maxRowBytes,
    maxScaleBytes,
    numRanks,
  };
}

/** What one dispatch and its combine move, in all ranks together. */
export interface TrafficPlan {
  /** Tokens sent, each counted once. */
  readonly tokens: number;
  /** Rows written to their final place. */
  readonly rows: number;
  /** Payload and scale bytes of a row. */
  readonly rowBytes: number;
  /** Least bytes through memory: each source row read once, each received row written once. */
  readonly bytes: number;
}

/** The least traffic of moving `rows` rows of `tokens` source rows. Printable with {@linkcode formatPlan}. */
export function trafficPlan(tokens: number, rows: number, rowBytes: number): TrafficPlan {
  return { tokens, rows, rowBytes, bytes: (tokens + rows) * rowBytes };
}

/** One line for people. */
export function formatPlan(plan: TrafficPlan): string {
  return `${plan.tokens} tokens -> ${plan.rows} rows of ${plan.rowBytes} B, ` +
    `(${plan.tokens} + ${plan.rows}) * ${plan.rowBytes} = ${plan.bytes} B`;
}
