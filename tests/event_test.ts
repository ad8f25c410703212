/**
 * Which native events a buffer makes, keeps and frees. In: a library that only notes its calls. What events order is shown by the
 * order cases of each backend.
 */
import { test } from "node:test";
import { assertEquals } from "@std/assert";
import { fakeWorld } from "./support/fake_device.ts";

test("an operation has no native event until somebody asks for it, and then one", () => {
  const { device, core } = fakeWorld(), made = () => device.of("deepep_event_create").map(({ args }) => args.done_id);
  const event = core.barrier({});
  assertEquals(made(), []);
  event.wait(core.stream);
  event.wait(core.stream);
  assertEquals([made(), device.of("deepep_event_wait").length], [[device.of("deepep_barrier")[0]!.args.done_id], 2]);
  core.barrier({ previousEvent: event });
  assertEquals(device.of("deepep_barrier")[1]!.args.previous_event, event.address);
  assertEquals(made().length, 1);
});

test("native events that are given back are used again by records, and few are kept", async () => {
  const { device, core } = fakeWorld(), count = (name: string) => device.of(name).length;
  for (let native = 1n; native <= 1000n; native++) core.giveEvent(native);
  const freed = count("deepep_event_destroy");
  assertEquals(freed >= 900 && freed < 1000, true);
  for (let i = 0; i < 1000 - freed; i++) core.record();
  assertEquals(count("deepep_event_create"), 0);
  core.record();
  assertEquals(count("deepep_event_create"), 1);
  await core.close();
  core.giveEvent(7n);
  assertEquals(count("deepep_event_destroy"), freed);
});
