/**
 * Types that must tell the truth. The checks are the type checker's: a wrong type is an error in the gate; at run time
 * the same calls show that what arrives is what the type says.
 */
import { test } from "node:test";
import { assertEquals } from "@std/assert";
import type { EpBuffer, LowLatencyDispatchOptions, ScaledRows, Tensor } from "@deepep/deepep";
import { withRanks } from "./support/ranks.ts";

type Same<A, B> = (<T>() => T extends A ? 1 : 2) extends <T>() => T extends B ? 1 : 2 ? true : never;
type Cast = ScaledRows<"f8e4m3", "f32" | "i32">;
const same = <A, B>(_: Same<A, B>): void => {};

/** What arrives, as a word. */
const kind = (x: Tensor | ScaledRows): string => "data" in x ? x.data.dtype : x.dtype;

function received(b: EpBuffer, x: Tensor<"bf16">, topkIdx: Tensor, fp8: boolean): string {
  const options: LowLatencyDispatchOptions = { topkIdx, fp8 }, any: Tensor = x;
  using default_ = b.lowLatencyDispatch(x, { topkIdx });
  using on = b.lowLatencyDispatch(x, { topkIdx, fp8: true });
  using off = b.lowLatencyDispatch(x, { topkIdx, fp8: false });
  using some = b.lowLatencyDispatch(x, { topkIdx, fp8 });
  using stored = b.lowLatencyDispatch(x, options);
  using unknown = b.lowLatencyDispatch(any, { topkIdx });
  same<typeof default_.x, Cast>(true);
  same<typeof on.x, Cast>(true);
  same<typeof off.x, Tensor<"bf16">>(true);
  same<typeof some.x, Tensor<"bf16"> | Cast>(true);
  same<typeof stored.x, Tensor<"bf16"> | Cast>(true);
  same<typeof unknown.x, Tensor | Cast>(true);
  return [default_, on, off, some, stored, unknown].map(({ x }) => kind(x)).join(" ");
}

test("a low-latency dispatch is typed by what arrives, as far as the types tell", async () => {
  await withRanks(1, { numSlots: 6 }, (b) => {
    using x = b.tensor("bf16", [1, 16], new Float32Array(16)), topkIdx = b.tensor("i32", [1, 2], Int32Array.of(0, 1));
    assertEquals(received(b, x, topkIdx, false), "f8e4m3 f8e4m3 bf16 bf16 bf16 f8e4m3");
    assertEquals(received(b, x, topkIdx, true), "f8e4m3 f8e4m3 bf16 f8e4m3 f8e4m3 f8e4m3");
    return Promise.resolve();
  });
});
