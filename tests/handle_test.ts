/**
 * Which native routing handles dispatches make, use again and free. In: a library that only notes its calls. That results are
 * right meanwhile is shown by the ownership cases of each backend.
 */
import { test } from "node:test";
import { assertEquals, assertRejects } from "@std/assert";
import { dispatch } from "../lib/dispatch.ts";
import { constants } from "../lib/ffi/abi.ts";
import { fakeWorld } from "./support/fake_device.ts";

test("a handle is made with some room, and used again by dispatches that fit", async () => {
  const { device, core, topkIdx, x } = fakeWorld();
  const take = async (tokens: number) =>
    (await dispatch(core, x.slice(0, tokens), { topkIdx: topkIdx.slice(0, tokens), cpuSync: false })).release();
  for (const tokens of [1, 1, 3, 4, 2, 1]) await take(tokens);
  const rooms = device.of("deepep_handle_create").map(({ args }) => [args.num_tokens, args.num_topk]);
  assertEquals(rooms, [[1, 2], [4, 2]]);
  const [small, large] = device.of("deepep_dispatch").filter((_, i) => i === 0 || i === 2).map(({ args }) =>
    args.handle
  );
  assertEquals(device.of("deepep_dispatch").map(({ args }) => args.handle), [small, small, large, large, large, small]);
});

test("of the handles that a buffer begins with each has room for every dispatch", async () => {
  const { device, core, topkIdx, x } = fakeWorld();
  core.routings.prepare();
  const { numSlots, maxTokensPerRank } = core.options;
  const rooms = () => device.of("deepep_handle_create").map(({ args }) => args.num_tokens);
  assertEquals(rooms(), new Array(numSlots).fill(maxTokensPerRank));
  for (const tokens of [1, 4, 2]) {
    const held = await Promise.all(
      Array.from(
        { length: numSlots },
        () => dispatch(core, x.slice(0, tokens), { topkIdx: topkIdx.slice(0, tokens), cpuSync: false }),
      ),
    );
    for (const result of held) result.release();
  }
  assertEquals(rooms().length, numSlots);
});

test("handles at rest are no more than slots, and go with the buffer", async () => {
  const { device, core, x, topkIdx } = fakeWorld();
  const kept = [];
  for (let i = 0; i < 5; i++) {
    const result = await dispatch(core, x, { topkIdx, cpuSync: false });
    kept.push(result.handle.keep());
    result.release();
  }
  const freed = () => device.of("deepep_handle_destroy").map(({ self }) => self);
  const made = device.of("deepep_dispatch").map(({ args }) => args.handle);
  assertEquals([new Set(made).size, freed().length], [5, 0]);
  for (const handle of kept.slice(0, 4)) handle.release();
  assertEquals(freed(), made.slice(0, 4 - core.options.numSlots));
  await core.close();
  assertEquals(freed().toSorted(), made.toSorted());
  kept[4]!.release();
  assertEquals(freed().length, 5);
});

test("a dispatch that fails while it is awaited gives its routing and its slot back", async () => {
  const { device, core, x, topkIdx } = fakeWorld();
  const fail = (what: "completed" | "hostRead", value: unknown) =>
    Object.defineProperty(device, what, { configurable: true, value });
  const failures: [() => void, () => void][] = [
    [
      () => fail("completed", () => Promise.resolve(constants.ERROR.TIMEOUT[0])),
      () => fail("completed", () => Promise.resolve(0)),
    ],
    [() =>
      fail("hostRead", () => {
        throw new Error("no memory");
      }), () => fail("hostRead", () => {})],
  ];
  for (const [begin, end] of failures) {
    begin();
    await assertRejects(() => dispatch(core, x, { topkIdx }));
    end();
    (await dispatch(core, x, { topkIdx })).release();
  }
  assertEquals(new Set(device.of("deepep_dispatch").map(({ args }) => args.handle)).size, 1);
  assertEquals(device.of("deepep_slot_release").length, 4);
});

test("who awaits a dispatch uses its routing, whoever releases the handle meanwhile", async () => {
  const { device, core, x, topkIdx } = fakeWorld();
  const first = await dispatch(core, x, { topkIdx, cpuSync: false });
  const pending = dispatch(core, x, { handle: first.handle }); // awaits its counts
  first.release();
  const between = await dispatch(core, x, { topkIdx, cpuSync: false });
  (await pending).release();
  const after = await dispatch(core, x, { topkIdx, cpuSync: false });
  const [a, b, c, d] = device.of("deepep_dispatch").map(({ args }) => args.handle);
  assertEquals([b === a, c === a, d === a], [true, false, true]);
  between.release();
  after.release();
});
