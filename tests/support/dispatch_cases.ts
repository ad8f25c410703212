/**
 * Cases of dispatch in normal mode.
 *
 * In: a subject. Out: tests. Each compares every rank's received rows, scales, top-k, weights, source indices and counts with the
 * reference. Called through cases.ts.
 */
import { assert, assertEquals } from "@std/assert";
import { test } from "node:test";
import {
  type RankInput,
  type RankOutput,
  referenceDispatch,
  referenceDispatchLayout,
} from "../../lib/reference/mod.ts";
import type { Subject } from "./cases.ts";
import { callsFor, checkedDispatch, codesOf, optionsFor } from "./checked.ts";
import { assertDispatched, assertSame } from "./compare.ts";
import type { NewWorld } from "./driver.ts";
import { Random, runSeed } from "./random.ts";
import { randomCount, suite } from "./suite.ts";
import { inRankWorld, makeWorld, namedWorld, namedWorlds, randomSpec, type TestWorld } from "./worlds.ts";

/** Dispatches a world in every way, then some random ones. */
export function runDispatchCases({ name, newWorld, skip, numRandom = 8, seed = runSeed() }: Subject): void {
  suite(`${name}: dispatch`, skip, () => {
    for (const world of namedWorlds()) {
      test(world.name, () => everyCall(newWorld, world));
    }
    for (let i = 0; i < randomCount(numRandom); i++) {
      test(`random world, DEEPEP_SEED=${seed + i}`, () => {
        const random = new Random(seed + i);
        return everyCall(newWorld, makeWorld(randomSpec(random), random.uint32()));
      });
    }

    test("is_token_in_rank instead of topkIdx", async () => {
      const world = inRankWorld();
      await using driver = await newWorld(optionsFor(world));
      const { numTokensPerExpert: _, ...first } = world.inputs[0]!; // the counts are optional
      for (const inputs of [world.inputs, [first, ...world.inputs.slice(1)]]) {
        await (await checkedDispatch(driver, inputs, { numTopk: 0, expertAlignment: 4 })).release();
      }
    });

    test("layout counts", async () => {
      for (const world of namedWorlds()) {
        await using driver = await newWorld(optionsFor(world));
        const layouts = await driver.dispatchLayout(world.inputs, world.numTopk);
        world.inputs.forEach(({ topkIdx, numTokens }, rank) => {
          const expected = referenceDispatchLayout(topkIdx!, { ...world, numTokens });
          for (const field of ["numTokensPerRank", "numTokensPerExpert", "isTokenInRank"] as const) {
            assertSame(`${world.name}, rank ${rank}, ${field}`, layouts[rank]![field], expected[field]);
          }
        });
      }
    });

    test("expert stats are added to", async () => {
      const world = namedWorld("experts do not divide");
      await using driver = await newWorld(optionsFor(world));
      let inputs: readonly RankInput[] = world.inputs.map((input, rank) => ({
        ...input,
        expertStats: new Int32Array(rank < 2 ? 3 : 2).fill(100 * rank),
      }));
      for (const layout of ["rank", "expert"] as const) {
        const result = await checkedDispatch(driver, inputs, { numTopk: world.numTopk, layout, expertAlignment: 4 });
        inputs = inputs.map((input, rank) => ({ ...input, expertStats: result.ranks[rank]!.expertStats }));
        await result.release();
      }
    });

    test("a cached dispatch sends new rows along the old routing", async () => {
      for (const world of [namedWorld("experts listed twice"), inRankWorld()]) {
        await using driver = await newWorld(optionsFor(world));
        for (const layout of world.routing === "inRank" ? ["rank"] as const : ["rank", "expert"] as const) {
          const call = { numTopk: world.numTopk, layout, expertAlignment: 4 };
          const first = await checkedDispatch(driver, world.inputs, call);
          for (const round of [1, 2]) {
            const inputs = world.inputs.map(({ numTokens, rowBytes }) => (
              { numTokens, rowBytes, x: new Random(round).bytes(numTokens * rowBytes) }
            ));
            await (await checkedDispatch(driver, inputs, { ...call, cached: first })).release();
          }
          await first.release();
        }
      }
    });

    test("two results held at once keep apart", async () => {
      const world = namedWorld("skewed");
      await using driver = await newWorld(optionsFor(world, { numSlots: 2 }));
      const other = makeWorld(world, 4242);
      const first = await driver.dispatch(world.inputs, { numTopk: world.numTopk });
      const before = structuredClone(first.ranks) as readonly RankOutput[];
      const second = await checkedDispatch(driver, other.inputs, { numTopk: world.numTopk, layout: "expert" });
      assertDispatched({ ...first, ranks: before }, referenceDispatch(world.inputs, { ...driver.options }).ranks, {
        inputs: world.inputs,
        call: { numTopk: world.numTopk },
        options: driver.options,
      });
      await first.release();
      await (await checkedDispatch(driver, world.inputs, { numTopk: world.numTopk })).release();
      await second.release();
    });

    test("many dispatches in a row", async () => {
      const world = namedWorld("skewed");
      await using driver = await newWorld(optionsFor(world));
      for (let i = 0; i < 20; i++) {
        const { inputs } = makeWorld(world, i);
        const layout = i % 3 === 0 ? "expert" : "rank";
        await (await checkedDispatch(driver, inputs, { numTopk: world.numTopk, layout })).release();
      }
    });

    test("capacity: exactly full is well, one row less fails on every rank, then all is well", async () => {
      const world = namedWorld("skewed");
      for (const layout of ["rank", "expert"] as const) {
        const call = { numTopk: world.numTopk, layout, expertAlignment: layout === "expert" ? 4 : 1 };
        const { ranks } = referenceDispatch(world.inputs, { ...optionsFor(world), ...call });
        const need = Math.max(...ranks.map((rank) => rank.numRows));
        await using full = await newWorld(optionsFor(world, { maxRecvTokens: need }));
        await (await checkedDispatch(full, world.inputs, call)).release();
        await using short = await newWorld(optionsFor(world, { maxRecvTokens: need - 1 }));
        const codes = await codesOf(() => short.dispatch(world.inputs, call));
        assertEquals(codes, world.inputs.map(() => "capacity"));
        const fewer = makeWorld({ ...world, tokens: [1, 0, 2, 1] }, 5);
        await (await checkedDispatch(short, fewer.inputs, call)).release();
      }
    });

    test("a bad expert index fails on every rank, then all is well", async () => {
      for (const topkType of ["i32", "i64"] as const) {
        const world = makeWorld({ ...namedWorld("skewed"), topkType }, 9);
        await using driver = await newWorld(optionsFor(world));
        for (const bad of topkType === "i64" ? [16n, -2n, 1n << 32n, -(1n << 63n)] : [16, -2, 2 ** 31 - 1]) {
          const topkIdx = world.inputs[2]!.topkIdx!.slice();
          (topkIdx as { [index: number]: number | bigint })[5] = bad;
          const inputs = world.inputs.map((input, rank) => rank === 2 ? { ...input, topkIdx } : input);
          const codes = await codesOf(() => driver.dispatch(inputs, { numTopk: world.numTopk }));
          assertEquals(codes[2], "invalidArgument");
          for (const code of codes) assert(["invalidArgument", "aborted"].includes(code), codes.join());
          await (await checkedDispatch(driver, world.inputs, { numTopk: world.numTopk })).release();
        }
      }
    });

    test("masked ranks are as if they were not there", async () => {
      const world = namedWorld("eight ranks, top 8");
      await using driver = await newWorld(optionsFor(world));
      const masked: number[] = [];
      for (const rank of [5, 0]) {
        masked.push(rank);
        await driver.mask([rank]);
        for (const layout of ["rank", "expert"] as const) {
          const call = { numTopk: world.numTopk, layout, expertAlignment: 4 };
          await (await checkedDispatch(driver, world.inputs, call, masked)).release();
        }
      }
    });

    test("a late rank changes nothing", async () => {
      const world = namedWorld("skewed");
      await using driver = await newWorld(optionsFor(world));
      for (const phase of ["notify", "send", "arrive"] as const) {
        for (const rank of [0, world.numRanks - 1]) {
          await driver.delay?.(rank, { op: "dispatch", phase, delayUs: 20_000 });
          await (await checkedDispatch(driver, world.inputs, { numTopk: world.numTopk })).release();
        }
      }
    });
  });
}

/** Dispatches a world in every way. */
export async function everyCall(newWorld: NewWorld, world: TestWorld): Promise<void> {
  await using driver = await newWorld(optionsFor(world));
  for (const call of callsFor(world)) {
    const result = await checkedDispatch(driver, world.inputs, call).catch((cause) => {
      throw new Error(`${world.name}, ${JSON.stringify(call)}: ${cause.message}`, { cause });
    });
    await result.release();
  }
}
