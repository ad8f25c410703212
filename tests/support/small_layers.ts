/**
 * Layers of a tiny buffer (`tiny` of ranks.ts) that check themselves: each token comes back as often as it was sent. In: a buffer
 * of 2 to 4 ranks, who is masked. Out: it throws where the sums are others. Called by the cases of failures.
 */
import { assertEquals } from "@std/assert";
import {
  bf16FromF32,
  type EpBuffer,
  f32FromE4m3,
  type OperationOptions,
  type ScaledRows,
  Tensor,
} from "@deepep/deepep";

export const NUM_TOKENS = 3;
/** Token t of rank r goes to experts (r + t) % 8 and (r + t + 3) % 8. */
export const route = (rank: number, numTokens = NUM_TOKENS) =>
  Int32Array.from({ length: 2 * numTokens }, (_, i) => (rank + (i >> 1) + 3 * (i & 1)) % 8);
export const input = (b: EpBuffer, numTokens = NUM_TOKENS) =>
  b.tensor("bf16", [numTokens, 16], Float32Array.from({ length: numTokens * 16 }, (_, i) => b.rank + i % 5));

/** Distinct ranks among the destinations of a token, without `gone`. */
function destinations(rank: number, t: number, ranks: number, gone: readonly number[]): number {
  const owner = (e: number) => Math.floor(e / (8 / ranks));
  const found = new Set([...route(rank, t + 1).subarray(2 * t)].map(owner));
  gone.forEach((g) => found.delete(g));
  return found.size;
}

/** One layer with identity experts; the result is the token times its destinations. */
export async function normalLayer(
  b: EpBuffer,
  gone: readonly number[] = [],
  call: OperationOptions = {},
  numTokens = NUM_TOKENS,
): Promise<void> {
  using x = input(b, numTokens), topkIdx = b.tensor("i32", [numTokens, 2], route(b.rank, numTokens));
  using recv = await b.dispatch(x, { topkIdx, ...call });
  using out = await b.combine(recv.x, recv.handle, call);
  await check(b, x, out.x, gone, (t) => destinations(b.rank, t, b.numRanks, gone));
}

/** The same in low-latency mode with weights 1: a row per entry. With `cast` rows travel as FP8, and lose nothing by it. */
export async function lowLatencyLayer(
  b: EpBuffer,
  gone: readonly number[] = [],
  { cast = false, ...call }: OperationOptions & { recvHook?: boolean; cast?: boolean } = {},
): Promise<void> {
  using x = input(b), topkIdx = b.tensor("i32", [NUM_TOKENS, 2], route(b.rank));
  using topkWeights = b.tensor("f32", [NUM_TOKENS, 2], new Float32Array(2 * NUM_TOKENS).fill(1));
  using recv = b.lowLatencyDispatch(x, { topkIdx, fp8: cast, roundScale: cast, ...call });
  await recv.received();
  using rows = recv.x instanceof Tensor ? undefined : b.tensor("bf16", recv.x.data.shape, await backFromFp8(recv.x));
  const y = rows ?? recv.x as Tensor;
  using out = b.lowLatencyCombine(y, { topkIdx, topkWeights, handle: recv.handle, ...call });
  await out.received();
  const perRank = 8 / b.numRanks;
  const present = (t: number) =>
    [...route(b.rank).subarray(2 * t, 2 * t + 2)].filter((e) => !gone.includes(Math.floor(e / perRank))).length;
  await check(b, x, out.x, gone, present);
}

/** Rows as they were before the cast; what was not received is not looked at. */
async function backFromFp8({ data, scales }: ScaledRows): Promise<Uint16Array> {
  const values = f32FromE4m3(await data.read() as Uint8Array), by = await scales.read() as Float32Array;
  return bf16FromF32(values.map((v, i) => v * by[Math.floor(i / 16)]!));
}

async function check(
  b: EpBuffer,
  x: Tensor,
  out: Tensor,
  gone: readonly number[],
  times: (t: number) => number,
): Promise<void> {
  const float = (bits: number) => new Float32Array(Uint32Array.of(bits << 16).buffer)[0]!;
  const sent = [...await x.read() as Uint16Array].map(float), got = [...await out.read() as Uint16Array].map(float);
  const want = sent.map((v, i) => v * times(Math.floor(i / 16)));
  assertEquals(got, want, `rank ${b.rank} without ${gone.join()}`);
}
