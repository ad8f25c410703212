/**
 * A peer that falls silent in the middle of low-latency mode where buffers mask on timeout, or that is masked by hand between
 * the halves of a call: the call goes on, and what the survivors get is, bit for bit, what the reference says of a world without
 * that peer. In: a backend. Out: tests.
 *
 * World: 4 ranks of one thread; rank 1 falls silent in one phase of one call. What it did before that phase is done: its counts
 * stay counted, and where its rows did not come, or are not wanted, their places are zeros without a source.
 */
import { test } from "node:test";
import { assertEquals } from "@std/assert";
import { Group } from "@deepep/deepep";
import type { LowLatencyCombineInput, LowLatencyOutput } from "../../lib/reference/mod.ts";
import { referenceLowLatencyCombine, referenceLowLatencyDispatch } from "../../lib/reference/mod.ts";
import { assertLowLatencyDispatched, assertSame } from "./compare.ts";
import type { Delay, LowLatencyCall } from "./driver.ts";
import { lowLatencyOutput } from "./experts.ts";
import { RankHost } from "./rank_host.ts";
import { type BackendSubject, suite } from "./suite.ts";
import { makeWorld, type TestWorld, type WorldSpec } from "./worlds.ts";

const SILENT = 1, SURVIVORS = [0, 2, 3];
const spec: WorldSpec = {
  name: "one falls silent",
  numRanks: 4,
  numExperts: 10,
  numTopk: 4,
  hidden: 256,
  tokens: [7, 5, 0, 9],
  dropped: 0.1,
};
const options = {
  numRanks: 4,
  hidden: spec.hidden,
  numExperts: spec.numExperts,
  numTopk: spec.numTopk,
  maxTokensPerRank: 1,
  maxLowLatencyTokensPerRank: 9,
  timeoutMs: 500,
  maskOnTimeout: true,
};

type Where = Pick<Delay, "op" | "phase">;
const phases: readonly Where[] = [
  { op: "lowLatencyDispatch", phase: "notify" },
  { op: "lowLatencyDispatch", phase: "send" },
  { op: "lowLatencyDispatch", phase: "arrive" },
  { op: "lowLatencyCombine", phase: "publish" },
  { op: "lowLatencyCombine", phase: "reduce" },
];

/** The rows of a local expert that came from the silent rank, when it took part in the counts. */
function places(full: LowLatencyOutput, expert: number): { begin: number; end: number } {
  const range = full.layoutRange[expert * spec.numRanks + SILENT]!, begin = Number(range >> 32n);
  return { begin, end: begin + Number(range & 0xffff_ffffn) };
}

/** What is received when the rows of the silent rank never come: their places stay, empty. */
function withEmptyPlaces(full: LowLatencyOutput): LowLatencyOutput {
  const layoutRange = full.layoutRange.map((range, i) => i % spec.numRanks === SILENT ? range >> 32n << 32n : range);
  const experts = full.experts.map((rows, e) => {
    const { begin, end } = places(full, e), count = rows.srcInfo.length;
    const cleared = (bytes: Uint8Array) =>
      bytes.slice().fill(0, begin * bytes.length / count, end * bytes.length / count);
    return {
      x: cleared(rows.x),
      ...(rows.scales && { scales: cleared(rows.scales) }),
      srcInfo: rows.srcInfo.slice().fill(-1, begin, end),
    };
  });
  return { ...full, experts, layoutRange };
}

/** Expert outputs without the rows that came, or should have come, from the silent rank. */
function withoutPlaces(input: LowLatencyCombineInput, full: LowLatencyOutput): LowLatencyCombineInput {
  const x = input.x.map((rows, e) => {
    const { begin, end } = places(full, e);
    return rows.filter((_, i) => Math.floor(i / spec.hidden) < begin || Math.floor(i / spec.hidden) >= end);
  });
  return { ...input, x };
}

/** One layer: who makes its calls, whose results are looked at, where the silent rank falls silent, who is masked before. */
interface Round {
  readonly world: TestWorld;
  readonly call: LowLatencyCall;
  readonly present: readonly number[];
  readonly watched: readonly number[];
  readonly where?: Where;
  /** The others mask the silent rank between the halves of the dispatch, before or after its rows came. */
  readonly byHand?: boolean;
  readonly gone: readonly number[];
}

/** Ranks of one thread, as long as a test runs. */
class Hosts implements AsyncDisposable {
  readonly all: readonly RankHost[];
  #nextId = 0;

  private constructor(all: readonly RankHost[]) {
    this.all = all;
  }

  static async create(backend: BackendSubject["backend"], maskOnTimeout = true): Promise<Hosts> {
    const groups = Group.local(spec.numRanks), all = { ...options, maskOnTimeout, backend };
    return new Hosts(await Promise.all(groups.map((group) => RankHost.create(group, all))));
  }

  /** Makes a layer, each half of which is compared with the reference. */
  async layer(round: Round): Promise<void> {
    const id = this.#nextId++, ranks = await this.#dispatch(id, round);
    await this.#combine(id, round, ranks);
    for (const rank of round.watched) this.all[rank]!.release(id);
  }

  /** What every rank received; of ranks that are not watched, what they would have. */
  async #dispatch(id: number, { world: { inputs }, call, present, watched, where, byHand = false, gone }: Round) {
    for (const rank of present) this.all[rank]!.lowLatencySend(id, inputs[rank]!, call);
    if (byHand) {
      if (where?.phase === "arrive") await this.all[SILENT]!.lowLatencyReceive(id); // its rows have been sent by then
      for (const rank of watched) this.all[rank]!.mask([SILENT]);
    }
    const receiving = byHand ? watched : present;
    const received = receiving.map((rank) => this.all[rank]!.lowLatencyReceive(id));
    received.forEach((promise) => promise.catch(() => {})); // of a rank that is not watched nobody asks
    const got = new Map<number, LowLatencyOutput>();
    for (const rank of watched) got.set(rank, (await received[receiving.indexOf(rank)]!).output);
    // The silent rank receives before it falls silent in the combine.
    if (where?.op === "lowLatencyCombine") await received[receiving.indexOf(SILENT)];
    // Before its counts were known it is as if it were not there.
    const full = referenceLowLatencyDispatch(inputs, {
      ...referenceOptions(call),
      masked: where?.phase === "notify" ? [SILENT] : gone,
    });
    const expected = byHand || where?.phase === "send" ? full.map(withEmptyPlaces) : full;
    const ranks = inputs.map((_, rank) => got.get(rank) ?? full[rank]!), release = () => Promise.resolve();
    const masked = inputs.map((_, rank) => rank).filter((rank) => !watched.includes(rank));
    assertLowLatencyDispatched({ ranks, release }, expected, { inputs, call, options, masked });
    return ranks;
  }

  async #combine(
    id: number,
    { world, call, present, watched, where, gone }: Round,
    ranks: readonly LowLatencyOutput[],
  ): Promise<void> {
    const { inputs, hidden } = world, { recvHook = false } = call, reference = referenceOptions(call);
    const received = call.fp8 ? { ...world, payload: { kind: "fp8" } as const } : world;
    const outputs = inputs.map(({ numTokens, topkIdx, topkWeights }, rank): LowLatencyCombineInput => {
      const x = gone.includes(rank) ? [] : lowLatencyOutput(received, rank, ranks[rank]!);
      return { numTokens, topkIdx: topkIdx!, topkWeights: topkWeights!, x };
    });
    const combining = where?.op === "lowLatencyDispatch" ? watched : present;
    await Promise.all(
      combining.map((rank) => this.all[rank]!.lowLatencyCombineSend(id, outputs[rank]!, { hidden, recvHook })),
    );
    const back = combining.map((rank) => this.all[rank]!.lowLatencyCombineReceive(id));
    back.forEach((promise) => promise.catch(() => {}));
    const masked = where !== undefined && where.phase !== "reduce" ? [SILENT] : gone;
    // Where it was counted, its rows have places that the world without it does not have.
    const counted = where !== undefined && where.phase !== "notify" && masked.includes(SILENT);
    const full = counted ? referenceLowLatencyDispatch(inputs, reference) : [];
    const kept = counted ? outputs.map((input, rank) => withoutPlaces(input, full[rank]!)) : outputs;
    const sums = referenceLowLatencyCombine(kept, { ...reference, hidden, masked, fp8: false });
    for (const rank of watched) {
      assertSame(`rank ${rank}, combined x`, await back[combining.indexOf(rank)], sums[rank]!, { width: hidden });
    }
  }

  /** The silent rank's calls end before its buffer is closed. */
  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all(this.all.map((host) => host.close()));
  }
}

const referenceOptions = (call: LowLatencyCall) => ({
  ...options,
  ...call,
  maxTokensPerRank: options.maxLowLatencyTokensPerRank,
});

/** Registers the cases. */
export function runMaskingCases({ name, backend, skip, skipLowLatency }: BackendSubject): void {
  suite(`${name}: survivors are as in a world without the peer that they masked`, skip || skipLowLatency, () => {
    for (const [i, where] of phases.entries()) {
      for (const recvHook of [false, true]) {
        test(`silent in ${where.phase} of a ${where.op}${recvHook ? ", in two halves" : ""}`, async () => {
          await using hosts = await Hosts.create(backend);
          const everybody = [0, 1, 2, 3];
          const call = { numTopk: spec.numTopk, fp8: (i + Number(recvHook)) % 2 === 0, recvHook };
          const about = (round: number) => ({ world: makeWorld(spec, 10 * i + round), call });
          await hosts.layer({ ...about(0), present: everybody, watched: everybody, gone: [] });
          hosts.all[SILENT]!.inject({ ...where, action: "stall" });
          await hosts.layer({ ...about(1), present: everybody, watched: SURVIVORS, where, gone: [] });
          for (let round = 2; round < 5; round++) {
            await hosts.layer({ ...about(round), present: SURVIVORS, watched: SURVIVORS, gone: [SILENT] });
          }
          for (const rank of SURVIVORS) {
            assertEquals(hosts.all[rank]!.state(), { maskedRanks: [SILENT], numFailures: 0 });
          }
        });
      }
    }
    for (const phase of ["send", "arrive"] as const) {
      test(`masked between the halves of a dispatch, ${phase === "send" ? "before" : "after"} its rows came`, async () => {
        await using hosts = await Hosts.create(backend, false);
        const call = { numTopk: spec.numTopk, fp8: phase === "send", recvHook: true };
        const about = (round: number) => ({ world: makeWorld(spec, 100 + round), call, watched: SURVIVORS });
        const where: Where = { op: "lowLatencyDispatch", phase };
        if (phase === "send") hosts.all[SILENT]!.inject({ ...where, action: "stall" });
        await hosts.layer({ ...about(0), present: [0, 1, 2, 3], where, byHand: true, gone: [] });
        for (let round = 1; round < 4; round++) {
          await hosts.layer({ ...about(round), present: SURVIVORS, gone: [SILENT] });
        }
        for (const rank of SURVIVORS) {
          assertEquals(hosts.all[rank]!.state(), { maskedRanks: [SILENT], numFailures: 0 });
        }
      });
    }
  });
}
