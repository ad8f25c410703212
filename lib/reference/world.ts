/**
 * What the reference takes and gives: the inputs and outputs of all ranks of a world at a time, as plain arrays.
 *
 * In: nothing. Out: types, and the checks of inputs that dispatch, layout and low latency share. Called by the other files
 * of the reference; tests and backends' drivers use the types. Rows are bytes, so that any format passes through; arrays
 * are contiguous and row-major, strides being a matter of backends.
 */

/** How received rows are laid out; see {@linkcode referenceDispatch}. */
export type RowLayout = "rank" | "expert";

/** Expert indices [numTokens, numTopk], -1 = none. Received indices have the type of the sent ones. */
export type TopkIdx = Int32Array | BigInt64Array;

/** The options of a world; its ranks are as many as the inputs. */
export interface World {
  /** Experts in all; they need not divide by the ranks. */
  readonly numExperts: number;
  /** Entries a token in `topkIdx`; 0 without it. */
  readonly numTopk: number;
  /** The largest `numTokens` of a rank: of normal mode in normal mode, of low-latency mode in low-latency mode. */
  readonly maxTokensPerRank: number;
  /** Ranks left out: they neither send nor receive, and for the others their experts do not exist. */
  readonly masked?: readonly number[];
}

/** What one rank sends. */
export interface RankInput {
  /** Tokens of the rank, 0 … maxTokensPerRank. */
  readonly numTokens: number;
  /** u8 [numTokens, rowBytes]. */
  readonly x: Uint8Array;
  /** Payload bytes a row. */
  readonly rowBytes: number;
  /** u8 [numTokens, numScales, scaleElemBytes]: carried beside the rows, never looked at. */
  readonly scales?: Uint8Array;
  /** Scale elements a row; 0 without scales. */
  readonly numScales?: number;
  /** Bytes of a scale element. */
  readonly scaleElemBytes?: number;
  /** Routing, [numTokens, numTopk]. */
  readonly topkIdx?: TopkIdx;
  /** f32 [numTokens, numTopk]. */
  readonly topkWeights?: Float32Array;
  /** Routing without `topkIdx`: u8 [numTokens, numRanks], not 0 when the token goes to the rank. Rank layout only. */
  readonly isTokenInRank?: Uint8Array;
  /** Without `topkIdx`, optional: i32 [numExperts], entries to each expert, only summed into the counts. */
  readonly numTokensPerExpert?: Int32Array;
  /** i32 [numLocalExperts]: what the entries received are added to. */
  readonly expertStats?: Int32Array;
}

/** A (token, top-k entry) that goes to an expert. */
export interface Entry {
  readonly source: number;
  readonly token: number;
  readonly k: number;
  readonly expert: number;
}

/** Whether a rank takes part. */
export function isMasked(world: Pick<World, "masked">, rank: number): boolean {
  return world.masked !== undefined && world.masked.includes(rank);
}

/** The expert of an entry, -1 when it has none. */
export function expertOf(input: RankInput, numTopk: number, token: number, k: number): number {
  return input.topkIdx === undefined ? -1 : Number(input.topkIdx[token * numTopk + k]!);
}

/** Every entry that has an expert, ordered by (source rank, token, k), masked sources left out. */
export function allEntries(ranks: readonly RankInput[], world: World): Entry[] {
  const entries: Entry[] = [];
  for (let source = 0; source < ranks.length; source++) {
    if (isMasked(world, source)) continue;
    for (let token = 0; token < ranks[source]!.numTokens; token++) {
      for (let k = 0; k < world.numTopk; k++) {
        const expert = expertOf(ranks[source]!, world.numTopk, token, k);
        if (expert >= 0) entries.push({ source, token, k, expert });
      }
    }
  }
  return entries;
}

/**
 * Checks shapes and values of every rank's input.
 *
 * @param doing What is being done, for the message: `Cannot <doing>: …`.
 * @throws {TypeError} When an array has not the length of its shape.
 * @throws {RangeError} When a rank has too many tokens or an entry is neither -1 nor an expert.
 */
export function checkInputs(doing: string, ranks: readonly RankInput[], world: World): void {
  ranks.forEach((input, rank) => {
    const { numTokens, numScales = 0, scaleElemBytes = 0 } = input;
    if (!Number.isInteger(numTokens) || numTokens < 0 || numTokens > world.maxTokensPerRank) {
      throw new RangeError(
        `Cannot ${doing}: rank ${rank} has ${numTokens} tokens, the buffer holds ${world.maxTokensPerRank} a rank`,
      );
    }
    const lengths: [string, ArrayLike<unknown> | undefined, number][] = [
      ["x", input.x, numTokens * input.rowBytes],
      ["scales", input.scales, numTokens * numScales * scaleElemBytes],
      ["topkIdx", input.topkIdx, numTokens * world.numTopk],
      ["topkWeights", input.topkWeights, numTokens * world.numTopk],
      ["isTokenInRank", input.isTokenInRank, numTokens * ranks.length],
      ["numTokensPerExpert", input.numTokensPerExpert, world.numExperts],
    ];
    for (const [name, array, length] of lengths) {
      if (array !== undefined && array.length !== length) {
        throw new TypeError(`Cannot ${doing}: ${name} of rank ${rank} has ${array.length} elements, not ${length}`);
      }
    }
    for (let i = 0; i < numTokens * world.numTopk; i++) {
      const [token, k] = [Math.floor(i / world.numTopk), i % world.numTopk];
      const expert = expertOf(input, world.numTopk, token, k);
      if (expert < -1 || expert >= world.numExperts) {
        throw new RangeError(
          `Cannot ${doing}: entry ${k} of token ${token} of rank ${rank} is expert ${expert}, there are ${world.numExperts}`,
        );
      }
    }
  });
}
