/**
 * What holds for every group, whatever carries it: run by `group_local_test.ts` and `group_tcp_test.ts` alike.
 */
import { test } from "node:test";
import { assert, assertEquals, assertStrictEquals } from "@std/assert";
import { EpError } from "../../lib/error.ts";
import type { Group } from "../../lib/group/group.ts";
import { MAX_DATA_BYTES } from "../../lib/group/wire.ts";
import { bounded, disposeAll, rejection } from "./group_worlds.ts";

/** Makes all ranks of a group in this process. */
export type NewGroups = (size: number) => Promise<Group[]>;

/** Runs `body` with the groups and leaves them afterwards. */
async function withGroups(newGroups: NewGroups, size: number, body: (groups: Group[]) => Promise<void>): Promise<void> {
  const groups = await newGroups(size);
  try {
    await body(groups);
  } finally {
    await disposeAll(groups);
  }
}

const dataOf = (rank: number, length: number): Uint8Array => {
  const bytes = new Uint8Array(length);
  for (let i = 0; i < length; i++) bytes[i] = 31 * rank + i + (i >> 8);
  return bytes;
};

/** Rounds that succeed. */
export function runHappyCases(name: string, newGroups: NewGroups): void {
  for (const size of [1, 2, 8]) {
    test(`${name}: ${size} ranks gather and meet`, bounded, () =>
      withGroups(newGroups, size, async (groups) => {
        groups.forEach((group, rank) => assertEquals([group.rank, group.size, group.localRank], [rank, size, rank]));
        const all = await Promise.all(groups.map((group) => group.allGather(dataOf(group.rank, 100 * group.rank))));
        for (const parts of all) {
          assertEquals(parts.length, size);
          parts.forEach((part, rank) => assertEquals(part, dataOf(rank, 100 * rank)));
        }
        await Promise.all(groups.map((group) => group.barrier()));
      }));
  }

  test(
    `${name}: the largest data of 8 ranks, unaligned views and memory of one's own`,
    bounded,
    () =>
      withGroups(newGroups, 8, async (groups) => {
        const sent = groups.map((group) => dataOf(group.rank, MAX_DATA_BYTES + 3).subarray(3));
        const promises = groups.map((group) => group.allGather(sent[group.rank]!));
        const expected = sent.map((data) => data.slice());
        sent.forEach((data) => data.fill(0)); // the caller may reuse its memory at once
        const all = await Promise.all(promises);
        for (const parts of all) {
          parts.forEach((part, rank) => {
            assert(part.length === MAX_DATA_BYTES && part.every((byte, i) => byte === expected[rank]![i]));
            assertEquals([part.byteOffset, part.buffer.byteLength], [0, MAX_DATA_BYTES]);
          });
        }
        all[0]![3]!.fill(0);
        assertEquals(all[1]![3], expected[3]!);
      }),
  );

  test(
    `${name}: 1000 rounds in order, none awaited before the next`,
    bounded,
    () =>
      withGroups(newGroups, 4, async (groups) => {
        const rounds = groups.map((group) =>
          Array.from({ length: 1000 }, (_, i) => group.allGather(new Uint8Array([group.rank, i & 255, i >> 8])))
        );
        for (const promises of rounds) {
          (await Promise.all(promises)).forEach((parts, i) => {
            parts.forEach((part, rank) => assertEquals([...part], [rank, i & 255, i >> 8]));
          });
        }
      }),
  );

  test(
    `${name}: a subset in any order leaves the others' entries empty and others' rounds alone`,
    bounded,
    () =>
      withGroups(newGroups, 4, async (groups) => {
        const odd = [1, 3].map((r) => groups[r]!.allGather(new Uint8Array([r]), { ranks: r === 1 ? [1, 3] : [3, 1] }));
        const even = [0, 2].map((r) => groups[r]!.barrier({ ranks: [0, 2] }));
        await Promise.all(even);
        for (const parts of await Promise.all(odd)) {
          assertEquals(parts.map((part) => [...part]), [[], [1], [], [3]]);
        }
        await Promise.all(groups.map((group) => group.barrier()));
      }),
  );
}

/** Rounds that fail. */
export function runFailureCases(name: string, newGroups: NewGroups): void {
  test(
    `${name}: who does not arrive is named to all, also to itself, and the next round is whole`,
    bounded,
    () =>
      withGroups(newGroups, 5, async (groups) => {
        const last = { timeoutMs: 100 }; // its deadline is the first, and begins when the others are there
        const early = [0, 2, 3].map((r) => groups[r]!.allGather(new Uint8Array([r]), r === 3 ? last : {}));
        for (const error of await Promise.all(early.map((promise) => rejection(promise)))) {
          assert(error instanceof EpError);
          assertEquals([error.code, error.op, error.peer], ["timeout", "allGather", 1]);
          assertEquals(error.message, "Cannot run allGather: ranks 1, 4 of 5 did not arrive within 100 ms");
        }
        const late = await rejection(groups[1]!.allGather(new Uint8Array([66])));
        assertEquals(late.message, "Cannot run allGather: ranks 1, 4 of 5 did not arrive within 100 ms");
        const next = groups.map((group) =>
          group.rank === 4 ? rejection(group.barrier()) : group.allGather(dataOf(group.rank, 9))
        );
        await next[4];
        next[4] = groups[4]!.allGather(dataOf(4, 9));
        (await Promise.all(next as Promise<Uint8Array[]>[])).forEach((parts) =>
          parts.forEach((part, rank) => assertEquals(part, dataOf(rank, 9)))
        );
      }),
  );

  test(
    `${name}: a rank that comes late, but within the deadline, is waited for`,
    bounded,
    () =>
      withGroups(newGroups, 2, async (groups) => {
        const first = groups[0]!.barrier({ timeoutMs: 5000 });
        await new Promise((resolve) => setTimeout(resolve, 150));
        await Promise.all([first, groups[1]!.barrier()]);
      }),
  );

  test(
    `${name}: different collectives, and different subsets, are a mismatch`,
    bounded,
    () =>
      withGroups(newGroups, 3, async (groups) => {
        const mixed = [groups[0]!.barrier(), groups[1]!.allGather(new Uint8Array(1)), groups[2]!.barrier()];
        for (const error of await Promise.all(mixed.map((promise) => rejection(promise)))) {
          assertEquals(error.code, "mismatch");
        }
        const crossed = [groups[0]!.barrier({ ranks: [0, 1] }), groups[1]!.barrier({ ranks: [1, 0, 2] })];
        for (const error of await Promise.all(crossed.map((promise) => rejection(promise)))) {
          assertEquals(error.code, "mismatch");
          assert(/ranks 0, 1: rank \d is in barrier among|among ranks 0, 1$/.test(error.message), error.message);
        }
        // Each round with all ranks ends alike on all of them, also for those that were elsewhere.
        for (const rank of [0, 2]) assertEquals((await rejection(groups[rank]!.barrier())).code, "mismatch");
        await Promise.all(groups.map((group) => group.barrier()));
      }),
  );

  test(
    `${name}: a rank that leaves is named; subsets without it go on; leaving twice is leaving once`,
    bounded,
    () =>
      withGroups(newGroups, 5, async (groups) => {
        const pending = [0, 1, 3].map((r) => rejection(groups[r]!.barrier()));
        const own = rejection(groups[2]!.barrier({ ranks: [2, 4] }));
        await groups[2]![Symbol.asyncDispose]();
        await groups[2]![Symbol.asyncDispose]();
        for (const error of await Promise.all(pending)) {
          assertEquals([error.code, error.peer], ["peerLost", 2]);
          assertEquals(error.message, "Cannot run barrier: rank 2 has left the group");
        }
        assertEquals((await own).code, "closed");
        assertEquals((await rejection(groups[2]!.barrier())).code, "closed");
        assertEquals((await rejection(groups[0]!.allGather(new Uint8Array(1)))).code, "peerLost");
        const rest = [0, 1, 3].map((r) => groups[r]!.allGather(new Uint8Array([r]), { ranks: [0, 1, 3] }));
        for (const parts of await Promise.all(rest)) assertEquals(parts.map((part) => part.length), [1, 1, 0, 1, 0]);
      }),
  );

  test(
    `${name}: arguments are checked before anything is sent`,
    bounded,
    () =>
      withGroups(newGroups, 2, async (groups) => {
        const [group] = groups as [Group];
        const wrong: [Promise<unknown>, typeof RangeError, string][] = [
          [
            group.allGather(new Uint8Array(MAX_DATA_BYTES + 1)),
            RangeError,
            "data has 1048577 bytes, the limit is 1048576",
          ],
          [group.allGather("no" as unknown as Uint8Array), TypeError as typeof RangeError, "data is not a Uint8Array"],
          [group.barrier({ timeoutMs: 0 }), RangeError, "timeoutMs is 0"],
          [group.barrier({ timeoutMs: Infinity }), RangeError, "timeoutMs is Infinity"],
          [group.barrier({ ranks: [1] }), RangeError, "without the caller, rank 0"],
          [group.barrier({ ranks: [0, 2] }), RangeError, "ranks has 2, expected 0 to 1"],
          [group.barrier({ ranks: [0, 0] }), RangeError, "names a rank twice"],
        ];
        for (const [promise, type, text] of wrong) {
          const error = await rejection(promise);
          assertStrictEquals(error.constructor, type);
          assert(error.message.includes(text), error.message);
        }
        await Promise.all(groups.map((g) => g.barrier()));
      }),
  );
}
