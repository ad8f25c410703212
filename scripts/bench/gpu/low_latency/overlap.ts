/**
 * Two micro-batches whose communication and arithmetic overlap, by halves of calls: a dispatch is sent, and received by its hook
 * when its rows are needed; in between the other micro-batch computes.
 *
 * In: a size. Out: figures, checked by their sums: both one after another, both overlapped on a stream each, and each part alone. Called by phase.ts. The
 * arithmetic stands for experts: a kernel that touches no memory, on the multiprocessors that the calls leave; where there is none,
 * as on the cpu backend, a copy. Chains behind a gate, not graphs: a capture has one stream.
 */
import type { LowLatencyResult, Stream, Tensor } from "../../../../mod.ts";
import type { Lane } from "../../ranks.ts";
import { runOnce, type Spread } from "../../timing.ts";
import { within } from "../clock.ts";
import { StandIn } from "../work.ts";
import type { Program } from "../naive_library.ts";
import type { Size } from "./phase.ts";
import { LowLatencyWorld } from "./world.ts";

/** Steps of the stand-in, some 10 ns each. */
const STEPS = 8000;
/** Bytes that a copy moves instead. */
const COPY_BYTES = 2 ** 22;

/** Enqueues arithmetic on a micro-batch's stream of a rank. */
type Work = (rank: number, batch: number) => void;

/** All ways. */
export async function overlap({ routing, numSms, newContext }: Size): Promise<void> {
  const context = await newContext(), low = new LowLatencyWorld(context, routing, "low_latency_overlap");
  const { stage } = low, { buffers } = stage.ranks;
  if (buffers[0]!.options.numSlots < 2) return context.report.trouble("low_latency_overlap: it needs two slots");
  const streams = buffers.map((b) => [b.createStream(), b.createStream()] as const);
  try {
    using work = standIn(low, { numSms, streams });
    await times(low, { numSms, streams, work: work.enqueue });
    low.release();
  } catch (error) {
    context.failed("low_latency_overlap", error);
  } finally {
    await Promise.all(buffers.flatMap((b, r) => streams[r]!.map((stream) => b.destroyStream(stream))));
  }
}

interface Parts {
  readonly numSms: number;
  readonly streams: readonly (readonly [Stream, Stream])[];
}

/** The stand-in of the naive way's library, or a copy. */
function standIn({ stage, world }: LowLatencyWorld, { numSms, streams }: Parts): Disposable & { enqueue: Work } {
  const { naive: library } = world.context, { buffers } = stage.ranks;
  if (typeof library === "string") {
    const memory = buffers.map((b) => b.tensor("u8", [2 * COPY_BYTES]));
    return {
      enqueue: (r, batch) => {
        const { address } = memory[r]!;
        buffers[r]!.core.copy(address, address + BigInt(COPY_BYTES), COPY_BYTES, streams[r]![batch]);
      },
      [Symbol.dispose]: () => memory.forEach((tensor) => tensor.release()),
    };
  }
  const made = new StandIn({ library, stage }), { numSms: all } = buffers[0]!.capabilities;
  const blocks = Math.max(1, Math.floor(all / buffers[0]!.ranksOnDevice) - numSms);
  const programs: Program[][] = streams.map((ofRank, r) =>
    ofRank.map((stream) => made.program(r, { buffer: buffers[r]!, stream }, { blocks, steps: STEPS }))
  );
  return { enqueue: (r, batch) => library.run(programs[r]![batch]!), [Symbol.dispose]: () => made[Symbol.dispose]() };
}

async function times(low: LowLatencyWorld, { numSms, streams, work }: Parts & { work: Work }): Promise<void> {
  const { stage, calls, world } = low, { buffers } = stage.ranks, { out } = world;
  const outs = [out, buffers.map((b) => b.tensor("bf16", out[0]!.shape))];
  const lanes: Lane[] = buffers.flatMap((buffer, r) => streams[r]!.map((stream) => ({ buffer, stream })));
  const send = (r: number, batch: number, recvHook: boolean, on = batch): LowLatencyResult =>
    calls.dispatch(buffers[r]!, r, { x: low.x(r), recvHook, sendOnly: true, numSms, stream: streams[r]![on]! });
  const back = (r: number, batch: number, of: LowLatencyResult, recvHook: boolean, on = batch) => {
    const stream = streams[r]![on]!, y: Tensor = of.handle.expertOutput({ stream });
    return calls.combine(buffers[r]!, r, { y, of, out: outs[batch]![r]!, recvHook, sendOnly: true, numSms, stream });
  };
  const all = (piece: (rank: number) => void) => ({
    lanes,
    callsPerStep: 16,
    step: () => buffers.forEach((_, r) => piece(r)),
  });
  const release = (r: number, on: number, of: LowLatencyResult): void => of.release({ stream: streams[r]![on]! });
  const ways = {
    work: (r: number) => work(r, 0),
    dispatch: (r: number) => release(r, 0, send(r, 0, false)),
    dispatch_combine: (r: number) => {
      const of = send(r, 0, false);
      back(r, 0, of, false);
      release(r, 0, of);
    },
    serial: (r: number) => {
      for (const batch of [0, 1]) {
        const of = send(r, batch, false, 0);
        work(r, 0);
        back(r, batch, of, false, 0);
        release(r, 0, of);
      }
    },
    overlapped: (r: number) => {
      const of = [0, 1].map((batch) => send(r, batch, true));
      for (const batch of [0, 1]) {
        of[batch]!.hook();
        work(r, batch);
      }
      const results = [0, 1].map((batch) => back(r, batch, of[batch]!, true));
      results.forEach((result) => result.hook());
      for (const batch of [0, 1]) release(r, batch, of[batch]!);
    },
  };
  await low.fillSlots();
  for (const name of ["serial", "overlapped"] as const) {
    for (const tensor of outs.flat()) tensor.write(new Uint16Array(tensor.size).fill(0x7fff));
    await within(30_000, name, runOnce(all(ways[name])));
    for (const [batch, out] of outs.entries()) await low.checkSums(`${low.phase}: ${name}, micro-batch ${batch}`, out);
  }
  const us = new Map<string, Spread>();
  for (const [name, way] of Object.entries(ways)) us.set(name, (await world.clock.measure(all(way))).us);
  const at = (name: string): number => us.get(name)!.median, { ranks, tokens } = world.routing;
  const facts = {
    phase: low.phase,
    form: "chain",
    ranks,
    tokens,
    numSms,
    dtype: "fp8",
    layout: "low_latency",
  } as const;
  const sums = { sumOfParts: 2 * (at("work") + at("dispatch_combine")), ofSerial: at("overlapped") / at("serial") };
  for (const [name, spread] of us) {
    world.context.report.add({
      ...facts,
      op: `ll_${name}`,
      us: spread,
      ...(name === "overlapped" ? { more: sums } : {}),
    });
  }
  for (const tensor of outs[1]!) tensor.release();
}
