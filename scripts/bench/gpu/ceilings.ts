/**
 * What the device itself can move, measured in the same run by `deepep_measure_copy`.
 *
 * In: a device at rest. Out: gigabytes a second, each byte counted when it is read and when it is written, of the library's copy
 * kernel on some numbers of multiprocessors and of the driver's memcpy. Called by bench.ts before and after the calls. The bound
 * of a call is its least traffic over the fastest copy kernel.
 */
import type { EpBuffer } from "../../../mod.ts";
import { struct } from "../../../lib/ffi/struct.ts";
import { type Spread, spreadOf } from "../timing.ts";

const copyStruct = struct("deepep_measure_copy_args");

/** A copy, GB/s. */
export interface Ceiling {
  /** Of the kernel; undefined for the driver's memcpy. */
  readonly numSms: number | undefined;
  readonly gbs: Spread;
  /** Microseconds a copy. */
  readonly us: Spread;
  /** Bytes read and bytes written by a copy. */
  readonly traffic: number;
}

/** Copies of `bytes`: far more than caches hold. */
export function measureCopies(buffer: EpBuffer, numSms: readonly number[], bytes: number, rounds: number): Ceiling[] {
  const { device } = buffer.core, all = buffer.capabilities.numSms, traffic = 2 * bytes;
  const kernel = new Map<number, number[]>(), memcpy: number[] = [];
  const counts = [...new Set(numSms.map((n) => n === 0 || n > all ? all : n))];
  for (let round = 0; round <= rounds; round++) {
    for (const sms of counts) {
      copyStruct.pack({ num_sms: sms, bytes: BigInt(bytes), repeats: 5 });
      device.call("deepep_measure_copy", 0n, copyStruct, "measureCopy");
      if (round === 0) continue; // clocks rise
      kernel.set(sms, [...kernel.get(sms) ?? [], Number(copyStruct.get("kernel_ns")) / 1000]);
      memcpy.push(Number(copyStruct.get("memcpy_ns")) / 1000);
    }
  }
  const ceiling = (us: readonly number[], sms?: number): Ceiling => ({
    numSms: sms,
    gbs: spreadOf(us.map((one) => traffic / one / 1000)),
    us: spreadOf(us),
    traffic,
  });
  return [...[...kernel].map(([sms, us]) => ceiling(us, sms)), ceiling(memcpy)];
}

/** The fastest copy kernel: what bounds are made from. */
export function bestKernel(ceilings: readonly Ceiling[]): Ceiling | undefined {
  return ceilings.filter(({ numSms }) => numSms !== undefined)
    .reduce<Ceiling | undefined>((best, one) => one.gbs.median > (best?.gbs.median ?? 0) ? one : best, undefined);
}

/** The driver's. */
export const memcpyOf = (ceilings: readonly Ceiling[]): Ceiling | undefined =>
  ceilings.find(({ numSms }) => numSms === undefined);
