/**
 * Cases of low-latency dispatch and combine.
 *
 * In: a subject. Out: tests. Each compares every expert's rows, scales, counts, source info and layout ranges, and after
 * combine every bit of the sums, with the reference. Called through cases.ts.
 */
import { assert, assertEquals } from "@std/assert";
import { test } from "node:test";
import { maxLocalExperts } from "../../lib/layout.ts";
import type { LowLatencyCombineInput, LowLatencyOutput, RankInput } from "../../lib/reference/mod.ts";
import { referenceLowLatencyCombine, referenceLowLatencyDispatch } from "../../lib/reference/mod.ts";
import { denseSum } from "./brute_force.ts";
import type { Subject } from "./cases.ts";
import { checkedDispatch, codesOf, optionsFor } from "./checked.ts";
import { assertLowLatencyDispatched, assertSame } from "./compare.ts";
import type { LowLatencyCall, LowLatencyCombineCall, LowLatencyDispatched, NewWorld, Receive } from "./driver.ts";
import type { WorldDriver, WorldOptions } from "./driver.ts";
import { lowLatencyOutput } from "./experts.ts";
import { Random, runSeed } from "./random.ts";
import { randomCount, suite } from "./suite.ts";
import { makeWorld, namedWorld, namedWorlds, randomSpec, rowShape, type TestWorld, tinyWorld } from "./worlds.ts";

/** Options of a buffer that holds a world in low-latency mode; tokens that list an expert twice may need more rows. */
function lowLatencyOptions(world: TestWorld, more: Partial<WorldOptions> = {}): WorldOptions {
  const mostRows = Math.max(...world.inputs.map(({ numTokens }) => numTokens)) * world.numTopk;
  const perRank = world.routing === "mixed" || world.routing === "oneRank" || world.routing === "skewed";
  const maxLowLatencyTokensPerRank = Math.max(1, perRank ? mostRows : world.maxTokensPerRank);
  return optionsFor(world, { maxLowLatencyTokensPerRank, ...more });
}

interface About {
  readonly inputs?: readonly RankInput[];
  readonly masked?: readonly number[];
}

/** The sending half of a dispatch; the receiving half compares with the reference. */
async function checkedHalf(
  driver: WorldDriver,
  world: TestWorld,
  call: LowLatencyCall,
  { inputs = world.inputs, masked = [] }: About = {},
): Promise<Receive<LowLatencyDispatched>> {
  const maxTokensPerRank = driver.options.maxLowLatencyTokensPerRank ?? 0;
  const expected = referenceLowLatencyDispatch(inputs, { ...driver.options, ...call, maxTokensPerRank, masked });
  const receive = await driver.lowLatencyDispatch(inputs, call);
  return async () => {
    const actual = await receive();
    assertLowLatencyDispatched(actual, expected, { inputs, call, options: driver.options, masked });
    return actual;
  };
}

/** Dispatches in one go, and compares with the reference. */
const checkedSend = async (
  ...args: Parameters<typeof checkedHalf>
): Promise<LowLatencyDispatched> => await (await checkedHalf(...args))();

/** Dispatches in one go; checks nothing. */
const dispatched = async (driver: WorldDriver, inputs: readonly RankInput[], call: LowLatencyCall) =>
  await (await driver.lowLatencyDispatch(inputs, call))();

/** Runs the experts on what arrived. */
function expertOutputs(
  world: TestWorld,
  ranks: readonly (LowLatencyOutput | undefined)[],
  call: LowLatencyCall & { weights?: boolean; wild?: boolean },
): LowLatencyCombineInput[] {
  const received = call.fp8 ? { ...world, payload: { kind: "fp8", ue8m0: call.ue8m0 ?? false } as const } : world;
  const random = new Random(world.seed + 2);
  return ranks.map((recv, rank) => {
    const { numTokens, topkIdx, topkWeights } = world.inputs[rank]!;
    if (recv === undefined) return { numTokens, topkIdx: topkIdx!, x: [] }; // a masked rank
    const wild = (): Uint16Array[] => recv.experts.map((e) => random.wildBf16(e.srcInfo.length * world.hidden));
    const x = call.wild ? wild() : lowLatencyOutput(received, rank, recv);
    return { numTokens, topkIdx: topkIdx!, x, ...(call.weights === false || !topkWeights ? {} : { topkWeights }) };
  });
}

/** What a combine is of, and how it is made. */
interface Return {
  readonly world: TestWorld;
  readonly call: LowLatencyCall & { weights?: boolean; wild?: boolean };
  readonly combine?: Partial<LowLatencyCombineCall>;
  readonly masked?: readonly number[];
}

/** The sending half of a combine; the receiving half compares with the reference. */
async function checkedReturnHalf(
  driver: WorldDriver,
  from: LowLatencyDispatched,
  about: Return,
): Promise<Receive<void>> {
  const { world, call, masked = [] } = about;
  const { hidden, numTopk } = world;
  const inputs = expertOutputs(world, from.ranks, call);
  const maxTokensPerRank = driver.options.maxLowLatencyTokensPerRank ?? 0;
  const fp8 = about.combine?.fp8 ?? false;
  const options = { ...driver.options, maxTokensPerRank, numTopk, hidden, masked, fp8 };
  const expected = referenceLowLatencyCombine(inputs, options);
  const receive = await driver.lowLatencyCombine(from, inputs, { hidden, ...about.combine });
  return async () => {
    const actual = await receive();
    expected.forEach((want, rank) => {
      if (!masked.includes(rank)) assertSame(`rank ${rank}, combined x`, actual[rank], want, { width: hidden });
    });
  };
}

/** Combines in one go, and compares with the reference. */
const checkedReturn = async (...args: Parameters<typeof checkedReturnHalf>): Promise<void> =>
  await (await checkedReturnHalf(...args))();

/**
 * Dispatches all worlds before any is received, receives them in the first order, sends their combines in the second, and
 * receives those in the third.
 */
async function inFlight(
  driver: WorldDriver,
  worlds: readonly TestWorld[],
  calls: readonly LowLatencyCall[],
  [received, combined, reduced]: readonly (readonly number[])[],
): Promise<void> {
  const sent: Receive<LowLatencyDispatched>[] = [], recv: LowLatencyDispatched[] = [], back: Receive<void>[] = [];
  for (const [i, world] of worlds.entries()) sent.push(await checkedHalf(driver, world, calls[i]!));
  for (const i of received!) recv[i] = await sent[i]!();
  for (const i of combined!) {
    const combine = { recvHook: true, zeroCopy: i % 2 === 0 };
    back[i] = await checkedReturnHalf(driver, recv[i]!, { world: worlds[i]!, call: calls[i]!, combine });
  }
  for (const i of reduced!) await back[i]!();
  for (const result of recv) await result.release();
}

type Way = [Omit<LowLatencyCall, "numTopk"> & { weights?: boolean; wild?: boolean }, Partial<LowLatencyCombineCall>];

const plainWays: Way[] = [
  [{}, {}],
  [{ recvHook: true, wild: true }, { recvHook: true }],
  [{ weights: false, inputStrides: { rowGap: 16, scalesColumnMajor: true } }, { zeroCopy: true }],
  [{ scalesColumnMajor: true }, { zeroCopy: true, recvHook: true }],
];
const fp8Ways: Way[] = [
  [{ fp8: true }, {}],
  [{ fp8: true, round: true, scalesColumnMajor: true }, { zeroCopy: true }],
  [{ fp8: true, round: true, ue8m0: true, recvHook: true }, { recvHook: true }],
  [{ fp8: true, round: true, ue8m0: true, scalesColumnMajor: true, inputStrides: { rowGap: 32 } }, {}],
  [{}, { fp8: true }],
  [{ fp8: true, wild: true }, { fp8: true, recvHook: true }],
  [{ weights: false }, { fp8: true, zeroCopy: true }],
];
/** Scales whose rows or columns have room behind them. */
const scaleWays: Way[] = [
  [{ inputStrides: { scaleGap: 1 } }, {}],
  [{ scalesColumnMajor: true, inputStrides: { rowGap: 16, scaleGap: 16 } }, {}],
  [{ inputStrides: { scalesColumnMajor: true, scaleGap: 3 } }, {}],
];

/** There and back in every way. */
export async function everyWay(newWorld: NewWorld, world: TestWorld): Promise<void> {
  await using driver = await newWorld(lowLatencyOptions(world));
  const castable = world.payload.kind === "bf16" && world.hidden % 16 === 0, scaled = rowShape(world).numScales > 0;
  const ways = [...plainWays, ...(castable ? fp8Ways : []), ...(scaled ? scaleWays : [])];
  for (const [way, combine] of ways) {
    const call = { ...way, numTopk: world.numTopk };
    try {
      const recv = await checkedSend(driver, world, call);
      await checkedReturn(driver, recv, { world, call, combine });
      await recv.release();
    } catch (cause) {
      const text = JSON.stringify({ ...call, combine });
      throw new Error(`${world.name}, ${text}: ${(cause as Error).message}`, { cause });
    }
  }
}

/** Sends worlds there and back in every way, then some random ones. */
export function runLowLatencyCases({ name, newWorld, skip, numRandom = 8, seed = runSeed() }: Subject): void {
  suite(`${name}: low latency`, skip, () => {
    for (const world of namedWorlds()) test(world.name, () => everyWay(newWorld, world));
    for (let i = 0; i < randomCount(numRandom); i++) {
      test(`random world, DEEPEP_SEED=${seed + i}`, () => {
        const random = new Random(seed + i);
        return everyWay(newWorld, makeWorld(randomSpec(random), random.uint32()));
      });
    }
    for (const hidden of [16, 128, 144, 512, 640, 1040]) {
      test(`scales of ${hidden} channels`, () => {
        const spec = { ...namedWorld("tiny"), hidden, values: hidden % 128 ? "wild" : "ordinary" } as const;
        return everyWay(newWorld, makeWorld({ ...spec, name: `hidden ${hidden}`, tokens: [3, 1, 0, 2] }, hidden));
      });
    }

    test("values at the edges of FP8 rounding", async () => {
      const spec = { ...namedWorld("eight ranks, top 8"), name: "edges", hidden: 1024, values: "edges" } as const;
      await everyWay(newWorld, makeWorld({ ...spec, numTopk: 1 }, 8));
    });

    test("a dense sum taken another way agrees", async () => {
      for (const spec of [namedWorld("experts listed twice"), namedWorld("eight ranks, top 8"), namedWorld("top 1")]) {
        const world = makeWorld({ ...spec, values: "integers" }, 3);
        await using driver = await newWorld(lowLatencyOptions(world));
        const call = { numTopk: world.numTopk };
        const recv = await dispatched(driver, world.inputs, call);
        const outputs = await (await driver.lowLatencyCombine(recv, expertOutputs(world, recv.ranks, call), world))();
        outputs.forEach((x, rank) => assertEquals(x, denseSum(world, rank)));
        await recv.release();
      }
    });

    test("expert stats are added to", async () => {
      const world = namedWorld("experts do not divide");
      await using driver = await newWorld(lowLatencyOptions(world));
      const most = maxLocalExperts(world.numExperts, world.numRanks);
      let inputs: readonly RankInput[] = world.inputs.map((input, rank) => ({
        ...input,
        expertStats: new Int32Array(rank < world.numExperts % world.numRanks ? most : most - 1).fill(rank),
      }));
      for (let round = 0; round < 2; round++) {
        const recv = await checkedSend(driver, world, { numTopk: world.numTopk }, { inputs });
        inputs = inputs.map((input, rank) => ({ ...input, expertStats: recv.ranks[rank]!.expertStats }));
        await recv.release();
      }
    });

    test("three results in flight, their halves in every order", async () => {
      const orders = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]] as const;
      const worlds = [1, 2, 3].map((seed) => makeWorld(namedWorld("skewed"), seed));
      await using driver = await newWorld(lowLatencyOptions(worlds[0]!, { numSlots: 3 }));
      for (const [round, order] of orders.entries()) {
        const calls = worlds.map((world, i) => ({ numTopk: world.numTopk, fp8: i !== round % 3, recvHook: true }));
        await inFlight(driver, worlds, calls, [order, orders[(round + 2) % 6]!, orders[(5 * round + 1) % 6]!]);
      }
    });

    test("turns with normal mode, many times", async () => {
      const spec = namedWorld("skewed");
      await using driver = await newWorld(lowLatencyOptions(spec));
      for (let i = 0; i < 12; i++) {
        const world = makeWorld(spec, i);
        const call = { numTopk: world.numTopk, fp8: i % 2 === 0, recvHook: i % 3 === 0 };
        const recv = await checkedSend(driver, world, call);
        if (i % 4 === 1) await (await checkedDispatch(driver, world.inputs, { numTopk: world.numTopk })).release();
        await checkedReturn(driver, recv, { world, call });
        await recv.release();
      }
    });

    test("more rows than an expert holds fail on every rank, then all is well", async () => {
      const world = makeWorld(
        { ...tinyWorld(), tokens: [2, 2, 2, 2], numTopk: 4, routing: "oneRank", numExperts: 4 },
        1,
      );
      await using driver = await newWorld(lowLatencyOptions(world, { maxLowLatencyTokensPerRank: 2 }));
      const codes = await codesOf(() => dispatched(driver, world.inputs, { numTopk: 4 }));
      assertEquals(codes, world.inputs.map(() => "capacity"));
      const fits = makeWorld({ ...world, routing: "distinct" }, 1);
      await (await checkedSend(driver, fits, { numTopk: 4 })).release();
    });

    test("a bad expert index fails on every rank, then all is well", async () => {
      const world = namedWorld("top 1");
      await using driver = await newWorld(lowLatencyOptions(world));
      for (const bad of [8, -2]) {
        const inputs = world.inputs.map((input, rank) =>
          rank === 1 ? { ...input, topkIdx: Int32Array.of(0, 1, bad, 2) } : input
        );
        const codes = await codesOf(() => dispatched(driver, inputs, { numTopk: 1 }));
        assertEquals(codes[1], "invalidArgument");
        for (const code of codes) assert(["invalidArgument", "aborted"].includes(code), codes.join());
        await (await checkedSend(driver, world, { numTopk: 1 })).release();
      }
    });

    test("masked ranks are as if they were not there", async () => {
      const world = namedWorld("eight ranks, top 8");
      await using driver = await newWorld(lowLatencyOptions(world));
      const call = { numTopk: world.numTopk, fp8: true };
      const masked: number[] = [];
      for (const rank of [5, 0]) {
        masked.push(rank);
        await driver.mask([rank]);
        const recv = await checkedSend(driver, world, call, { masked });
        await checkedReturn(driver, recv, { world, call, masked });
        await recv.release();
      }
    });

    test("a late rank changes nothing", async () => {
      const world = namedWorld("skewed");
      await using driver = await newWorld(lowLatencyOptions(world));
      const call = { numTopk: world.numTopk, fp8: true };
      const dispatchPhases = ["notify", "send", "arrive"] as const;
      const late = [
        ...dispatchPhases.map((phase) => ({ op: "lowLatencyDispatch", phase }) as const),
        ...(["publish", "reduce"] as const).map((phase) => ({ op: "lowLatencyCombine", phase }) as const),
      ];
      for (const delay of late) {
        await driver.delay?.(1, { ...delay, delayUs: 20_000 });
        const recv = await checkedSend(driver, world, call);
        await checkedReturn(driver, recv, { world, call });
        await recv.release();
      }
    });
  });
}
