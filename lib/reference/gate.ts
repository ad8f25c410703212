/**
 * Gates: from router logits to `topkIdx` and `topkWeights`.
 *
 * In: f32 logits [numTokens, numExperts]. Out: indices and weights [numTokens, numTopk]. Called by the demo, the benchmarks and the
 * tests for routings like those of real models. Everything is f32 arithmetic in a fixed order, the exponential included, so every
 * engine gives the same bits. Ties: the lower index wins; NaN loses to everything.
 */

/** A routing. */
export interface Routing {
  /** i32 [numTokens, numTopk], best first. */
  readonly topkIdx: Int32Array;
  /** f32 [numTokens, numTopk]. */
  readonly topkWeights: Float32Array;
}

/** Shape and knobs of {@linkcode gateDeepSeekV3}; the defaults are DeepSeek-V3's. */
export interface GroupedGateOptions {
  /** Default 256. */
  readonly numExperts?: number;
  /** Groups of consecutive experts; must divide numExperts. Default 8. */
  readonly numGroups?: number;
  /** Groups that a token may choose from. Default 4. */
  readonly numTopkGroups?: number;
  /** Experts a token. Default 8. */
  readonly numTopk?: number;
  /** f32 [numExperts] added to the scores for choosing, not for weighing. Default zeros. */
  readonly bias?: Float32Array;
  /** Routed scaling factor on the weights. Default 2.5. */
  readonly scale?: number;
}

/**
 * Routing of DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): scores are sigmoids; a group counts the sum of its two best biased
 * scores; the best groups stay; of their experts the best by biased score are chosen; their weights are the unbiased scores,
 * divided by their sum and scaled.
 *
 * @param logits f32 [numTokens, numExperts].
 * @throws {RangeError} When the options do not fit each other or the logits.
 */
export function gateDeepSeekV3(logits: Float32Array, numTokens: number, options: GroupedGateOptions = {}): Routing {
  const { numExperts = 256, numGroups = 8, numTopkGroups = 4, numTopk = 8, scale = 2.5, bias } = options;
  const groupSize = numExperts / numGroups;
  checkShape(logits, numTokens, numExperts, numTopk);
  if (!Number.isInteger(groupSize) || numTopkGroups > numGroups || numTopk > numTopkGroups * groupSize) {
    throw new RangeError(
      `Cannot route: ${numTopk} of ${numExperts} experts from ${numTopkGroups} of ${numGroups} groups is not possible`,
    );
  }
  return route(logits, numTokens, numExperts, numTopk, (row) => {
    const scores = row.map(sigmoid);
    const biased = scores.map((score, e) => score + (bias?.[e] ?? 0));
    const groups = Float32Array.from({ length: numGroups }, (_, g) => {
      const group = biased.subarray(g * groupSize, (g + 1) * groupSize);
      return best(group, Math.min(2, groupSize)).reduce((sum, e) => Math.fround(sum + group[e]!), 0);
    });
    const kept = best(groups, numTopkGroups);
    const open = biased.map((score, e) => kept.includes(Math.floor(e / groupSize)) ? score : -Infinity);
    const chosen = best(open, numTopk);
    const sum = chosen.reduce((acc, e) => Math.fround(acc + scores[e]!), 0);
    return chosen.map((expert) => ({
      expert,
      weight: Math.fround(Math.fround(scores[expert]! / sum) * Math.fround(scale)),
    }));
  });
}

/**
 * Softmax over all experts, the best `numTopk` by logit; their weights are the probabilities, with `normalize` divided by their sum.
 *
 * @param logits f32 [numTokens, numExperts].
 * @throws {RangeError} When numTopk is no count of experts or the logits do not fit.
 */
export function gateSoftmax(
  logits: Float32Array,
  numTokens: number,
  options: { numExperts: number; numTopk: number; normalize?: boolean },
): Routing {
  const { numExperts, numTopk, normalize = false } = options;
  checkShape(logits, numTokens, numExperts, numTopk);
  return route(logits, numTokens, numExperts, numTopk, (row) => {
    const max = row.reduce((a, b) => b > a ? b : a, -Infinity);
    const powers = row.map((logit) => exp(Math.fround(logit - max)));
    const total = powers.reduce((a, b) => Math.fround(a + b), 0);
    const probabilities = powers.map((power) => power / total);
    const chosen = best(row, numTopk);
    const sum = normalize ? chosen.reduce((a, e) => Math.fround(a + probabilities[e]!), 0) : 1;
    return chosen.map((expert) => ({ expert, weight: Math.fround(probabilities[expert]! / sum) }));
  });
}

interface Choice {
  readonly expert: number;
  readonly weight: number;
}

/** Routes each token by itself. */
function route(
  logits: Float32Array,
  numTokens: number,
  numExperts: number,
  numTopk: number,
  choose: (row: Float32Array) => Choice[],
): Routing {
  const topkIdx = new Int32Array(numTokens * numTopk);
  const topkWeights = new Float32Array(numTokens * numTopk);
  for (let token = 0; token < numTokens; token++) {
    choose(logits.subarray(token * numExperts, (token + 1) * numExperts)).forEach(({ expert, weight }, k) => {
      topkIdx[token * numTopk + k] = expert;
      topkWeights[token * numTopk + k] = weight;
    });
  }
  return { topkIdx, topkWeights };
}

/** Indices of the `count` largest values, largest first. */
function best(values: Float32Array, count: number): number[] {
  const key = (i: number): number => Number.isNaN(values[i]!) ? -Infinity : values[i]!;
  const indices = Array.from(values, (_, i) => i);
  return indices.sort((a, b) => key(a) === key(b) ? a - b : key(b) > key(a) ? 1 : -1).slice(0, count);
}

function sigmoid(x: number): number {
  return Math.fround(1 / Math.fround(1 + exp(-x)));
}

/**
 * e ** x rounded to f32, alike in every engine (Math.exp is not): x = n ln 2 + r, a Taylor series of r in f64, times 2 ** n.
 * The series' error, below 1e-16, is far below half a unit of f32.
 */
function exp(x: number): number {
  if (Number.isNaN(x)) return NaN;
  if (x > 89) return Infinity;
  if (x < -104) return 0;
  const n = Math.round(x / Math.LN2);
  const r = x - n * Math.LN2;
  let sum = 1;
  for (let i = 16; i >= 1; i--) sum = 1 + (r / i) * sum;
  return Math.fround(sum * 2 ** n);
}

function checkShape(logits: Float32Array, numTokens: number, numExperts: number, numTopk: number): void {
  if (!Number.isInteger(numTopk) || numTopk < 1 || numTopk > numExperts) {
    throw new RangeError(`Cannot route: numTopk is ${numTopk}, there are ${numExperts} experts`);
  }
  if (logits.length !== numTokens * numExperts) {
    throw new RangeError(`Cannot route: ${logits.length} logits are not ${numTokens} tokens of ${numExperts} experts`);
  }
}
