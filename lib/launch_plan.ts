/**
 * Launch plans: how an operation is cut into blocks, warps and pieces of rows on a GPU. In: shapes and topology. Out: what
 * the library would launch, from the same function that it asks before each launch; no device is needed. Called by
 * `EpBuffer.plan`, by the bench, and by anyone who wants to print it.
 */
import { constants } from "./ffi/abi.ts";
import { struct, type StructInput } from "./ffi/struct.ts";
import type { Core } from "./core.ts";
import { type Backend, type Device, openDevice } from "./device.ts";
import type { RowLayout } from "./handle.ts";

const planStruct = struct("deepep_plan_args");

/** An operation that has a launch plan. */
export type PlannedOp = "dispatch" | "combine" | "lowLatencyDispatch" | "lowLatencyCombine";
const planned = {
  dispatch: "DISPATCH",
  combine: "COMBINE",
  lowLatencyDispatch: "LOW_LATENCY_DISPATCH",
  lowLatencyCombine: "LOW_LATENCY_COMBINE",
} as const satisfies Record<PlannedOp, keyof typeof constants.OP>;

/** What `EpBuffer.plan` is asked. */
export interface BufferPlanOptions {
  /** The operation. */
  op: PlannedOp;
  /** Payload bytes a row, before a cast to FP8. Default: the buffer's `2 * hidden` (bf16). */
  rowBytes?: number;
  /** Row layout, in normal mode. Default `"rank"`. */
  layout?: RowLayout;
  /** Low latency: tokens of this rank. Default: the buffer's `maxLowLatencyTokensPerRank`. */
  numTokens?: number;
  /** Low latency: rows are cast to FP8. Default as for the call: true for a dispatch, false for a combine. */
  fp8?: boolean;
  /** Multiprocessors asked for. Default: the buffer's. */
  numSms?: number;
}

/** What {@linkcode launchPlan} is asked: the same, with the shapes and topology that a buffer would know. */
export interface LaunchPlanOptions extends BufferPlanOptions {
  /** Payload bytes a row, before a cast to FP8. */
  rowBytes: number;
  /** Ranks in the group. */
  numRanks: number;
  /** Experts a token. */
  numTopk: number;
  /** Experts in all: `"lowLatencyDispatch"` needs it. */
  numExperts?: number;
  /** Low latency: tokens of a rank. Default 128. */
  numTokens?: number;
  /** Multiprocessors of the device. */
  deviceSms: number;
  /** Ranks that share the device. Default 1. */
  ranksOnDevice?: number;
  /** 10 * major + minor: 90 for 9.0. */
  computeCapability: number;
  /** Shared memory that a block can have, bytes. Default 232448, that of compute capability 9.0 and 10.0. */
  sharedBytes?: number;
  /** The library that is asked. Default `"cuda"`. */
  backend?: Backend;
  /** Library file, instead of the one that ships with the package. */
  library?: string;
}

/** How an operation is launched. */
export interface LaunchPlan {
  /** The operation. */
  readonly op: PlannedOp;
  /** Payload bytes a row. */
  readonly rowBytes: number;
  /** Rows a token becomes at most. */
  readonly hops: number;
  /** Multiprocessors used: one block each. */
  readonly numSms: number;
  /** Warps a block. */
  readonly warps: number;
  /** Pieces of rows that a warp has under way. */
  readonly stages: number;
  /** Bytes of a piece of a row. */
  readonly chunkBytes: number;
  /** Shared memory a block uses, bytes. */
  readonly blockBytes: number;
  /** Bulk copies by the tensor memory accelerator; otherwise loads and stores. */
  readonly tma: boolean;
}

function ask(
  device: Device,
  buffer: bigint,
  o: BufferPlanOptions,
  values: StructInput<"deepep_plan_args"> & { row_bytes: number; hops: number; num_tokens: number },
): LaunchPlan {
  const op = Object.hasOwn(planned, o.op) ? planned[o.op] : undefined;
  if (!op) {
    const known = Object.keys(planned).map((name) => JSON.stringify(name)).join(", ");
    throw new RangeError(`Cannot plan: op is ${JSON.stringify(o.op)}, needs one of ${known}`);
  }
  const num_tokens = op.startsWith("LOW_LATENCY") ? values.num_tokens : 0;
  const fp8 = o.fp8 ?? op === "LOW_LATENCY_DISPATCH" ? 1 : 0;
  planStruct.pack({ ...values, num_tokens, fp8, op: constants.OP[op][0] });
  device.call("deepep_plan", buffer, planStruct, "plan");
  const { sms, warps, stages, chunk_bytes, block_bytes, tma } = planStruct.read();
  return {
    op: o.op,
    rowBytes: values.row_bytes,
    hops: values.hops,
    numSms: sms,
    warps,
    stages,
    chunkBytes: chunk_bytes,
    blockBytes: block_bytes,
    tma: tma === 1,
  };
}

/** Rows a token becomes at most: one a rank that it goes to, or one an expert. Without top-k it may go to every rank. */
function hopsOf(o: BufferPlanOptions, numRanks: number, numTopk: number): number {
  if (o.layout === "expert" || o.op === "lowLatencyDispatch" || o.op === "lowLatencyCombine") return numTopk;
  return numTopk === 0 ? numRanks : Math.min(numRanks, numTopk);
}

/** The plan of an operation on a buffer. */
export function bufferPlan(core: Core, o: BufferPlanOptions): LaunchPlan {
  core.open("plan");
  const { numTopk, hidden, maxLowLatencyTokensPerRank } = core.options;
  return ask(core.device, core.native, o, {
    row_bytes: o.rowBytes ?? 2 * hidden,
    hops: hopsOf(o, core.numRanks, numTopk),
    num_tokens: o.numTokens ?? maxLowLatencyTokensPerRank,
    num_sms: o.numSms ?? 0,
  });
}

/**
 * The plan of an operation anywhere: a pure function of its arguments, computed by the library, without a device.
 *
 * @throws {LibraryError} when the library cannot be found or loaded
 * @throws {EpError} `unsupported` on the cpu backend, `invalidArgument` when `numSms` does not fit beside the ranks of the device
 * @throws {RangeError} when `computeCapability` is no such number, or `numExperts` is missing
 */
export async function launchPlan(o: LaunchPlanOptions): Promise<LaunchPlan> {
  if (!Number.isInteger(o.computeCapability) || o.computeCapability < 50) {
    throw new RangeError(
      `Cannot plan: computeCapability is ${o.computeCapability}, needs 10 * major + minor, as 90 for 9.0`,
    );
  }
  if (o.op === "lowLatencyDispatch" && o.numExperts === undefined) {
    throw new RangeError(`Cannot plan: ${o.op} needs numExperts`);
  }
  const device = await openDevice(o.backend ?? "cuda", { path: o.library });
  return ask(device, 0n, o, {
    row_bytes: o.rowBytes,
    hops: hopsOf(o, o.numRanks, o.numTopk),
    num_tokens: o.numTokens ?? 128,
    num_experts: o.numExperts ?? 0,
    num_sms: o.numSms ?? 0,
    device_sms: o.deviceSms,
    ranks_on_device: o.ranksOnDevice ?? 1,
    compute_capability: o.computeCapability,
    shared_bytes: o.sharedBytes ?? 232_448,
  });
}

/** One line for people. */
export function formatLaunchPlan(plan: LaunchPlan): string {
  const how = plan.tma ? "TMA" : "loads and stores";
  return `${plan.op}: ${plan.numSms} SMs x ${plan.warps} warps, rows of ${plan.rowBytes} B to at most ${plan.hops} places ` +
    `in pieces of ${plan.chunkBytes} B, ${plan.stages} under way a warp, ${plan.blockBytes} B shared a block, by ${how}`;
}
