/**
 * The partition of experts, strides of scales, and the room for them; what a buffer takes, as both libraries say, with no GPU.
 */
import { assert, assertEquals, assertThrows } from "@std/assert";
import { describe, test } from "node:test";
import { type BufferOptions, type BufferSize, EpBuffer } from "@deepep/deepep";
import { openDevice } from "../lib/device.ts";
import { alignUp, expertRank, localExperts, maxLocalExperts, scaleStrides } from "../lib/layout.ts";
import { dealExperts } from "./support/brute_force.ts";
import { suite } from "./support/suite.ts";

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

/** Normal and low-latency mode of rows with scales. */
const shape = {
  numRanks: 3,
  hidden: 1024,
  numExperts: 64,
  numTopk: 4,
  maxTokensPerRank: 500,
  maxLowLatencyTokensPerRank: 20,
  numSlots: 3,
};
const sizeOf = (backend: "cpu" | "cuda", change: Partial<BufferOptions & { numRanks: number }> = {}) =>
  EpBuffer.sizeHint({ ...shape, backend, ...change });
const noLibrary = (backend: "cpu" | "cuda") =>
  openDevice(backend).then(() => false as const, (e: Error) => e.message.split("\n")[0]!);

for (const backend of ["cpu", "cuda"] as const) {
  suite(`${backend}: what a buffer takes`, await noLibrary(backend), () => {
    test("is the sum of its parts, each with room for what it holds", async () => {
      const size = await sizeOf(backend), { maxRecvTokens: rows } = size;
      assertEquals(rows, Math.max(3 * 500, 3 * 500 * 4 + 128 * 22)); // rank layout; expert layout, padded
      assertEquals(size.symmetricBytes, size.controlBytes + 3 * size.slotBytes);
      const { recvXBytes, recvScalesBytes, expertOutputBytes, metadataBytes } = size;
      const parts = recvXBytes + recvScalesBytes + expertOutputBytes + metadataBytes;
      assertEquals(size.slotBytes, alignUp(parts, 4096));
      assert(recvXBytes >= rows * 2048 && expertOutputBytes >= rows * 2048, JSON.stringify(size));
      // 8 scales of 4 bytes; 4 indices of up to 8 bytes, 4 weights and a source index a row.
      assert(recvScalesBytes >= rows * 32 && metadataBytes >= rows * (4 * 8 + 4 * 4 + 4), JSON.stringify(size));
      assert(size.controlBytes > 0 && size.localBytes > 0, JSON.stringify(size));
    });

    type Part = keyof BufferSize;
    const slot: Part[] = ["recvXBytes", "recvScalesBytes", "expertOutputBytes", "metadataBytes", "slotBytes"];
    const growth: [keyof typeof shape, number[], Part[]][] = [
      ["numSlots", [1, 2, 3, 8], ["symmetricBytes"]],
      ["maxTokensPerRank", [500, 1000, 4096], ["symmetricBytes", "maxRecvTokens", ...slot]],
      ["maxLowLatencyTokensPerRank", [200, 400, 1024], ["symmetricBytes", ...slot]],
      ["numRanks", [1, 2, 4, 8], ["controlBytes", "symmetricBytes", "maxRecvTokens", ...slot]],
      ["numTopk", [1, 4, 8], ["symmetricBytes", "metadataBytes", "maxRecvTokens"]],
      ["hidden", [1024, 2048, 7168], ["symmetricBytes", ...slot.filter((part) => part !== "metadataBytes")]],
    ];
    for (const [option, values, parts] of growth) {
      test(`grows with ${option}, and no part shrinks`, async () => {
        // So many that what experts are padded by, which is less with more ranks, does not count.
        const many = option === "numRanks" ? { maxTokensPerRank: 4096 } : {};
        const sizes = await Promise.all(values.map((value) => sizeOf(backend, { ...many, [option]: value })));
        for (let i = 1; i < sizes.length; i++) {
          const before = sizes[i - 1]!, after = sizes[i]!;
          for (const part of Object.keys(after) as Part[]) {
            const what = `${part} of ${option} ${values[i - 1]} and ${values[i]}: ${before[part]}, ${after[part]}`;
            assert(parts.includes(part) ? after[part] > before[part] : after[part] >= before[part], what);
          }
        }
      });
    }

    test("is on each rank what peers map, alike on every backend", async () => {
      const { localBytes: _, handleBytes: ours, ...mapped } = await sizeOf(backend);
      const { localBytes: __, handleBytes: none, ...onCpu } = await sizeOf("cpu");
      assertEquals([ours > 0, none], [backend === "cuda", 0]);
      assertEquals(mapped, onCpu);
    });
  });
}
