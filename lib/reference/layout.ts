/**
 * The counting of a routing: the meaning of `deepep_get_dispatch_layout`.
 *
 * In: one rank's routing. Out: how many of its tokens go to each rank and each expert. Called by tests; dispatch itself counts
 * rows it has placed. Local to a rank and a fact about the routing alone: a masked rank is counted like any other.
 */
import { expertRank } from "../layout.ts";
import { checkInputs, type RankInput, type TopkIdx } from "./world.ts";

/** Counts of a routing. */
export interface DispatchLayout {
  /** i32 [numRanks]: tokens that go to each rank; a token counts once however many of its experts are there. */
  readonly numTokensPerRank: Int32Array;
  /** i32 [numExperts]: entries that go to each expert; an expert listed twice by a token counts twice. */
  readonly numTokensPerExpert: Int32Array;
  /** u8 [numTokens, numRanks]: 1 when the token goes to the rank. */
  readonly isTokenInRank: Uint8Array;
}

/**
 * Counts a routing [numTokens, numTopk].
 *
 * @throws {RangeError} When an entry is neither -1 nor an expert.
 */
export function referenceDispatchLayout(
  topkIdx: TopkIdx,
  shape: { numTokens: number; numTopk: number; numExperts: number; numRanks: number },
): DispatchLayout {
  const { numTokens, numTopk, numExperts, numRanks } = shape;
  const input: RankInput = { numTokens, x: new Uint8Array(0), rowBytes: 0, topkIdx };
  checkInputs("count a routing", [input], { numExperts, numTopk, maxTokensPerRank: numTokens });
  const numTokensPerRank = new Int32Array(numRanks);
  const numTokensPerExpert = new Int32Array(numExperts);
  const isTokenInRank = new Uint8Array(numTokens * numRanks);
  for (let token = 0; token < numTokens; token++) {
    for (let k = 0; k < numTopk; k++) {
      const expert = Number(topkIdx[token * numTopk + k]!);
      if (expert < 0) continue;
      numTokensPerExpert[expert]! += 1;
      isTokenInRank[token * numRanks + expertRank(expert, numExperts, numRanks)] = 1;
    }
    for (let rank = 0; rank < numRanks; rank++) numTokensPerRank[rank]! += isTokenInRank[token * numRanks + rank]!;
  }
  return { numTokensPerRank, numTokensPerExpert, isTokenInRank };
}
