/**
 * Worlds: what all ranks send, for tests and benchmarks.
 *
 * In: a spec and a seed. Out: inputs of every rank and the options of a buffer that fits them. The smallest, `tiny`, has 4 ranks,
 * 8 experts and 4 tokens a, b, c, d; rank r owns experts 2r and 2r + 1:
 *
 *     token  of rank  experts   rank layout          expert layout
 *       a       0      0, 3     rank 0: a            expert 0: a   expert 1: -
 *       b       0      7, 6     rank 1: a c d        expert 2: -   expert 3: a c d
 *       c       1      3, -1    rank 2: d            expert 4: d   expert 5: -
 *       d       3      3, 4     rank 3: b            expert 6: b   expert 7: b
 */
import { bytesOf, castToFp8, type DType } from "../../lib/dtype.ts";
import { expertRank, localExperts, maxLocalExperts } from "../../lib/layout.ts";
import { gateDeepSeekV3, type RankInput, type TopkIdx } from "../../lib/reference/mod.ts";
import { Random } from "./random.ts";

/** What rows are. */
export type Payload =
  | { readonly kind: "bf16" }
  | { readonly kind: "fp8"; readonly ue8m0?: boolean }
  | { readonly kind: "opaque"; readonly rowBytes: number; readonly numScales: number; readonly scaleElemBytes: number };

/**
 * Who gets the tokens. `mixed`: any expert, listed any number of times; `distinct`: different experts a token; `gate`: the gate of
 * DeepSeek-V3 over drawn logits, 8 groups of which 4 are open.
 */
export type RoutingKind = "distinct" | "mixed" | "oneExpert" | "oneRank" | "none" | "inRank" | "skewed" | "gate";

/** What a world is made from. */
export interface WorldSpec {
  readonly name: string;
  readonly numRanks: number;
  readonly numExperts: number;
  readonly numTopk: number;
  /** Channels; a multiple of 16. */
  readonly hidden: number;
  /** Tokens of each rank. */
  readonly tokens: readonly number[];
  readonly routing?: RoutingKind;
  /** Share of entries that become -1. */
  readonly dropped?: number;
  readonly topkType?: Extract<DType, "i32" | "i64">;
  /** Default true. */
  readonly weights?: boolean;
  readonly payload?: Payload;
  /** bf16 rows: ordinary numbers, small integers (sums are exact), any bits, or values at the edges of FP8 rounding. */
  readonly values?: "ordinary" | "integers" | "wild" | "edges";
}

/** A world: its spec with the defaults filled in, what every rank sends, and what it needs of a buffer. */
export interface TestWorld extends Required<WorldSpec> {
  readonly seed: number;
  readonly inputs: readonly RankInput[];
  readonly maxTokensPerRank: number;
}

/** Makes a world; the same spec and seed make the same. */
export function makeWorld(spec: WorldSpec, seed: number): TestWorld {
  const full = {
    routing: "distinct",
    dropped: 0,
    topkType: "i32",
    weights: true,
    payload: { kind: "bf16" },
    values: "ordinary",
    ...spec,
  } as const;
  const random = new Random(seed);
  const inputs = full.tokens.map((numTokens) => makeInput(full, numTokens, random));
  return { ...full, seed, inputs, maxTokensPerRank: Math.max(1, ...full.tokens) };
}

/** The world of this file's header. */
export function tinyWorld(): TestWorld {
  const routing = [[0, 3, 7, 6], [3, -1], [], [3, 4]];
  const world = makeWorld({ ...base, name: "tiny", tokens: [2, 1, 0, 1] }, 1);
  const inputs = world.inputs.map((input, rank) => ({ ...input, topkIdx: Int32Array.from(routing[rank]!) }));
  return { ...world, inputs };
}

const base = { numRanks: 4, numExperts: 8, numTopk: 2, hidden: 16 } as const;
const nvfp4 = { kind: "opaque", rowBytes: 64, numScales: 8, scaleElemBytes: 1 } as const; // 128 channels of 4 bits
const words = { kind: "opaque", rowBytes: 16, numScales: 8, scaleElemBytes: 4 } as const; // as f32 some would be NaN
const mxfp8 = { kind: "opaque", rowBytes: 128, numScales: 4, scaleElemBytes: 1 } as const;

/** Worlds worth a name. */
export const specs: readonly WorldSpec[] = [
  { ...base, name: "one token", tokens: [0, 1, 0, 0] },
  { ...base, name: "zero tokens", tokens: [0, 0, 0, 0] },
  { ...base, name: "zero tokens on some ranks", tokens: [0, 9, 0, 3] },
  { ...base, name: "one rank", numRanks: 1, tokens: [7] },
  { ...base, name: "two ranks", numRanks: 2, tokens: [5, 8], topkType: "i64" },
  { ...base, name: "eight ranks, top 8", numRanks: 8, numExperts: 32, numTopk: 8, tokens: [9, 16, 1, 0, 7, 12, 3, 16] },
  { ...base, name: "all to one expert", tokens: [6, 6, 6, 6], routing: "oneExpert" },
  { ...base, name: "all to one rank", tokens: [6, 2, 0, 5], routing: "oneRank" },
  { ...base, name: "no routes at all", tokens: [3, 1, 4, 1], routing: "none" },
  { ...base, name: "half the routes are -1", tokens: [12, 9, 4, 8], dropped: 0.5, numTopk: 4, topkType: "i64" },
  { ...base, name: "experts listed twice", tokens: [8, 8, 8, 8], routing: "mixed", numExperts: 5, numTopk: 6 },
  { ...base, name: "experts do not divide", numExperts: 10, numTopk: 3, tokens: [5, 6, 7, 8] },
  { ...base, name: "fewer experts than ranks", numRanks: 5, numExperts: 3, tokens: [4, 4, 4, 4, 4] },
  { ...base, name: "top 1", numTopk: 1, tokens: [5, 4, 3, 2] },
  { ...base, name: "skewed", numExperts: 16, numTopk: 4, tokens: [32, 20, 9, 25], routing: "skewed" },
  {
    numRanks: 8,
    numExperts: 256,
    numTopk: 8,
    hidden: 128,
    name: "gated",
    tokens: [4, 4, 4, 4, 4, 4, 4, 3],
    routing: "gate",
  },
  { ...base, name: "no weights", tokens: [5, 4, 3, 2], weights: false },
  { ...base, name: "any bits", tokens: [8, 8, 8, 8], values: "wild" },
  { ...base, name: "wide rows", hidden: 7168, tokens: [3, 2, 1, 4] },
  { ...base, name: "fp8", hidden: 256, tokens: [5, 4, 3, 8], payload: { kind: "fp8" } },
  { ...base, name: "fp8, partial block", hidden: 144, tokens: [5, 4, 3, 8], payload: { kind: "fp8" } },
  { ...base, name: "fp8, ue8m0", hidden: 640, tokens: [5, 4, 3, 8], payload: { kind: "fp8", ue8m0: true } },
  { ...base, name: "nvfp4 bytes", hidden: 128, tokens: [5, 4, 3, 8], payload: nvfp4 },
  { ...base, name: "mxfp8 bytes", hidden: 128, tokens: [5, 4, 3, 8], payload: mxfp8, topkType: "i64" },
  { ...base, name: "scales of any bits", hidden: 64, tokens: [40, 40, 40, 40], payload: words },
  { ...base, name: "experts, 32 a token", numExperts: 40, numTopk: 32, tokens: [5, 3, 0, 6], topkType: "i64" },
];

/** Every named world, `tiny` first. */
export function namedWorlds(): TestWorld[] {
  return [tinyWorld(), ...specs.map((spec, i) => makeWorld(spec, 1000 + i))];
}

/** A named world. */
export function namedWorld(name: string): TestWorld {
  const found = namedWorlds().find((world) => world.name === name);
  if (found === undefined) throw new RangeError(`Cannot find a world named ${name}`);
  return found;
}

/** A world without `topkIdx`: tokens go where `isTokenInRank` says. */
export function inRankWorld(): TestWorld {
  return makeWorld({ ...base, name: "is token in rank", tokens: [6, 0, 5, 3], routing: "inRank" }, 77);
}

/** Draws a spec: 1-8 ranks, experts that need not divide, ranks without tokens, any routing and payload. */
export function randomSpec(random: Random): WorldSpec {
  const numRanks = random.int(1, 8);
  const numExperts = random.int(1, 24);
  const numTopk = random.int(1, Math.min(8, numExperts));
  const hidden = 16 * random.int(1, 20);
  const payload = random.pick<Payload>([
    { kind: "bf16" },
    { kind: "bf16" },
    { kind: "fp8" },
    { kind: "fp8", ue8m0: true },
    {
      kind: "opaque",
      rowBytes: 16 * random.int(1, Math.floor(hidden / 8)),
      numScales: random.int(0, 6),
      scaleElemBytes: random.pick([1, 2, 4, 8, 16]),
    },
  ]);
  return {
    name: `random ${random.seed}`,
    numRanks,
    numExperts,
    numTopk,
    hidden,
    tokens: Array.from({ length: numRanks }, () => random.chance(0.2) ? 0 : random.int(1, 24)),
    routing: random.pick<RoutingKind>(["distinct", "distinct", "mixed", "skewed", "oneExpert", "oneRank", "none"]),
    dropped: random.pick([0, 0, 0.1, 0.6]),
    topkType: random.pick(["i32", "i64"] as const),
    weights: random.chance(0.8),
    payload,
    values: random.pick(["ordinary", "wild"] as const),
  };
}

/** The bytes of a payload's row and scales. */
export function rowShape(
  { payload, hidden }: Pick<TestWorld, "payload" | "hidden">,
): Required<Pick<RankInput, "rowBytes" | "numScales" | "scaleElemBytes">> {
  if (payload.kind === "bf16") return { rowBytes: hidden * 2, numScales: 0, scaleElemBytes: 0 };
  if (payload.kind === "opaque") return payload;
  const numBlocks = Math.ceil(hidden / 128);
  return { rowBytes: hidden, numScales: payload.ue8m0 ? Math.ceil(numBlocks / 4) : numBlocks, scaleElemBytes: 4 };
}

/** Rows that hold whatever a world can receive in either layout, groups padded to `expertAlignment`. */
export function enoughRows(world: TestWorld, expertAlignment = 1): number {
  const perToken = Math.max(1, world.numTopk);
  return world.maxTokensPerRank * world.numRanks * perToken +
    maxLocalExperts(world.numExperts, world.numRanks) * (expertAlignment - 1);
}

function makeInput(spec: Required<WorldSpec>, numTokens: number, random: Random): RankInput {
  const { numExperts, numRanks, numTopk, hidden, payload } = spec;
  const shape = rowShape(spec);
  const bf16 = (): Uint16Array => {
    const count = numTokens * hidden;
    if (spec.values === "integers") return random.smallBf16(count, 2);
    if (spec.values === "edges") return random.edgesOfFp8(count);
    return spec.values === "wild" ? random.wildBf16(count) : random.bf16(count);
  };
  const rows = ((): Pick<RankInput, "x" | "scales"> => {
    if (payload.kind === "bf16") return { x: bytesOf(bf16()) };
    if (payload.kind === "fp8") {
      const { data, scales } = castToFp8(bf16(), numTokens, hidden, { round: payload.ue8m0 ?? false, ...payload });
      return { x: data, scales: bytesOf(scales) };
    }
    const x = random.bytes(numTokens * shape.rowBytes);
    const scaleBytes = shape.numScales * shape.scaleElemBytes;
    return scaleBytes === 0 ? { x } : { x, scales: random.bytes(numTokens * scaleBytes) };
  })();
  if (spec.routing === "inRank") {
    const isTokenInRank = Uint8Array.from({ length: numTokens * numRanks }, () => random.chance(0.4) ? 1 : 0);
    const numTokensPerExpert = Int32Array.from({ length: numExperts }, () => random.int(0, 5));
    return { numTokens, ...rows, ...shape, isTokenInRank, numTokensPerExpert };
  }
  if (spec.routing === "gate") {
    const logits = Float32Array.from({ length: numTokens * numExperts }, () => random.float() * 8 - 4);
    const { topkIdx, topkWeights } = gateDeepSeekV3(logits, numTokens, { numExperts, numTopk });
    const typed = spec.topkType === "i64" ? BigInt64Array.from(topkIdx, BigInt) : topkIdx;
    return { numTokens, ...rows, ...shape, topkIdx: typed, ...(spec.weights ? { topkWeights } : {}) };
  }
  const topkIdx = makeRouting(spec, numTokens, random);
  const integers = (): Float32Array => Float32Array.from({ length: numTokens * numTopk }, () => random.int(1, 2));
  const topkWeights = spec.values === "integers" ? integers() : random.weights(numTokens * numTopk);
  return { numTokens, ...rows, ...shape, topkIdx, ...(spec.weights ? { topkWeights } : {}) };
}

function makeRouting(spec: Required<WorldSpec>, numTokens: number, random: Random): TopkIdx {
  const { numExperts, numRanks, numTopk } = spec;
  const any = (count: number, below: number): number[] => Array.from({ length: count }, () => random.int(0, below - 1));
  const owner = expertRank(numExperts - 1, numExperts, numRanks); // the last rank that owns an expert
  const own = localExperts(numExperts, numRanks, owner);
  const choose: Record<RoutingKind, () => number[]> = {
    distinct: () => numTopk <= numExperts ? random.distinct(numTopk, numExperts) : any(numTopk, numExperts),
    mixed: () => any(numTopk, numExperts),
    skewed: () =>
      Array.from({ length: numTopk }, () => Math.min(random.int(0, numExperts - 1), random.int(0, numExperts - 1))),
    oneExpert: () => Array.from({ length: numTopk }, (_, k) => k === 0 ? numExperts - 1 : -1),
    oneRank: () => any(numTopk, own.count).map((e) => own.first + e),
    none: () => Array.from({ length: numTopk }, () => -1),
    inRank: () => [],
    gate: () => [],
  };
  const experts = Array.from({ length: numTokens }, choose[spec.routing]).flat()
    .map((expert) => random.chance(spec.dropped) ? -1 : expert);
  return spec.topkType === "i64" ? BigInt64Array.from(experts, BigInt) : Int32Array.from(experts);
}
