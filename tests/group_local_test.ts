/** Groups whose ranks share one thread: the rules of every group, and that they hold nothing afterwards. */
import { test } from "node:test";
import { assertEquals, assertThrows } from "@std/assert";
import { Group } from "../lib/group/group.ts";
import { runFailureCases, runHappyCases } from "./support/group_cases.ts";
import { bounded, startChild } from "./support/group_worlds.ts";

const newGroups = (size: number): Promise<Group[]> => Promise.resolve(Group.local(size));
runHappyCases("local", newGroups);
runFailureCases("local", newGroups);

test("local: the size is checked", bounded, () => {
  for (const size of [0, -1, 1.5, 4097]) assertThrows(() => Group.local(size), RangeError, `size is ${size}`);
  assertThrows(() => Group.local(2, { timeoutMs: -1 }), RangeError, "timeoutMs is -1");
});

test("local: a default deadline is the group's", bounded, async () => {
  const [first] = Group.local(2, { timeoutMs: 50 });
  const error = await first!.barrier().catch((reason) => reason);
  assertEquals(error.message, "Cannot run barrier: rank 1 of 2 did not arrive within 50 ms");
});

test("local: a group that was never left does not keep the process alive", bounded, async () => {
  const child = startChild("tests/support/group_child.ts", ["local"]);
  assertEquals((await child.ended).code, 0);
});
