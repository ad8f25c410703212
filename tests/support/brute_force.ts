/**
 * Checks that share nothing with the reference: invariants of what was received, and a dense sum.
 *
 * In: a world and outputs. Out: an error that names what does not hold. They keep the reference honest where it is both oracle and
 * subject. Experts are dealt to ranks one at a time here instead of by a formula, rows are looked up by what they hold instead of
 * placed, and sums run over all experts in f64 instead of over received rows.
 */
import { bf16FromF32, f32FromBf16, viewAs } from "../../lib/dtype.ts";
import type { RankOutput, RowLayout } from "../../lib/reference/mod.ts";
import { expertValue } from "./experts.ts";
import type { TestWorld } from "./worlds.ts";

/** The rank of each expert, found by filling one rank after the other. */
export function dealExperts(numExperts: number, numRanks: number): number[] {
  const sizes = new Array<number>(numRanks).fill(0);
  for (let expert = 0; expert < numExperts; expert++) sizes[expert % numRanks]! += 1;
  return sizes.flatMap((size, rank) => new Array<number>(size).fill(rank));
}

/**
 * Checks what every rank received in a dispatch: bytes are the source token's, nothing is lost or made up, rows are in order,
 * padding is where it belongs, counts count.
 */
export function checkReceived(
  world: TestWorld,
  ranks: readonly RankOutput[],
  call: { layout: RowLayout; expertAlignment: number },
): void {
  const owners = dealExperts(world.numExperts, world.numRanks);
  const must = (holds: boolean, what: string): void => {
    if (!holds) throw new Error(`${world.name}, seed ${world.seed}, ${JSON.stringify(call)}: ${what}`);
  };
  ranks.forEach((recv, rank) => {
    const experts = owners.flatMap((owner, expert) => owner === rank ? [expert] : []);
    // Rows as text "source token", so that multisets can be compared by sorting.
    const wanted: string[] = [];
    let numEntries = 0;
    world.inputs.forEach((input, source) => {
      for (let token = 0; token < input.numTokens; token++) {
        const routed = Array.from(input.topkIdx!, Number).slice(token * world.numTopk, (token + 1) * world.numTopk);
        const here = routed.filter((expert) => experts.includes(expert));
        const times = call.layout === "rank" ? Math.min(1, here.length) : here.length;
        for (let i = 0; i < times; i++) wanted.push(`${source} ${token}`);
        numEntries += here.length;
      }
    });
    const found: string[] = [];
    for (let row = 0; row < recv.numRows; row++) {
      const bytes = world.inputs[rank]!.rowBytes;
      const got = recv.x.subarray(row * bytes, (row + 1) * bytes);
      const from = recv.srcIdx[row]!;
      if (from < 0) {
        must(
          call.layout === "expert" && got.every((byte) => byte === 0),
          `row ${row} of rank ${rank} is no zero padding`,
        );
        continue;
      }
      const [source, token] = [Math.floor(from / world.maxTokensPerRank), from % world.maxTokensPerRank];
      const sent = world.inputs[source]!.x.subarray(token * bytes, (token + 1) * bytes);
      must(
        got.every((byte, i) => byte === sent[i]),
        `row ${row} of rank ${rank} is not token ${token} of rank ${source}`,
      );
      found.push(`${source} ${token}`);
    }
    must(found.toSorted().join() === wanted.toSorted().join(), `rank ${rank} received ${found}, not ${wanted}`);
    must(recv.numTokens === new Set(wanted).size, `rank ${rank} counts ${recv.numTokens} tokens`);
    must(sum(recv.numTokensPerRank) === recv.numTokens, `rank ${rank}: tokens from ranks do not add up`);
    must(sum(recv.expertStats) === numEntries, `rank ${rank}: entries of experts do not add up`);
    must(recv.numTokensPerExpert.length === experts.length, `rank ${rank} has ${experts.length} experts`);
    must(recv.numTokensPerExpert.every((n) => n % call.expertAlignment === 0), `rank ${rank}: counts are not aligned`);
    if (call.layout === "rank") {
      must(
        recv.srcIdx.every((from, row) => row === 0 || from > recv.srcIdx[row - 1]!),
        `rank ${rank}: rows out of order`,
      );
      return;
    }
    must(sum(recv.numTokensPerExpert) === recv.numRows, `rank ${rank}: groups do not fill the rows`);
    let begin = 0;
    recv.numTokensPerExpert.forEach((size, e) => {
      const group = recv.srcIdx.subarray(begin, begin + size);
      const rows = group.filter((from) => from >= 0);
      must(group.subarray(0, rows.length).every((from) => from >= 0), `rank ${rank}, expert ${e}: padding amid rows`);
      must(
        size - rows.length < call.expertAlignment,
        `rank ${rank}, expert ${e}: ${size - rows.length} rows of padding`,
      );
      must(rows.every((from, i) => i === 0 || from >= rows[i - 1]!), `rank ${rank}, expert ${e}: rows out of order`);
      const lists = (from: number): boolean => {
        const { topkIdx } = world.inputs[Math.floor(from / world.maxTokensPerRank)]!;
        const at = (from % world.maxTokensPerRank) * world.numTopk;
        return Array.from(topkIdx!.slice(at, at + world.numTopk), Number).includes(experts[e]!);
      };
      must(rows.every(lists), `rank ${rank}, expert ${e}: a row of another expert`);
      begin += size;
    });
  });
}

/**
 * bf16 [numTokens, hidden]: for each token of a rank the weighted sum of its experts' outputs, computed in f64 from the token itself
 * by running over all experts. In a world of small integers every order of summation gives exactly this.
 */
export function denseSum(world: TestWorld, rank: number): Uint16Array {
  const { numTokens, x, topkIdx, topkWeights } = world.inputs[rank]!;
  const { hidden, numTopk } = world;
  const values = f32FromBf16(viewAs("bf16", x));
  const out = new Float64Array(numTokens * hidden);
  for (let expert = world.numExperts - 1; expert >= 0; expert--) {
    for (let entry = 0; entry < numTokens * numTopk; entry++) {
      if (Number(topkIdx![entry]) !== expert) continue;
      const begin = Math.floor(entry / numTopk) * hidden;
      const weight = topkWeights?.[entry] ?? 1;
      for (let i = begin; i < begin + hidden; i++) out[i]! += weight * expertValue(expert, values[i]!);
    }
  }
  return bf16FromF32(Float32Array.from(out));
}

function sum(counts: Int32Array): number {
  return counts.reduce((a, b) => a + b, 0);
}
