/**
 * Cases of combine in normal mode.
 *
 * In: a subject. Out: tests. Each dispatches a world, runs the experts on what arrived, combines, and compares every bit of the sums and
 * of the top-k weights that come back with the reference. Called through cases.ts.
 */
import { assertEquals } from "@std/assert";
import { test } from "node:test";
import type { CombineInput } from "../../lib/reference/mod.ts";
import { referenceCombine, referenceDispatch, type RowLayout } from "../../lib/reference/mod.ts";
import { denseSum } from "./brute_force.ts";
import type { Subject } from "./cases.ts";
import { checkedDispatch, optionsFor } from "./checked.ts";
import { assertCombined } from "./compare.ts";
import type { CombineCall, DispatchCall, Dispatched, NewWorld, WorldDriver } from "./driver.ts";
import { expertLayoutOutput, rankLayoutOutput } from "./experts.ts";
import { Random, runSeed } from "./random.ts";
import { randomCount, suite } from "./suite.ts";
import { inRankWorld, makeWorld, namedWorld, namedWorlds, randomSpec, type TestWorld } from "./worlds.ts";

/** What goes into a combine beside the rows. */
interface Extras {
  readonly topkWeights?: boolean;
  readonly weights?: boolean;
  readonly numBiases?: 0 | 1 | 2;
  /** Only the second bias. */
  readonly onlyBias1?: boolean;
  /** Rows of any bits instead of expert outputs. */
  readonly wild?: boolean;
}

const ways: [RowLayout, Extras, Partial<CombineCall>][] = [
  ["rank", {}, {}],
  ["rank", { topkWeights: true, numBiases: 1 }, {}],
  ["rank", { numBiases: 2, wild: true }, { anySlot: true }],
  ["rank", { topkWeights: true }, { zeroCopy: true }],
  ["expert", {}, {}],
  ["expert", { weights: true }, {}],
  ["expert", { weights: true, topkWeights: true, numBiases: 2 }, { zeroCopy: true }],
  ["expert", { topkWeights: true, onlyBias1: true }, { anySlot: true }],
  ["expert", { wild: true, weights: true, numBiases: 1 }, {}],
];

/** What every rank brings: expert outputs of what it received. */
function combineInputs(
  world: TestWorld,
  from: Dispatched,
  about: Extras & { layout: RowLayout; hidden: number },
): CombineInput[] {
  const { layout, hidden, numBiases = 0 } = about;
  const random = new Random(world.seed + 1);
  return from.ranks.map((recv, rank) => {
    const { numTokens, topkWeights } = world.inputs[rank]!;
    const outputs = layout === "expert" ? expertLayoutOutput : rankLayoutOutput;
    const cut = (rows: Uint16Array): Uint16Array => rows.filter((_, i) => i % world.hidden < hidden); // the first channels of each row
    const bias = (): Uint16Array => about.wild ? random.wildBf16(numTokens * hidden) : random.bf16(numTokens * hidden);
    return {
      x: about.wild ? random.wildBf16(recv.numRows * hidden) : cut(outputs(world, rank, recv)),
      // Other numbers than were sent, 0 where the entry is another rank's.
      ...(about.topkWeights && recv.topkWeights ? { topkWeights: recv.topkWeights.map((w) => w * 3) } : {}),
      ...(about.weights && topkWeights ? { weights: topkWeights } : {}),
      ...(numBiases > 0 ? { bias0: bias() } : {}),
      ...(numBiases > 1 || about.onlyBias1 ? { bias1: bias() } : {}),
    };
  });
}

/** Combines, and compares with the reference. `world` is what `from` was dispatched from. */
async function checkedCombine(
  driver: WorldDriver,
  from: Dispatched,
  about: { world: TestWorld; call: DispatchCall; extras?: Extras; combine?: Partial<CombineCall>; masked?: number[] },
): Promise<void> {
  const { world, call, extras = {}, masked = [] } = about;
  const { cached: _, layout = "rank", ...routed } = call;
  const combine = { hidden: world.hidden, ...about.combine };
  const inputs = combineInputs(world, from, { ...extras, layout, hidden: combine.hidden });
  const { handle } = referenceDispatch(world.inputs, { ...driver.options, ...routed, layout });
  const expected = referenceCombine(handle, inputs, { hidden: combine.hidden, masked });
  const actual = await driver.combine(from, inputs, combine);
  assertCombined(actual, expected, { hidden: combine.hidden, numTopk: call.numTopk, masked });
}

/** Combines worlds in every way, then some random ones. */
export function runCombineCases({ name, newWorld, skip, numRandom = 8, seed = runSeed() }: Subject): void {
  suite(`${name}: combine`, skip, () => {
    for (const world of namedWorlds()) test(world.name, () => everyWay(newWorld, world));
    for (let i = 0; i < randomCount(numRandom); i++) {
      test(`random world, DEEPEP_SEED=${seed + i}`, () => {
        const random = new Random(seed + i);
        return everyWay(newWorld, makeWorld(randomSpec(random), random.uint32()));
      });
    }

    test("a dense sum taken another way agrees", async () => {
      for (const spec of [namedWorld("experts listed twice"), namedWorld("eight ranks, top 8"), namedWorld("top 1")]) {
        const world = makeWorld({ ...spec, values: "integers" }, 3);
        await using driver = await newWorld(optionsFor(world));
        for (const layout of ["rank", "expert"] as const) {
          const recv = await driver.dispatch(world.inputs, { numTopk: world.numTopk, layout, expertAlignment: 4 });
          const weights = layout === "expert"; // in rank layout the experts have weighted already
          const inputs = combineInputs(world, recv, { layout, weights, hidden: world.hidden });
          const outputs = await driver.combine(recv, inputs, { hidden: world.hidden });
          outputs.forEach((output, rank) => assertEquals(output.x, denseSum(world, rank)));
          await recv.release();
        }
      }
    });

    test("without topkIdx", async () => {
      const world = inRankWorld();
      await using driver = await newWorld(optionsFor(world));
      const recv = await checkedDispatch(driver, world.inputs, { numTopk: 0 });
      await checkedCombine(driver, recv, { world, call: { numTopk: 0 }, extras: { numBiases: 1 } });
      await recv.release();
    });

    test("fewer channels than the buffer's", async () => {
      const world = namedWorld("fp8");
      await using driver = await newWorld(optionsFor(world));
      const call = { numTopk: world.numTopk };
      const recv = await checkedDispatch(driver, world.inputs, call);
      for (const hidden of [8, 136]) await checkedCombine(driver, recv, { world, call, combine: { hidden } });
      await recv.release();
    });

    test("twice from one dispatch, and after a cached dispatch", async () => {
      const world = namedWorld("experts listed twice");
      await using driver = await newWorld(optionsFor(world));
      for (const layout of ["rank", "expert"] as const) {
        const call = { numTopk: world.numTopk, layout, expertAlignment: 4 };
        const first = await checkedDispatch(driver, world.inputs, call);
        await checkedCombine(driver, first, { world, call });
        await checkedCombine(driver, first, { world, call, extras: { wild: true, numBiases: 1 } });
        const inputs = world.inputs.map(({ numTokens, rowBytes, x }) => ({ numTokens, rowBytes, x }));
        const again = await checkedDispatch(driver, inputs, { ...call, cached: first });
        await checkedCombine(driver, again, { world, call, extras: { wild: true } });
        await again.release();
        await first.release();
      }
    });

    test("two held results combine in either order", async () => {
      const worlds = [namedWorld("skewed"), makeWorld(namedWorld("skewed"), 4242)] as const;
      await using driver = await newWorld(optionsFor(worlds[0], { numSlots: 2 }));
      const call = { numTopk: worlds[0].numTopk, layout: "expert" } as const;
      for (const order of [[0, 1], [1, 0]] as const) {
        const recv = [
          await checkedDispatch(driver, worlds[0].inputs, call),
          await checkedDispatch(driver, worlds[1].inputs, call),
        ] as const;
        for (const i of order) await checkedCombine(driver, recv[i], { world: worlds[i], call });
        for (const result of recv) await result.release();
      }
    });

    test("many rounds in a row", async () => {
      const spec = namedWorld("skewed");
      await using driver = await newWorld(optionsFor(spec));
      for (let i = 0; i < 12; i++) {
        const world = makeWorld(spec, i);
        const call = { numTopk: world.numTopk, layout: i % 2 ? "rank" : "expert" } as const;
        const recv = await checkedDispatch(driver, world.inputs, call);
        await checkedCombine(driver, recv, { world, call, combine: { zeroCopy: i % 3 === 0 } });
        await recv.release();
      }
    });

    test("rows on ranks masked since the dispatch are left out", async () => {
      const world = namedWorld("eight ranks, top 8");
      for (const layout of ["rank", "expert"] as const) {
        await using driver = await newWorld(optionsFor(world));
        const call = { numTopk: world.numTopk, layout };
        const recv = await checkedDispatch(driver, world.inputs, call);
        await driver.mask([1, 6]);
        const extras = { topkWeights: true, numBiases: 1 } as const;
        await checkedCombine(driver, recv, { world, call, extras, masked: [1, 6] });
        await recv.release();
      }
    });

    test("a late rank changes nothing", async () => {
      const world = namedWorld("skewed");
      await using driver = await newWorld(optionsFor(world));
      const call = { numTopk: world.numTopk };
      for (const phase of ["publish", "reduce"] as const) {
        for (const rank of [0, world.numRanks - 1]) {
          const recv = await checkedDispatch(driver, world.inputs, call);
          await driver.delay?.(rank, { op: "combine", phase, delayUs: 20_000 });
          await checkedCombine(driver, recv, { world, call });
          await recv.release();
        }
      }
    });
  });
}

/** Combines a world in every way. */
export async function everyWay(newWorld: NewWorld, world: TestWorld): Promise<void> {
  await using driver = await newWorld(optionsFor(world));
  for (const [layout, extras, combine] of ways) {
    const call = { numTopk: world.numTopk, layout, expertAlignment: layout === "expert" ? 4 : 1 };
    const recv = await checkedDispatch(driver, world.inputs, call);
    await checkedCombine(driver, recv, { world, call, extras, combine }).catch((cause) => {
      const way = JSON.stringify({ layout, ...extras, ...combine });
      throw new Error(`${world.name}, ${way}: ${cause.message}`, { cause });
    });
    await recv.release();
  }
}
