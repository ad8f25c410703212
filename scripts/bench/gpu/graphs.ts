/**
 * Small calls as models replay them: graphs of many calls, and the naive way in graphs of as many.
 *
 * In: stages and routings. Out: figures. Called by bench.ts. A graph of one call tells what a launch costs and not what the
 * call costs, so each rank's graph holds many and the time is divided by their number. Dispatches take the buffer's slots in turn:
 * each releases the oldest result, and what the last of them leave is checked. The ranks' graphs are launched by one thread,
 * the naive way is one graph of all ranks.
 */
import type { DispatchResult, Graph, Payload, Recorder, Tensor } from "../../../mod.ts";
import { partsOf } from "../naive.ts";
import type { Chain } from "../timing.ts";
import { checkRows, checkSums } from "./checks.ts";
import { all } from "./clock.ts";
import { hasGraphsOf } from "./features.ts";
import { type PhaseContext, World } from "./main_phase.ts";
import type { NaiveCombine, NaiveDispatch } from "./naive.ts";
import type { GpuFigure } from "./report.ts";
import type { Routing } from "./routes.ts";
import type { Stage } from "./stage.ts";

/** Calls in a graph that is timed, for each slot. */
const CALLS_A_SLOT = 4;
/** Stands for native calls a step: what a graph holds counts against what a stream takes. */
const CALLS_A_REPLAY = 50;

type Facts = Omit<GpuFigure, "phase" | "op" | "form" | "ranks" | "tokens" | "us" | "measured">;

/** How many slots a stage has: eight as long as rows are few, two when a call is longer than the launches of all ranks. */
export const slotsOf = (tokens: number): number => Math.max(2, Math.min(8, Math.floor(4096 / tokens)));

/** One size. `newContext` makes the context of each piece, on a stage of `slotsOf` slots. */
export async function graphsOfSize(
  newContext: () => Promise<PhaseContext>,
  routing: Routing,
  numSms: number,
): Promise<void> {
  const pieces = { dispatch: dispatches, combine: combines, layer: layers };
  for (const [what, piece] of Object.entries(pieces)) {
    const context = await newContext(), { broken } = context;
    if (broken.has("graphs")) return;
    if (!hasGraphsOf(context.stage.ranks.buffers[0]!)) {
      broken.add("graphs");
      return context.report.say("  the backend has no graphs");
    }
    if (broken.has(`${what} graph`)) continue;
    const world = new World(context, routing, "graphs");
    const traffic = world.traffic(routing.rank, 2 * context.stage.hidden);
    try {
      await piece(world, { numSms, dtype: "bf16", layout: "rank", ...traffic });
      world.release();
    } catch (error) {
      broken.add(`${what} graph`);
      context.failed(`graphs: ${what} of ${routing.tokens} tokens`, error);
    }
  }
}

/** A graph a rank of `calls` calls each. */
export async function captured<T>(
  stage: Stage,
  calls: number,
  record: (operations: Recorder, rank: number) => T,
): Promise<{ graphs: Graph<T[]>[]; chain: Chain; once: () => Promise<void> }> {
  await stage.ranks.rest(); // what a capture waits for must have ended
  const graphs = stage.ranks.buffers.map((b, r) =>
    b.capture(b.stream, (operations) => Array.from({ length: calls }, () => record(operations, r)))
  );
  const launch = () => graphs.map((graph) => graph.launch());
  return {
    graphs,
    chain: { lanes: stage.ownLanes, calls, callsPerStep: CALLS_A_REPLAY, step: () => void launch() },
    once: async () => {
      await stage.ranks.rest();
      await all(launch());
    },
  };
}

/** Times a graph; says how many calls it holds. */
async function time(world: World, chain: Chain, op: string, facts: Facts): Promise<void> {
  await world.time(chain, { op, ...facts, more: { callsAGraph: chain.calls ?? 1 } }, "graph");
}

async function timeNaive(
  world: World,
  naive: NaiveDispatch | NaiveCombine,
  calls: number,
  op: string,
  facts: Facts,
): Promise<void> {
  await time(world, naive.graph(calls), op, { ...facts, numSms: 0 });
}

const slots = ({ stage }: World): number => stage.ranks.buffers[0]!.options.numSlots;

/** Releases graphs and what they captured. */
function release(graphs: readonly Graph<DispatchResult<Payload>[]>[]): void {
  for (const graph of graphs) {
    graph.release();
    for (const result of graph.results) result.release();
  }
}

async function dispatches(world: World, facts: Facts): Promise<void> {
  const { stage, routing: { tokens, rank: route }, loaded, context: { verifier } } = world, rows = stage.rows("bf16");
  const { topkIdx, topkWeights } = loaded, { numSms } = facts, calls = CALLS_A_SLOT * slots(world);
  using naive = await world.naiveDispatch(rows, route);
  const handles = await stage.handles(loaded);
  const kinds = {
    dispatch_cached: (r: number) => ({ handle: handles[r]!, numSms }),
    dispatch_full: (r: number) => ({ topkIdx: topkIdx[r]!, topkWeights: topkWeights[r]!, numSms }),
  };
  for (const [op, of] of Object.entries(kinds)) {
    const held: DispatchResult[][] = handles.map(() => []);
    const { graphs, chain, once } = await captured(stage, calls, (operations, r) => {
      if (held[r]!.length === slots(world)) held[r]!.shift()!.release();
      const result = operations.dispatch(rows.payload(r, tokens), of(r));
      held[r]!.push(result);
      return result;
    });
    try {
      held.forEach((results, r) => results.forEach(({ x }) => stage.ranks.buffers[r]!.fill(x as Tensor, 0xa5)));
      await once();
      for (let slot = 0; slot < slots(world); slot++) {
        const results = held.map((some) => some[slot]!), what = `${op} of ${tokens} tokens, graph`;
        await checkRows(what, { stage, loaded, verifier, rows, route }, results);
        await naive?.compare(what, verifier, results.map((result) => partsOf(result.x)));
      }
      await time(world, chain, op, facts);
    } finally {
      for (const graph of graphs) graph.release();
      for (const result of held.flat()) result.release();
    }
  }
  if (naive) await timeNaive(world, naive, calls, "naive_dispatch", facts);
  for (const handle of handles) handle.release();
}

async function combines(world: World, facts: Facts): Promise<void> {
  const { stage, routing: { tokens, rank: route }, loaded, context: { verifier }, out } = world, { numSms } = facts;
  const calls = CALLS_A_SLOT * slots(world);
  const held = await stage.route(loaded, stage.rows("bf16"));
  try {
    const y = await world.outputs(held, route, 1);
    using naive = await world.naiveCombine(y, route);
    const { graphs, chain, once } = await captured(
      stage,
      calls,
      (operations, r) => operations.combine(y[r]!, held[r]!.handle, { out: out[r]!, numSms }),
    );
    try {
      world.poisonOut();
      await once();
      const what = `combine of ${tokens} tokens, graph`;
      await checkSums(what, { stage, loaded, verifier, route, shift: 1, weighted: false }, out);
      await naive?.compare(what, verifier, out);
      await time(world, chain, "combine", facts);
    } finally {
      for (const graph of graphs) graph.release();
    }
    if (naive) await timeNaive(world, naive, calls, "naive_combine", facts);
  } finally {
    for (const result of held) result.release();
  }
}

/** Layers: routing, dispatch, no experts, combine in place. */
async function layers(world: World, facts: Facts): Promise<void> {
  const { stage, routing: { tokens, rank: route }, loaded, context: { verifier }, out } = world, { numSms } = facts;
  const rows = stage.rows("bf16"), { topkIdx, topkWeights } = loaded;
  const { graphs, chain, once } = await captured(stage, slots(world), (operations, r) => {
    const routed = { topkIdx: topkIdx[r]!, topkWeights: topkWeights[r]!, numSms };
    const recv = operations.dispatch(rows.payload(r, tokens), routed);
    operations.combine(recv.handle.expertOutput(), recv.handle, { out: out[r]!, numSms });
    return recv;
  });
  try {
    await once();
    const results = graphs.map((graph) => graph.results.at(-1)!);
    await checkRows(`layer of ${tokens} tokens, graph`, { stage, loaded, verifier, rows, route }, results);
    const { bytes = 0, linkBytes = 0, rankBytes = 0, ...others } = facts; // rows go and come
    const both = {
      bytes: 2 * bytes,
      ...(linkBytes === 0 ? {} : { linkBytes: 2 * linkBytes, rankBytes: 2 * rankBytes }),
    };
    await time(world, chain, "dispatch_full_combine", { ...others, ...both });
  } finally {
    release(graphs);
  }
}
