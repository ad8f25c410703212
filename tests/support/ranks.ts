/**
 * Ranks for tests: n buffers of one process, driven by one thread, closed at the end whatever happens.
 * Called by the buffer tests; the conformance suite has its own drivers.
 */
import { type BufferOptions, EpBuffer, Group } from "@deepep/deepep";
import { constants } from "../../lib/ffi/abi.ts";
import { struct } from "../../lib/ffi/struct.ts";

const injectStruct = struct("deepep_inject_args");

/** Makes this rank late, silent or dead in a phase of its next `op`, once. */
export function inject(
  b: EpBuffer,
  op: keyof typeof constants.OP,
  phase: keyof typeof constants.PHASE,
  action: keyof typeof constants.INJECT,
  delayUs = 0,
): void {
  const [what, where] = [constants.OP[op][0], constants.PHASE[phase][0]];
  injectStruct.pack({ op: what, phase: where, action: constants.INJECT[action][0], delay_us: delayUs, count: 1 });
  b.core.call("deepep_inject", injectStruct, "inject");
}

/** A tiny buffer: 8 experts, top-2, rows of 32 bytes, 4 tokens a rank. */
export const tiny: BufferOptions = {
  backend: "cpu",
  hidden: 16,
  numExperts: 8,
  numTopk: 2,
  maxTokensPerRank: 4,
  maxLowLatencyTokensPerRank: 4,
  timeoutMs: 5000,
};

/** Runs `body` on each of `n` ranks at once; answers what each returned, and rejects with the first failure. */
export async function withRanks<T>(
  n: number,
  options: Partial<BufferOptions>,
  body: (buffer: EpBuffer, rank: number, group: Group) => Promise<T>,
): Promise<T[]> {
  const groups = Group.local(n);
  const buffers = await Promise.all(groups.map((g) => EpBuffer.create(g, { ...tiny, ...options })));
  try {
    return await Promise.all(buffers.map((b, rank) => body(b, rank, groups[rank]!)));
  } finally {
    await Promise.all(buffers.map((b) => b.close()));
    await Promise.all(groups.map((g) => g[Symbol.asyncDispose]()));
  }
}

/** {@linkcode withRanks} on a backend. */
export const ranksOf = (backend: "cpu" | "cuda"): typeof withRanks => (n, options, body) =>
  withRanks(n, { backend, ...options }, body);

/** The reason a promise rejects with; throws when it does not. */
export async function reasonOf(promise: PromiseLike<unknown>): Promise<Error> {
  try {
    await promise;
  } catch (error) {
    return error as Error;
  }
  throw new Error("expected a rejection");
}
