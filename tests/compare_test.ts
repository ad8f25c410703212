/**
 * The comparison that judges every backend: one wrong bit in any field of any rank is noticed, and padding only where it counts.
 */
import { assertThrows } from "@std/assert";
import { describe, test } from "node:test";
import { bytesOf } from "../lib/dtype.ts";
import { referenceDispatch, referenceLowLatencyDispatch } from "../lib/reference/mod.ts";
import { assertCombined, assertDispatched, assertLowLatencyDispatched, assertSame } from "./support/compare.ts";
import type { DispatchCall } from "./support/driver.ts";
import { enoughRows, namedWorld } from "./support/worlds.ts";

const world = namedWorld("fp8");
const options = { ...world, maxRecvTokens: enoughRows(world, 4), maxLowLatencyTokensPerRank: world.maxTokensPerRank };
const inputs = world.inputs.map((input) => ({ ...input, expertStats: new Int32Array(2) }));
const release = () => Promise.resolve();
const flip = (array: ArrayBufferView): number => bytesOf(array)[array.byteLength - 1]! ^= 1;

describe("a wrong bit is noticed", () => {
  for (const layout of ["rank", "expert"] as const) {
    const call: DispatchCall = { numTopk: world.numTopk, layout };
    const fields = [
      "x",
      "scales",
      "topkWeights",
      "srcIdx",
      "numTokensPerExpert",
      "numTokensPerRank",
      "expertStats",
    ] as const;
    for (const field of layout === "rank" ? ["topkIdx", ...fields] as const : fields) {
      test(`${field} in ${layout} layout`, () => {
        const expected = referenceDispatch(inputs, { ...options, layout }).ranks;
        const actual = { ranks: structuredClone(expected), release };
        assertDispatched(actual, expected, { inputs, call, options });
        flip(actual.ranks[3]![field]!);
        assertThrows(() => assertDispatched(actual, expected, { inputs, call, options }), Error, `rank 3, ${field}`);
        assertDispatched(actual, expected, { inputs, call, options, masked: [3] });
      });
    }
  }

  for (const field of ["x", "scales", "srcInfo"] as const) {
    test(`${field} in low latency`, () => {
      const call = { numTopk: world.numTopk };
      const expected = referenceLowLatencyDispatch(inputs, options);
      const actual = { ranks: structuredClone(expected), release };
      flip(actual.ranks[1]!.experts[1]![field]!);
      const compare = (): void => assertLowLatencyDispatched(actual, expected, { inputs, call, options });
      assertThrows(compare, Error, `rank 1, local expert 1, ${field}`);
    });
  }

  test("signs of zeros, types and lengths", () => {
    assertThrows(() => assertSame("a", Float32Array.of(0), Float32Array.of(-0)), Error, "element 0 of row 0");
    assertThrows(
      () => assertSame("a", Int32Array.of(0), Float32Array.of(0)),
      Error,
      "a Int32Array, not a Float32Array",
    );
    assertThrows(() => assertSame("a", Int32Array.of(0), new Int32Array(2)), Error, "1 elements, not 2");
    assertThrows(() => assertSame("a", undefined, new Int32Array(0)), Error, "missing, not given");
    const x = Uint16Array.of(1, 2);
    const shape = { hidden: 1, numTopk: 1 };
    const wanted = [{ x, topkWeights: Float32Array.of(1, 2) }];
    assertThrows(() => assertCombined([{ x }], wanted, shape), Error, "combined topkWeights: missing");
    assertThrows(() => assertCombined([{ ...wanted[0]!, x: x.slice().reverse() }], wanted, shape), Error, "combined x");
  });
});

test("padding counts with zeroPadding only", () => {
  const call = { numTopk: world.numTopk, layout: "expert", expertAlignment: 4 } as const;
  const expected = referenceDispatch(inputs, { ...options, ...call }).ranks;
  for (const field of ["x", "scales"] as const) {
    const actual = { ranks: structuredClone(expected), release };
    const rank = expected.findIndex((recv) => recv.srcIdx.at(-1) === -1);
    flip(actual.ranks[rank]![field]!);
    assertDispatched(actual, expected, { inputs, call, options });
    const strict = { inputs, call: { ...call, zeroPadding: true }, options };
    assertThrows(() => assertDispatched(actual, expected, strict), Error, `rank ${rank}, ${field}`);
  }
});
