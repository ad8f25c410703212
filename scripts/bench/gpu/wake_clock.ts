/**
 * A clock that all threads share: CLOCK_MONOTONIC of the C library. `process.hrtime` begins anew in each worker of Deno.
 *
 * In: nothing. Out: a function that tells nanoseconds. Called by wake.ts and wake_watcher.ts.
 */
import { runtime } from "../../../lib/ffi/open.ts";

/** What no count is: written where the count will come. */
export const SENTINEL = -7;

/** The clock. */
export function monotonicNs(): () => bigint {
  if (!runtime) throw new Error("this runtime has no FFI that is known");
  const { clock_gettime } = runtime.bind("libc.so.6", { clock_gettime: { args: ["i32", "buf"], ret: "i32" } }) as {
    clock_gettime(clock: number, out: Uint8Array): number;
  };
  const out = new BigInt64Array(new ArrayBuffer(16)), bytes = new Uint8Array(out.buffer);
  return () => {
    clock_gettime(1, bytes);
    return out[0]! * 1_000_000_000n + out[1]!;
  };
}
