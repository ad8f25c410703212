/**
 * What the device itself can move, measured in the same run by `deepep_measure_copy`.
 *
 * In: a device at rest. Out: gigabytes a second, each byte counted when it is read and when it is written, of the library's copy
 * kernel on some numbers of multiprocessors and of the driver's memcpy. Called by bench.ts before and after the calls. The copy
 * kernel that counts is the fastest, of any size and number of multiprocessors: how fast one copy is depends on where its memory
 * happens to lie. The driver's memcpy is the faster one; what share of it is reached stands beside. plain.ts has the other kernels.
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

/** Sizes of copies, far more than caches hold. */
export const COPY_BYTES: readonly number[] = [2 ** 29, 2 ** 30, 3 * 2 ** 29];

/** Copies of `bytes`. */
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

/** The fastest. */
function fastest(ceilings: readonly Ceiling[]): Ceiling | undefined {
  return ceilings.toSorted((a, b) => b.gbs.median - a.gbs.median)[0];
}

/** The fastest copy kernel, of `numSms` if that is given: what bounds are made from. */
export const bestKernel = (ceilings: readonly Ceiling[], numSms?: number): Ceiling | undefined =>
  fastest(ceilings.filter((one) => one.numSms !== undefined && (numSms === undefined || one.numSms === numSms)));

/** The driver's fastest. */
export const bestMemcpy = (ceilings: readonly Ceiling[]): Ceiling | undefined =>
  fastest(ceilings.filter(({ numSms }) => numSms === undefined));
