/** Order on the CPU backend; and what it answers where only a GPU has something to say. */
import { test } from "node:test";
import { assertEquals, assertThrows } from "@std/assert";
import { EpError } from "@deepep/deepep";
import { layer, runOrderCases } from "./support/order_cases.ts";
import { runOverlapCases } from "./support/overlap_cases.ts";
import { withRanks } from "./support/ranks.ts";

runOrderCases({ name: "cpu", backend: "cpu" });
runOverlapCases({ name: "cpu", backend: "cpu" });

test("there are no launch plans and no graphs without a GPU, and asking changes nothing", async () => {
  await withRanks(2, {}, async (b) => {
    for (const ask of [() => b.plan({ op: "dispatch" }), () => b.capture(b.stream, () => "nothing")]) {
      assertEquals(assertThrows(ask, EpError).code, "unsupported");
    }
    assertEquals(b.numSms, 0);
    await layer(b);
  });
});
