/**
 * Expert functions: from received rows to expert outputs, the same for the reference and for a backend.
 *
 * In: a world and what a rank received. Out: bf16 rows for combine. Called by the cases and the benchmarks. Expert e computes
 * `x * (e % 3 + 1) + e % 5` in f32, rounded to bf16; that keeps small integers exact, so a dense sum computed in any order
 * must agree. Padding becomes NaN, which combine must not read.
 */
import { bf16FromF32, castFromFp8, f32FromBf16, viewAs } from "../../lib/dtype.ts";
import { localExperts } from "../../lib/layout.ts";
import type { ExpertRows, LowLatencyOutput, RankOutput } from "../../lib/reference/mod.ts";
import { rowShape, type TestWorld } from "./worlds.ts";

/** What an expert makes of a value. */
export function expertValue(expert: number, x: number): number {
  return Math.fround(Math.fround(x * (expert % 3 + 1)) + expert % 5);
}

/** bf16 [numRows, hidden] in expert layout: each row through its expert. */
export function expertLayoutOutput(world: TestWorld, rank: number, recv: RankOutput): Uint16Array {
  const { hidden, numExperts, numRanks } = world;
  const values = decodeRows(world, recv);
  const out = new Float32Array(values.length).fill(NaN);
  const { first } = localExperts(numExperts, numRanks, rank);
  let row = 0;
  recv.numTokensPerExpert.forEach((count, e) => {
    for (const end = row + count; row < end; row++) {
      if (recv.srcIdx[row]! < 0) continue;
      for (let i = row * hidden; i < (row + 1) * hidden; i++) out[i] = expertValue(first + e, values[i]!);
    }
  });
  return bf16FromF32(out);
}

/** bf16 [numRows, hidden] in rank layout: for each row the sum over its local experts, weighted when weights came along. */
export function rankLayoutOutput(world: TestWorld, rank: number, recv: RankOutput): Uint16Array {
  const { hidden, numExperts, numRanks, numTopk } = world;
  const values = decodeRows(world, recv);
  const out = new Float32Array(values.length);
  const { first } = localExperts(numExperts, numRanks, rank);
  for (let row = 0; row < recv.numRows; row++) {
    for (let i = row * hidden; i < (row + 1) * hidden; i++) {
      if (recv.topkIdx === undefined) out[i] = expertValue(rank, values[i]!);
      for (let k = 0; recv.topkIdx !== undefined && k < numTopk; k++) {
        const expert = Number(recv.topkIdx[row * numTopk + k]!);
        const weight = recv.topkWeights?.[row * numTopk + k] ?? 1;
        if (expert >= 0) out[i]! += Math.fround(weight * expertValue(first + expert, values[i]!));
      }
    }
  }
  return bf16FromF32(out);
}

/** bf16 [rows, hidden] of each local expert, in low-latency mode. `payload` is what was received, not what was sent. */
export function lowLatencyOutput(world: TestWorld, rank: number, recv: LowLatencyOutput): Uint16Array[] {
  const { first } = localExperts(world.numExperts, world.numRanks, rank);
  return recv.experts.map((rows, e) =>
    bf16FromF32(decodeRows(world, rows).map((value) => expertValue(first + e, value)))
  );
}

/** f32 [rows, hidden]: the values that received bytes stand for. Bytes of an unknown format stand for themselves. */
function decodeRows(world: TestWorld, { x, scales }: Pick<ExpertRows, "x" | "scales">): Float32Array {
  const { payload, hidden } = world;
  const { rowBytes } = rowShape(world);
  const rows = x.length / rowBytes;
  if (payload.kind === "bf16") return f32FromBf16(viewAs("bf16", x));
  if (payload.kind === "fp8") {
    const typed = viewAs(payload.ue8m0 ? "i32" : "f32", scales ?? new Uint8Array(0));
    return f32FromBf16(castFromFp8(x, typed, rows, hidden));
  }
  return Float32Array.from(
    { length: rows * hidden },
    (_, i) => x[Math.floor(i / hidden) * rowBytes + (i % hidden) % rowBytes]!,
  );
}
