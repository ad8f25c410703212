/**
 * Dispatch in normal mode: with counts on the host, cached, FP8, and in expert layout.
 *
 * In: ranks with a world. Out: figures; each op's rows are compared with the reference, and the naive way's rows with the op's,
 * before anything is timed. Called by normal.ts.
 */
import type { DispatchHandle, Payload, RowLayout, ScaledRows } from "../../mod.ts";
import { bytesOf } from "../../lib/dtype.ts";
import { formatPlan, trafficPlan } from "../../lib/plan.ts";
import type { RankOutput } from "../../lib/reference/mod.ts";
import { Ceiling, rowsSent } from "./ceiling.ts";
import { NaiveDispatch, partsOf } from "./naive.ts";
import type { NormalBench } from "./normal.ts";
import type { OpName } from "./options.ts";
import { foreign } from "./ranks.ts";
import type { Figure } from "./report.ts";
import { type Chain, runOnce } from "./timing.ts";
import { randomRows, sum } from "./world.ts";

/** Most that a dispatch in rank layout may take, in times of its rows' memcpys. */
const GOAL = 1.5;

/** Runs the dispatches that were asked for. */
export async function* benchDispatch(bench: NormalBench): AsyncGenerator<Figure> {
  const { options: { ops }, x, world } = bench, rows = world.inputs.map((input) => input.x);
  if (ops.has("dispatch") || ops.has("dispatch_cached")) {
    const handles = await verified(bench, "dispatch", x, "rank", bench.reference(rows, "rank").ranks);
    if (ops.has("dispatch")) yield await figure(bench, "dispatch", x, "rank", fullChain(bench, x));
    if (ops.has("dispatch_cached")) {
      yield await figure(bench, "dispatch_cached", x, "rank", cachedChain(bench, x, handles));
    }
    for (const handle of handles) handle.release();
  }
  if (ops.has("dispatch_fp8")) {
    const { x, bits, scales } = fp8Rows(bench);
    const handles = await verified(bench, "dispatch_fp8", x, "rank", bench.reference(bits, "rank", scales).ranks);
    yield await figure(bench, "dispatch_fp8", x, "rank", cachedChain(bench, x, handles));
    for (const handle of handles) handle.release();
    for (const tensor of x.flatMap(partsOf)) tensor.release();
  }
  if (ops.has("dispatch_expert")) {
    const handles = await verified(bench, "dispatch_expert", x, "expert", bench.reference(rows, "expert").ranks);
    yield await figure(bench, "dispatch_expert", x, "expert", cachedChain(bench, x, handles));
    for (const handle of handles) handle.release();
  }
}

/** Rows that the model has cast already; their bits do not matter to a dispatch. */
function fp8Rows(bench: NormalBench): { x: ScaledRows[]; bits: Uint8Array[]; scales: Uint8Array[] } {
  const { tokens, hidden } = bench.world, numScales = Math.ceil(hidden / 128);
  const all = bench.ranks.buffers.map((buffer, r) => {
    const bits = bytesOf(randomRows(tokens * hidden / 2, 5000 + r));
    const scales = new Float32Array(randomRows(tokens * numScales * 2, 6000 + r).buffer as ArrayBuffer);
    const x = {
      data: buffer.tensor("f8e4m3", [tokens, hidden], bits),
      scales: buffer.tensor("f32", [tokens, numScales], scales),
    };
    return { x, bits, scales: bytesOf(scales) };
  });
  return { x: all.map(({ x }) => x), bits: all.map(({ bits }) => bits), scales: all.map(({ scales }) => scales) };
}

/** Dispatches once, compares everything, and keeps the handles. */
async function verified(
  bench: NormalBench,
  name: string,
  x: readonly Payload[],
  layout: RowLayout,
  want: readonly RankOutput[],
): Promise<DispatchHandle[]> {
  const results = await bench.dispatchAll(x, layout);
  for (const [r, result] of results.entries()) await bench.verifier.dispatch(`${name}, rank ${r}`, result, want[r]!);
  return results.map((result) => {
    const handle = result.handle.keep();
    result.release();
    return handle;
  });
}

/** Repeats a routing. */
function cachedChain({ ranks }: NormalBench, x: readonly Payload[], handles: readonly DispatchHandle[]): Chain {
  return {
    lanes: ranks.lanes,
    step: async () => {
      const results = await Promise.all(ranks.buffers.map((b, r) => b.dispatch(x[r]!, { handle: handles[r]! })));
      for (const result of results) result.release();
    },
  };
}

/** Routes anew, and waits on the host for the counts before the next call. */
function fullChain(bench: NormalBench, x: readonly Payload[]): Chain {
  return {
    lanes: bench.ranks.lanes,
    hostPaced: true,
    step: async () => {
      for (const result of await bench.dispatchAll(x, "rank")) result.release();
    },
  };
}

/** Bytes of a row and of its scales. */
const rowParts = (bench: NormalBench, x: Payload): number[] =>
  partsOf(x).map((part) => part.byteLength / bench.world.tokens);

/** Times a chain against copies and the naive way. */
async function figure(
  bench: NormalBench,
  op: OpName,
  x: readonly Payload[],
  layout: RowLayout,
  chain: Chain,
): Promise<Figure> {
  const { world, ranks, options } = bench;
  const rows = sum(layout === "rank" ? world.rankRows : world.expertRows);
  const plan = trafficPlan(world.ranks * world.tokens, rows, sum(rowParts(bench, x[0]!)));
  using ceiling = dispatchCeiling(bench, x, layout);
  await using naive = await NaiveDispatch.create(options, ranks, world, x, layout === "expert");
  await checkNaive(bench, op, naive, x, layout);
  const spreads = await ceiling.compare(bench.stopwatch, chain, naive.chain);
  return {
    op,
    tokens: world.tokens,
    ranks: world.ranks,
    dtype: op === "dispatch_fp8" ? "fp8" : "bf16",
    layout,
    bytes: plan.bytes,
    formula: `${formatPlan(plan)}; ${ceiling.words}`,
    ...(layout === "rank" ? { goal: GOAL } : {}),
    ...spreads,
  };
}

/** A copy of each row, token by token as the call reads them. */
function dispatchCeiling(bench: NormalBench, x: readonly Payload[], layout: RowLayout): Ceiling {
  const { world, ranks } = bench, { tokens, topk } = world;
  const [rowBytes, scaleBytes = 0] = rowParts(bench, x[0]!) as [number, number?];
  const sent = ranks.buffers.map((_, s) =>
    layout === "rank"
      ? [...rowsSent(world, s)].map(({ token }) => token)
      : Array.from({ length: tokens * topk }, (_, i) => Math.floor(i / topk))
  );
  const numRows = sent.map((ofRank) => ofRank.length);
  const addresses = x.map((rows) => partsOf(rows).map((part) => part.address));
  const ceiling = new Ceiling(
    ranks,
    { numRows, rowBytes, moreBytes: scaleBytes },
    (r, i) => addresses[r]![0]! + BigInt(sent[r]![i]! * rowBytes),
  );
  // Scales are a small part of a row: few copies, of a tensor's scales as often as it takes.
  numRows.forEach((count, r) => {
    for (let row = 0; scaleBytes > 0 && row < count; row += tokens) {
      const bytes = Math.min(tokens, count - row) * scaleBytes;
      ceiling.add(r, { at: count * rowBytes + row * scaleBytes, from: addresses[r]![1]!, bytes });
    }
  });
  return ceiling;
}

/** The naive way must do the same work, or the comparison would mean nothing. */
async function checkNaive(
  bench: NormalBench,
  op: OpName,
  naive: NaiveDispatch,
  x: readonly Payload[],
  layout: RowLayout,
): Promise<void> {
  await runOnce(naive.chain);
  const results = await bench.dispatchAll(x, layout);
  for (const [r, result] of results.entries()) {
    for (const [part, tensor] of partsOf(result.x).entries()) {
      const got = await bench.ranks.buffers[r]!.read(foreign(partsOf(naive.result[r]!)[part]!));
      bench.verifier.same(`${op}: the naive way on rank ${r}`, got, bytesOf(await tensor.read()));
    }
    result.release();
  }
}
