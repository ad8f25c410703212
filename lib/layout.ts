/**
 * Where experts live: the partition of experts over ranks, and alignment.
 *
 * In: counts. Out: indices. Pure functions, called by the buffer, the reference and the tests. Experts need not divide by
 * the ranks: the first `numExperts % numRanks` ranks own one more, and each rank owns consecutive experts.
 */

/** A run of consecutive experts: `first` … `first + count - 1`. */
export interface ExpertRange {
  /** Index of the first expert among all experts. */
  readonly first: number;
  /** How many there are; 0 when there are fewer experts than ranks. */
  readonly count: number;
}

/**
 * The experts that a rank owns.
 *
 * @throws {RangeError} When a count is no positive integer or the rank is outside 0 … numRanks - 1.
 */
export function localExperts(numExperts: number, numRanks: number, rank: number): ExpertRange {
  checkWorld(numExperts, numRanks);
  if (!Number.isInteger(rank) || rank < 0 || rank >= numRanks) {
    throw new RangeError(`Cannot find the experts of rank ${rank}: there are ${numRanks} ranks`);
  }
  const base = Math.floor(numExperts / numRanks);
  const extra = numExperts % numRanks;
  return { first: rank * base + Math.min(rank, extra), count: base + (rank < extra ? 1 : 0) };
}

/**
 * The rank that owns an expert.
 *
 * @throws {RangeError} When a count is no positive integer or the expert is outside 0 … numExperts - 1.
 */
export function expertRank(expert: number, numExperts: number, numRanks: number): number {
  checkWorld(numExperts, numRanks);
  if (!Number.isInteger(expert) || expert < 0 || expert >= numExperts) {
    throw new RangeError(`Cannot find the rank of expert ${expert}: there are ${numExperts} experts`);
  }
  const base = Math.floor(numExperts / numRanks);
  const extra = numExperts % numRanks;
  const inLarger = extra * (base + 1); // experts of the ranks that own one more
  return expert < inLarger ? Math.floor(expert / (base + 1)) : extra + Math.floor((expert - inLarger) / base);
}

/** The most experts that any rank owns, for sizing arrays alike on all ranks. */
export function maxLocalExperts(numExperts: number, numRanks: number): number {
  checkWorld(numExperts, numRanks);
  return Math.ceil(numExperts / numRanks);
}

/** The least multiple of `alignment` that is at least `value`; both are non-negative integers below 2 ** 53. */
export function alignUp(value: number, alignment: number): number {
  return Math.ceil(value / alignment) * alignment;
}

/** Byte strides of a scale tensor `[rows, numScales]`. */
export interface ScaleStrides {
  /** Bytes from a row to the next. */
  readonly row: number;
  /** Bytes from a scale element to the next of the same row. */
  readonly elem: number;
}

/**
 * The strides of received scales: row-major, or column-major with every column padded to 16 bytes so that TMA can load it.
 *
 * @param maxRows Rows that the tensor can hold (per expert in low-latency mode), not the rows in use.
 */
export function scaleStrides(
  shape: { maxRows: number; numScales: number; scaleElemBytes: number },
  columnMajor: boolean,
): ScaleStrides {
  const { maxRows, numScales, scaleElemBytes } = shape;
  if (!columnMajor) return { row: numScales * scaleElemBytes, elem: scaleElemBytes };
  return { row: scaleElemBytes, elem: alignUp(maxRows, 16 / scaleElemBytes) * scaleElemBytes };
}

function checkWorld(numExperts: number, numRanks: number): void {
  if (!Number.isInteger(numExperts) || numExperts < 1 || !Number.isInteger(numRanks) || numRanks < 1) {
    throw new RangeError(`Cannot divide ${numExperts} experts among ${numRanks} ranks`);
  }
}
