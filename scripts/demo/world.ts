/**
 * The ranks that this process drives: all of them, or one of a launcher's job. In: options and the text. Out: ranks with a
 * connected buffer, their tokens embedded and routed, and the times that took. Called by `scripts/demo.ts`.
 */
import process from "node:process";
import { EpBuffer, Group } from "../../mod.ts";
import { type ExpertRange, localExperts } from "../../lib/layout.ts";
import type { Routing } from "../../lib/reference/gate.ts";
import { type Layer, NUM_EXPERTS, NUM_TOPK } from "./layer.ts";
import { type DemoOptions, UsageError } from "./options.ts";
import type { Progress } from "./progress.ts";
import { shareOf, type Text } from "./text.ts";

/** Phases may differ between ranks by as much as their load does, and hidden may be large. */
const PHASE_TIMEOUT_MS = 24 * 3600 * 1000;

/** One rank and what it brings to the layer. */
export interface Rank {
  readonly group: Group;
  readonly buffer: EpBuffer;
  readonly layer: Layer;
  readonly experts: ExpertRange;
  /** Its tokens: `numTokens` from `firstToken` of the text. */
  readonly firstToken: number;
  readonly numTokens: number;
  /** bf16 [numTokens, hidden]. */
  readonly x: Uint16Array;
  readonly routing: Routing;
  readonly progress: Progress;
  readonly corrupt: boolean;
}

/** Times of phases, in milliseconds, in the order they ran. */
export type Times = Record<string, number>;

/** Measures phases of all ranks together: a phase ends when its last rank ends. Every rank has one and calls it alike. */
export class Laps {
  readonly times: Times = {};
  readonly #group: Group;
  #begin = 0;

  private constructor(group: Group) {
    this.#group = group;
  }

  /** Waits for all ranks and starts the clock. */
  static async start(group: Group): Promise<Laps> {
    const laps = new Laps(group);
    await laps.lap();
    return laps;
  }

  /** Waits for all ranks; what passed since the last call is the time of `phase`. */
  async lap(phase?: string): Promise<void> {
    await this.#group.barrier({ timeoutMs: PHASE_TIMEOUT_MS });
    const now = performance.now();
    if (phase !== undefined) this.times[phase] = now - this.#begin;
    this.#begin = now;
  }
}

/** Whether a launcher started this process as one rank of a job. */
export function launched(): boolean {
  return ["RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK"].some((name) => process.env[name]);
}

/** The groups of the ranks that this process drives. */
export async function joinGroups(options: DemoOptions): Promise<Group[]> {
  if (!launched()) return Group.local(options.ranks);
  const group = await Group.fromEnv();
  if (!options.ranksGiven || group.size === options.ranks) return [group];
  await group[Symbol.asyncDispose]();
  throw new UsageError(`--ranks is ${options.ranks}, the launcher started ${group.size}`);
}

/** Embeds and routes the tokens of each rank and connects the buffers. Collective. */
export async function makeRanks(
  groups: readonly Group[],
  options: { demo: DemoOptions; text: Text; layer: Layer; progress: Progress },
): Promise<{ ranks: Rank[]; times: Times }> {
  const { demo, text, layer } = options, first = groups[0]!;
  const buffers = await Promise.all(groups.map((group) =>
    EpBuffer.create(group, {
      backend: demo.backend,
      hidden: demo.hidden,
      numExperts: NUM_EXPERTS,
      numTopk: NUM_TOPK,
      maxTokensPerRank: demo.tokens,
      maxLowLatencyTokensPerRank: demo.modes.includes("low-latency") ? demo.tokens : 0,
      numSlots: 1, // one layer at a time
    })
  ));
  const together = await Promise.all(groups.map((group) => Laps.start(group)));
  const lap = (phase: string) => Promise.all(together.map((laps) => laps.lap(phase)));
  const shares = groups.map(({ rank, size }) =>
    shareOf(rank, { ranks: size, tokens: demo.tokens, length: text.ids.length })
  );
  const rows = shares.map((share) => layer.embed(text.ids, share));
  await lap("embed");
  const routings = rows.map((x) => layer.route(x));
  await lap("gate");
  const ranks = groups.map((group, i): Rank => ({
    group,
    buffer: buffers[i]!,
    layer,
    experts: localExperts(NUM_EXPERTS, first.size, group.rank),
    firstToken: shares[i]!.first,
    numTokens: shares[i]!.count,
    x: rows[i]!,
    routing: routings[i]!,
    progress: options.progress,
    corrupt: demo.corrupt,
  }));
  return { ranks, times: together[0]!.times };
}

/** The tokens of all ranks of this process, and their routing, one after the other. */
export function allTokens(ranks: readonly Rank[]): { x: Uint16Array; routing: Routing } {
  const numTokens = ranks.reduce((sum, rank) => sum + rank.numTokens, 0), first = ranks[0]!;
  const x = new Uint16Array(numTokens * first.layer.hidden);
  const topkIdx = new Int32Array(numTokens * NUM_TOPK), topkWeights = new Float32Array(numTokens * NUM_TOPK);
  for (const rank of ranks) {
    const at = rank.firstToken - first.firstToken;
    x.set(rank.x, at * rank.layer.hidden);
    topkIdx.set(rank.routing.topkIdx, at * NUM_TOPK);
    topkWeights.set(rank.routing.topkWeights, at * NUM_TOPK);
  }
  return { x, routing: { topkIdx, topkWeights } };
}
