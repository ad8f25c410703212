/**
 * Creation: every rank opens its library, makes its native buffer, compares its options with everybody's, exchanges
 * memory handles and connects. In: a group and options. Out: a `Core`, or the same refusal on every rank: whoever fails
 * tells the others in the next exchange, so nobody is left waiting. Called by `EpBuffer.create`.
 */
import { ABI_VERSION, constants } from "./ffi/abi.ts";
import { struct } from "./ffi/struct.ts";
import { Core } from "./core.ts";
import { type Backend, type Device, openBest, openDevice, type Wake } from "./device.ts";
import { EpError, type EpErrorCode } from "./error.ts";
import type { Group } from "./group/group.ts";
import { type BufferShape, type ResolvedOptions, resolveOptions, whole } from "./plan.ts";

const createStruct = struct("deepep_buffer_create_args");
const handleStruct = struct("deepep_peer_handle");

/** Options of `EpBuffer.create`. */
export interface BufferOptions extends BufferShape {
  /** Which library does the work. Default `"auto"`: the best that works here; `buffer.backendReason` says why. */
  backend?: Backend | "auto";
  /** Library file, instead of the one that ships with the package. */
  library?: string;
  /** Device index. Default 0 on cpu, the local rank modulo the devices elsewhere. */
  device?: number;
  /** Deadline of each wait inside an operation, milliseconds. Default 30000. */
  timeoutMs?: number;
  /**
   * Multiprocessors an operation uses unless it says. Default: 16, in low latency 32, or an equal share of the device if that is
   * less. The cpu backend has none and takes any number.
   */
  numSms?: number;
  /** A peer that times out or dies is masked and calls go on without it, instead of failing; alike on every rank. Default false. */
  maskOnTimeout?: boolean;
  /**
   * How the event loop hears of operations that take longer than a millisecond: `"poll"`: by timers, 1 to 2 ms late;
   * `"callback"`: a native thread calls back, some 0.3 ms late; Deno then needs `--allow-ffi` without a path. Not in a worker that
   * others may terminate: that thread would call into it when it is gone, which ends the process. Default `"poll"`. Shorter
   * operations are polled on every turn either way.
   */
  wake?: Wake;
  /** Deadline of each exchange while the buffer is created, milliseconds. Default: the group's. */
  connectTimeoutMs?: number;
}

/** Packs options into the struct of creation. Zero means the library's default. */
export function packOptions(options: ResolvedOptions, extra: Record<string, number | bigint>): typeof createStruct {
  createStruct.pack({
    num_ranks: options.numRanks,
    hidden: options.hidden,
    num_experts: options.numExperts,
    num_topk: options.numTopk,
    max_tokens_per_rank: options.maxTokensPerRank,
    max_low_latency_tokens_per_rank: options.maxLowLatencyTokensPerRank,
    max_recv_tokens: options.maxRecvTokens,
    num_slots: options.numSlots,
    max_row_bytes: options.maxRowBytes,
    max_scale_bytes: options.maxScaleBytes,
    ...extra,
  });
  return createStruct;
}

/** What a rank says to all others in an exchange. */
type Word<T> = { ok: T } | { error: { code: EpErrorCode | "library"; message: string } };

/** Runs `local`, tells everyone how it went, and fails on every rank if it failed on any. */
async function together<T>(group: Group, timeoutMs: number | undefined, local: () => T | Promise<T>): Promise<T[]> {
  let word: Word<T>, own: unknown;
  try {
    word = { ok: await local() };
  } catch (error) {
    own = error;
    const code = error instanceof EpError ? error.code : "library";
    word = { error: { code, message: (error as Error).message } };
  }
  const bytes = new TextEncoder().encode(JSON.stringify(word));
  const words = (await group.allGather(bytes, timeoutMs === undefined ? {} : { timeoutMs }))
    .map((b) => JSON.parse(new TextDecoder().decode(b)) as Word<T>);
  if (own) throw own;
  return words.map((w, rank) => {
    if ("ok" in w) return w.ok;
    const code = w.error.code === "library" ? "aborted" : w.error.code;
    throw new EpError(`Cannot create the buffer: rank ${rank} says: ${w.error.message}`, {
      code,
      op: "create",
      rank: group.rank,
      peer: rank,
    });
  });
}

/** Throws when two ranks gave different options. Every rank finds the same pair. */
function compare(rank: number, all: readonly Record<string, string | number>[]): void {
  const first = all[0]!;
  for (const [peer, theirs] of all.entries()) {
    for (const key of new Set([...Object.keys(first), ...Object.keys(theirs)])) {
      if (theirs[key] === first[key]) continue;
      throw new EpError(
        `Cannot create the buffer: ${key} is ${first[key]} on rank 0 and ${
          theirs[key]
        } on rank ${peer}; every rank must give the same`,
        { code: "mismatch", op: "create", rank, peer: rank === peer ? 0 : peer },
      );
    }
  }
}

async function openLocal(options: BufferOptions): Promise<{ device: Device; reason: string }> {
  const backend = options.backend ?? "auto";
  const { library: path, wake = "poll" } = options, how = { path, wake };
  if (wake !== "poll" && wake !== "callback") {
    throw new RangeError(`Cannot create a buffer: wake is ${JSON.stringify(wake)}, needs poll or callback`);
  }
  if (backend === "auto") return await openBest(how);
  if (!["cpu", "cuda", "nvshmem"].includes(backend)) {
    throw new RangeError(
      `Cannot create a buffer: backend is ${JSON.stringify(backend)}, needs auto, cpu, cuda or nvshmem`,
    );
  }
  return { device: await openDevice(backend, how), reason: "asked for" };
}

/** Creates and connects a native buffer. Collective over the group. */
export async function connect(group: Group, options: BufferOptions): Promise<{ core: Core; reason: string }> {
  if (typeof group?.allGather !== "function") {
    throw new TypeError(
      "Cannot create a buffer: group is no group (Group.local(n) gives an array of n, one for each rank)",
    );
  }
  const wait = options.connectTimeoutMs;
  let opened: { device: Device; reason: string } | undefined, resolved: ResolvedOptions | undefined;
  const facts = await together(group, wait, async () => {
    resolved = resolveOptions(options, group.size);
    opened = await openLocal(options);
    return {
      ...resolved,
      maskOnTimeout: String(options.maskOnTimeout ?? false),
      backend: opened.device.backend,
      abiVersion: ABI_VERSION,
    } as Record<string, string | number>;
  });
  compare(group.rank, facts);
  const { device, reason } = opened!;
  let native = 0n, core: Core | undefined;
  try {
    const handles = await together(group, wait, () => {
      native = create(device, group, options, resolved!);
      handleStruct.pack({});
      device.call("deepep_buffer_export", native, handleStruct, "create");
      return btoa(String.fromCharCode(...handleStruct.bytes));
    });
    await together(group, wait, () => {
      for (const text of handles) {
        handleStruct.load(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)));
        device.call("deepep_buffer_import", native, handleStruct, "create");
      }
      device.end("deepep_buffer_connect", native, "create");
      core = new Core(device, native, resolved!, deviceIndex(device, group, options));
      core.routings.prepare();
      if (options.maskOnTimeout) core.maskings = NaN;
      return true;
    });
    return { core: core!, reason };
  } catch (error) {
    core?.routings.clear();
    if (native !== 0n) device.end("deepep_buffer_destroy", native, "create");
    throw error;
  }
}

/** The device of a rank. */
function deviceIndex(device: Device, group: Group, options: BufferOptions): number {
  if (options.device !== undefined || device.backend === "cpu") return whole("device", options.device ?? 0, 0, 65_535);
  return group.localRank % Math.max(1, device.numDevices);
}

function create(device: Device, group: Group, options: BufferOptions, resolved: ResolvedOptions): bigint {
  const { timeoutMs = 0, numSms = 0 } = options;
  const index = deviceIndex(device, group, options);
  const args = packOptions(resolved, {
    flags: options.maskOnTimeout ? constants.BUFFER.MASK_ON_TIMEOUT[0] : 0,
    rank: group.rank,
    device: index,
    timeout_ms: whole("timeoutMs", timeoutMs, 0, 86_400_000),
    num_sms: whole("numSms", numSms, 0, 65_535),
    queue: device.queue,
  });
  device.call("deepep_buffer_create", 0n, args, "create");
  return args.get("buffer");
}

/** Bytes of a rank's buffer, by what they are for. */
export interface BufferSize {
  /** Memory that peers map: control + slots. */
  readonly symmetricBytes: number;
  /** Flags and count messages. */
  readonly controlBytes: number;
  /** One slot. */
  readonly slotBytes: number;
  /** Received rows of a slot. */
  readonly recvXBytes: number;
  /** Received scales of a slot, and room to turn them into columns. */
  readonly recvScalesBytes: number;
  /** Expert outputs of a slot. */
  readonly expertOutputBytes: number;
  /** Top-k, source indices and counts of a slot. */
  readonly metadataBytes: number;
  /** Memory that peers do not see. */
  readonly localBytes: number;
  /** Device memory of a dispatch's handle, beside `localBytes`: `numSlots` of them are made at creation. */
  readonly handleBytes: number;
  /** Rows a slot holds. */
  readonly maxRecvTokens: number;
}

/** What a buffer with these options would allocate on each rank. Allocates nothing. */
export async function sizeHint(options: BufferOptions & { numRanks: number }): Promise<BufferSize> {
  const resolved = resolveOptions(options, options.numRanks);
  const { device } = await openLocal(options);
  const args = packOptions(resolved, { rank: 0 });
  device.call("deepep_buffer_size", BigInt(options.device ?? 0), args, "sizeHint");
  const bytes = (name: Parameters<typeof args.get>[0]) => Number(args.get(name));
  return {
    symmetricBytes: bytes("symmetric_bytes"),
    controlBytes: bytes("control_bytes"),
    slotBytes: bytes("slot_bytes"),
    recvXBytes: bytes("recv_x_bytes"),
    recvScalesBytes: bytes("recv_scales_bytes"),
    expertOutputBytes: bytes("expert_output_bytes"),
    metadataBytes: bytes("metadata_bytes"),
    localBytes: bytes("local_bytes"),
    handleBytes: bytes("handle_bytes"),
    maxRecvTokens: resolved.maxRecvTokens,
  };
}
