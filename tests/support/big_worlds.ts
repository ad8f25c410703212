/**
 * Worlds that are too big for every way of calling: one dispatch and one combine with identity experts, against the reference. In:
 * a backend's worlds. Out: a check; the most tokens that a rank can have, as tests. Called by the tests of the backends.
 */
import { test } from "node:test";
import { referenceCombine, referenceDispatch } from "../../lib/reference/mod.ts";
import type { Subject } from "./cases.ts";
import { checkedDispatch, optionsFor } from "./checked.ts";
import { assertCombined } from "./compare.ts";
import { suite } from "./suite.ts";
import { makeWorld, type WorldSpec } from "./worlds.ts";

/** One dispatch in a layout, and back. */
export async function thereAndBack(
  newWorld: Subject["newWorld"],
  spec: WorldSpec,
  layout: "rank" | "expert",
): Promise<void> {
  const world = makeWorld(spec, 8), { numTopk, hidden } = world;
  const rows = layout === "rank" ? world.maxTokensPerRank * world.numRanks : undefined;
  await using driver = await newWorld(optionsFor(world, rows === undefined ? {} : { maxRecvTokens: rows }));
  const recv = await checkedDispatch(driver, world.inputs, { numTopk, layout });
  // The experts are the identity: what arrived goes back.
  const inputs = recv.ranks.map(({ x }) => ({ x: new Uint16Array(x.buffer, x.byteOffset, x.length / 2) }));
  const { handle } = referenceDispatch(world.inputs, { ...driver.options, numTopk, layout });
  const expected = referenceCombine(handle, inputs, { hidden, masked: [] });
  assertCombined(await driver.combine(recv, inputs, { hidden }), expected, { hidden, numTopk });
  await recv.release();
}

/** Registers the cases. */
export function runMostTokens({ name, newWorld, skip }: Subject): void {
  suite(`${name}: the most tokens`, skip, () => {
    for (const layout of ["rank", "expert"] as const) {
      test(`65,536 of a rank, ${layout} layout`, { timeout: 120_000 }, async () => {
        const spec = {
          name: "the most tokens",
          numRanks: 2,
          numExperts: 4,
          numTopk: 2,
          hidden: 8,
          tokens: [65_536, 65_535],
        };
        await thereAndBack(newWorld, spec, layout);
      });
    }
  });
}
