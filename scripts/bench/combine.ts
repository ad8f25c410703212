/**
 * Combine in normal mode: from the slots' expert-output regions, and from tensors of the user's.
 *
 * In: ranks with a world. Out: figures; tokens of every rank are compared with the reference before anything is timed. Called by
 * normal.ts. Expert outputs are random rows, different on every rank, so a row taken from a wrong place is seen.
 */
import type { Tensor } from "../../mod.ts";
import { trafficPlan } from "../../lib/plan.ts";
import { Ceiling, rowsSent } from "./ceiling.ts";
import { NaiveCombine } from "./naive_combine.ts";
import type { NormalBench } from "./normal.ts";
import { foreign } from "./ranks.ts";
import type { Figure } from "./report.ts";
import { type Chain, runOnce } from "./timing.ts";
import { expectedCombine, gatherRows, sampledTokens } from "./verify.ts";
import { type BenchWorld, randomRows, sum } from "./world.ts";

/** Most that a combine may take, in times of its rows' memcpys. */
const GOAL = 3;

/** Runs the combines that were asked for. */
export async function* benchCombine(bench: NormalBench): AsyncGenerator<Figure> {
  const { world, ranks, options } = bench, { hidden, tokens, rankRows } = world;
  const { handle } = bench.reference(world.inputs.map((input) => input.x), "rank");
  const results = await bench.dispatchAll(bench.x, "rank");
  const values = rankRows.map((rows, r) => randomRows(rows * hidden, 7000 + r));
  const region = results.map((result, r) => {
    const y = result.handle.expertOutput().slice(0, rankRows[r]!);
    y.write(values[r]!);
    return y;
  });
  const own = ranks.buffers.map((b, r) => b.tensor("bf16", [rankRows[r]!, hidden], values[r]!));
  const out = ranks.buffers.map((b) => b.tensor("bf16", [tokens, hidden]));
  const chainOf = (y: readonly Tensor[]): Chain => ({
    lanes: ranks.lanes,
    step: async () => {
      await Promise.all(ranks.buffers.map((b, r) => b.combine(y[r]!, results[r]!.handle, { out: out[r]! })));
    },
  });
  const sampled = sampledTokens(tokens), want = expectedCombine(world, handle, values, sampled);
  const check = async (name: string, got: readonly Tensor<"bf16">[]): Promise<void> => {
    for (const [r, tensor] of got.entries()) {
      bench.verifier.same(`${name}, rank ${r}`, gatherRows(await tensor.read(), sampled, hidden), want[r]!);
    }
  };
  using ceiling = combineCeiling(bench, region);
  const x = bench.x.map((tensor) => foreign(tensor));
  await using naive = await NaiveCombine.rankLayout(options, ranks, world, { x, y: region });
  const naiveChain = naive.chain;
  await runOnce(naiveChain);
  await check("combine: the naive way", naive.result);
  for (const [op, y] of [["combine", region], ["combine_copy", own]] as const) {
    if (!options.ops.has(op)) continue;
    for (const tensor of out) tensor.write(new Uint16Array(tokens * hidden).fill(0x7fff)); // what the op before it left
    await runOnce(chainOf(y));
    await check(op, out);
    const spreads = await ceiling.compare(bench.stopwatch, chainOf(y), naiveChain);
    const { formula, ...facts } = factsOf(world, op === "combine_copy");
    const goal = op === "combine" ? { goal: GOAL } : {};
    yield { op, ...facts, formula: `${formula}; ${ceiling.words}`, ...goal, ...spreads };
  }
  for (const tensor of [...own, ...out]) tensor.release();
  for (const result of results) result.release();
}

/** What belongs to a combine's figure beside its times. `copied`: rows are first put where the peers read. */
function factsOf(world: BenchWorld, copied: boolean): Omit<Figure, "op" | "measured" | "bound"> {
  const { ranks, tokens, hidden, rankRows, counts } = world;
  const { rows, rowBytes, bytes } = trafficPlan(ranks * tokens, sum(rankRows), 2 * hidden);
  const remote = rows - sum(counts.map((ofRank, r) => ofRank[r]!)); // a rank reads its own rows where they are
  const all = bytes + (copied ? 2 * remote * rowBytes : 0);
  return {
    tokens,
    ranks,
    dtype: "bf16",
    layout: "rank",
    bytes: all,
    formula: `${rows} rows -> ${ranks * tokens} tokens of ${rowBytes} B, ` +
      `(${rows} + ${ranks * tokens}${copied ? ` + 2 * ${remote} to put them where peers read` : ""}) * ${rowBytes} = ` +
      `${all} B`,
  };
}

/** A copy of each row that a rank pulls: token by token, in ascending rank. */
function combineCeiling({ world, ranks }: NormalBench, y: readonly Tensor[]): Ceiling {
  const rowBytes = 2 * world.hidden, next = world.rankRows.map(() => 0);
  const pulled = world.inputs.map((_, s) =>
    [...rowsSent(world, s)].map(({ rank }) => y[rank]!.address + BigInt(next[rank]!++ * rowBytes))
  );
  const numRows = pulled.map((rows) => rows.length);
  return new Ceiling(ranks, { numRows, rowBytes }, (r, i) => pulled[r]![i]!);
}
