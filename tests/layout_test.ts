/**
 * The partition of experts, strides of scales, and the room for them.
 */
import { assert, assertEquals, assertThrows } from "@std/assert";
import { describe, test } from "node:test";
import { EpBuffer } from "@deepep/deepep";
import { alignUp, expertRank, localExperts, maxLocalExperts, scaleStrides } from "../lib/layout.ts";
import { dealExperts } from "./support/brute_force.ts";

describe("experts of ranks", () => {
  test("every partition up to 40 experts and 9 ranks is the one dealt by hand", () => {
    for (let numExperts = 1; numExperts <= 40; numExperts++) {
      for (let numRanks = 1; numRanks <= 9; numRanks++) {
        const owners = dealExperts(numExperts, numRanks);
        assertEquals(owners.map((_, expert) => expertRank(expert, numExperts, numRanks)), owners);
        for (let rank = 0; rank < numRanks; rank++) {
          const { first, count } = localExperts(numExperts, numRanks, rank);
          assertEquals(owners.slice(first, first + count), new Array(count).fill(rank));
          assertEquals(owners.filter((owner) => owner === rank).length, count);
        }
        const counts = Array.from({ length: numRanks }, (_, rank) => localExperts(numExperts, numRanks, rank).count);
        assertEquals(maxLocalExperts(numExperts, numRanks), Math.max(...counts));
      }
    }
  });

  test("refuses what does not exist", () => {
    assertThrows(() => localExperts(8, 4, 4), RangeError, "Cannot find the experts of rank 4: there are 4 ranks");
    assertThrows(() => expertRank(8, 8, 4), RangeError, "Cannot find the rank of expert 8: there are 8 experts");
    assertThrows(() => expertRank(-1, 8, 4), RangeError, "expert -1");
    assertThrows(() => localExperts(0, 4, 0), RangeError, "Cannot divide 0 experts among 4 ranks");
  });
});

test("scale strides", () => {
  const shape = { maxRows: 5, numScales: 7, scaleElemBytes: 4 };
  assertEquals(scaleStrides(shape, false), { row: 28, elem: 4 });
  assertEquals(scaleStrides(shape, true), { row: 4, elem: 32 }); // 5 rows become 8, so that a column has whole 16 bytes
  assertEquals(scaleStrides({ ...shape, scaleElemBytes: 1 }, true), { row: 1, elem: 16 });
  assertEquals(scaleStrides({ ...shape, scaleElemBytes: 16 }, true), { row: 16, elem: 80 });
  assertEquals([alignUp(0, 8), alignUp(1, 8), alignUp(8, 8), alignUp(9, 3)], [0, 8, 8, 9]);
});

test("a slot has room for the scales of the widest rows, in columns and, while they are turned, as rows", async () => {
  const options = { backend: "cpu", numRanks: 2, hidden: 16, numExperts: 4, numTopk: 2, maxTokensPerRank: 4 } as const;
  const rows = 2 * 2 * 16; // local experts, ranks, tokens: of low latency, which here needs more than normal mode
  const sizes = [[32, 4, 4], [16384, 256, 256], [16384, 64, 64], [4096, 256, 64]] as const;
  for (const [maxRowBytes, maxScaleBytes, asRows] of sizes) {
    const wide = { maxLowLatencyTokensPerRank: 16, maxRowBytes, maxScaleBytes };
    const { recvScalesBytes } = await EpBuffer.sizeHint({ ...options, ...wide });
    assert(recvScalesBytes >= rows * (maxScaleBytes + asRows), `${maxRowBytes}, ${maxScaleBytes}: ${recvScalesBytes}`);
  }
});
