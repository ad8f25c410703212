/**
 * Errors after the border. Checks before it throw `TypeError` (shape, type) and `RangeError` (value); what a library,
 * a peer or a group answers becomes an {@linkcode EpError} with the values in fields, and a library that cannot be
 * found, loaded or trusted a {@linkcode LibraryError}. Messages say what was being done, then the values.
 */
import { constants } from "./ffi/abi.ts";

/** What went wrong, as a word. */
export type EpErrorCode =
  | "invalidArgument"
  | "unsupported"
  | "outOfMemory"
  | "capacity"
  | "timeout"
  | "peerLost"
  | "aborted"
  | "mismatch"
  | "noFreeSlot"
  | "closed"
  | "system"
  | "internal"
  | "needsRecovery";

/** Facts that belong to an {@linkcode EpError}. */
export interface EpErrorDetails {
  /** What went wrong. */
  code: EpErrorCode;
  /** The operation, as in `dispatch` or `connect`. */
  op: string;
  /** The rank that reports. */
  rank?: number;
  /** The rank that is to blame, if one is known. */
  peer?: number;
  /** Where in the operation, as in `notify` or `reduce`. */
  phase?: string;
  /** The value waited for, or the limit. */
  expected?: number;
  /** The value found instead. */
  seen?: number;
  /** How long it was waited, nanoseconds. */
  waitedNs?: number;
  /** The error underneath. */
  cause?: unknown;
}

/** A failure reported by a library, a peer or a group. */
export class EpError extends Error {
  /** `"EpError"`. */
  override readonly name: string = "EpError";
  /** What went wrong. */
  readonly code: EpErrorCode;
  /** The operation. */
  readonly op: string;
  /** The rank that reports. */
  readonly rank: number | undefined;
  /** The rank that is to blame, if one is known. */
  readonly peer: number | undefined;
  /** Where in the operation. */
  readonly phase: string | undefined;
  /** The value waited for, or the limit. */
  readonly expected: number | undefined;
  /** The value found instead. */
  readonly seen: number | undefined;
  /** How long it was waited, nanoseconds. */
  readonly waitedNs: number | undefined;

  /** Makes an error from its message and facts. */
  constructor(message: string, details: EpErrorDetails) {
    super(message, details.cause === undefined ? undefined : { cause: details.cause });
    this.code = details.code;
    this.op = details.op;
    this.rank = details.rank;
    this.peer = details.peer;
    this.phase = details.phase;
    this.expected = details.expected;
    this.seen = details.seen;
    this.waitedNs = details.waitedNs;
  }
}

/** A native library that cannot be found, loaded or trusted. The message lists what was tried. */
export class LibraryError extends Error {
  /** `"LibraryError"`. */
  override readonly name: string = "LibraryError";
}

const camelCase = (name: string): string => name.toLowerCase().replace(/_(.)/g, (_, c: string) => c.toUpperCase());

const wordsByCode = (group: Record<string, readonly [number, string]>): Map<number, string> =>
  new Map(Object.entries(group).map(([name, [code]]) => [code, camelCase(name)]));

const errorWords = wordsByCode(constants.ERROR);
const opWords = wordsByCode(constants.OP);
const phaseWords = wordsByCode(constants.PHASE);

/** The word for a `DEEPEP_ERROR_*` code. */
export function errorCode(code: number): EpErrorCode {
  return (errorWords.get(code) ?? "internal") as EpErrorCode;
}

/** The `DEEPEP_ERROR_*` code that tells a peer why this rank refuses a call. */
export function nativeCode(error: unknown): number {
  const word = error instanceof EpError ? error.code : "invalidArgument";
  return [...errorWords].find(([, w]) => w === word)![0];
}

/** The fields of a `deepep_error`, as read at the border. */
export interface NativeError {
  code: number;
  op: number;
  phase: number;
  rank: number;
  peer: number;
  expected: bigint;
  seen: bigint;
  waited_ns: bigint;
  message: string;
}

/** An {@linkcode EpError} from a `deepep_error`. `op` is used where the record names none. */
export function fromNative(e: NativeError, op: string): EpError {
  return new EpError(e.message || `Cannot run ${op}: code ${e.code}`, {
    code: errorCode(e.code),
    op: e.op > 0 ? opWords.get(e.op) ?? op : op,
    ...(e.rank >= 0 ? { rank: e.rank } : {}),
    ...(e.peer >= 0 ? { peer: e.peer } : {}),
    ...(e.phase > 0 ? { phase: phaseWords.get(e.phase) ?? String(e.phase) } : {}),
    expected: Number(e.expected),
    seen: Number(e.seen),
    waitedNs: Number(e.waited_ns),
  });
}
