/**
 * A device: an open native library, the completion queue of this realm (main thread or worker), and the one way to call.
 * In: a backend's name. Out: `call()`, which turns a status code into an `EpError`, and promises for completions.
 * Called by buffer, stream and tensor; nothing above this file sees a codec's bytes or a status code.
 */
import { Completions, wakeOf } from "./ffi/completions.ts";
import { constants, type functions } from "./ffi/abi.ts";
import { type Library, openLibrary } from "./ffi/open.ts";
import { struct, type StructCodec } from "./ffi/struct.ts";
import { EpError, errorCode, fromNative, LibraryError } from "./error.ts";

/** A backend: which library does the work. */
export type Backend = "cpu" | "cuda" | "nvshmem";

type Functions = typeof functions;
/** Names of the functions that take a self, an argument struct and an error. */
export type CallName = {
  [N in keyof Functions]: Functions[N]["args"] extends
    readonly [readonly [string, "u64"], readonly ["args", string], readonly ["error", string]] ? N : never;
}[keyof Functions];
/** Names of the functions that take a self and an error. */
export type EndName = {
  [N in keyof Functions]: Functions[N]["args"] extends readonly [readonly [string, "u64"], readonly ["error", string]]
    ? N
    : never;
}[keyof Functions];

/** How the event loop hears of long operations: it polls by timer, or a native thread calls back. */
export type Wake = "poll" | "callback";

/** What a device can do. */
export interface Capabilities {
  /** The backend. */
  readonly backend: Backend;
  /** The device's name. */
  readonly name: string;
  /** Devices seen. */
  readonly numDevices: number;
  /** Multiprocessors, or cores. */
  readonly numSms: number;
  /** 10 * major + minor; 0 for cpu. */
  readonly computeCapability: number;
  /** Memory of the device, bytes. */
  readonly totalBytes: number;
  /** Version of the CUDA driver, as in `"13.0"`; empty for cpu. */
  readonly driverVersion: string;
  /** Whether processes share the device through CUDA MPS; several ranks on one GPU in several processes need it. */
  readonly mps: boolean;
  /** Largest number of ranks. */
  readonly maxRanks: number;
  /** Bits of `DEEPEP_FEATURE_*`. */
  readonly features: number;
}

const errorStruct = struct("deepep_error");
const queueStruct = struct("deepep_queue_create_args");
const capabilitiesStruct = struct("deepep_capabilities");
const statusStruct = struct("deepep_status_args");

/** An open library with a completion queue. One per realm and library file. */
export class Device {
  /** The backend's name. */
  readonly backend: Backend;
  /** The library file. */
  readonly path: string;
  /** The completion queue that buffers of this realm are created with. */
  readonly queue: bigint;
  readonly #symbols: Library["symbols"];
  readonly #completions: Completions;

  /** @ignore Use {@linkcode openDevice}. */
  constructor(backend: Backend, library: Library, wake: Wake = "poll") {
    this.backend = backend;
    this.path = library.path;
    this.#symbols = library.symbols;
    this.#checkBackend();
    queueStruct.pack({});
    this.call("deepep_queue_create", 0n, queueStruct, "create");
    const queue = this.queue = queueStruct.get("queue");
    // Kernels of the cpu backend run on the cores that polling would burn, so it polls each turn only briefly.
    this.#completions = new Completions({
      drain: (out, capacity) => this.#symbols.deepep_queue_drain(queue, out, capacity),
      ...(wake === "callback" && { wake: wakeOf(library, queue) }),
    }, { spinMs: backend === "cpu" ? 0.1 : 10 });
  }

  /** One backend's library given for another's would work, and be taken for what it is not. */
  #checkBackend(): void {
    capabilitiesStruct.pack({});
    // Without a device there is nothing to ask; creating a buffer says so.
    if (this.#symbols.deepep_get_capabilities(0n, capabilitiesStruct.bytes, errorStruct.reset()) !== 0) return;
    const code = capabilitiesStruct.get("backend");
    if (code === constants.BACKEND[this.backend.toUpperCase() as Uppercase<Backend>][0]) return;
    const name = Object.entries(constants.BACKEND).find(([, [value]]) => value === code)?.[0].toLowerCase();
    throw new LibraryError(
      `Cannot use ${this.path}: it is the library of backend ${name ?? code}, not of ${this.backend}`,
    );
  }

  /** Calls `name` with a packed struct; throws {@linkcode EpError} on a non-zero status. `op` names it in errors. */
  call(name: CallName, self: bigint, args: StructCodec, op: string): void {
    const code = (this.#symbols[name] as (self: bigint, args: Uint8Array, error: Uint8Array) => number)(
      self,
      args.bytes,
      errorStruct.reset(),
    );
    if (code !== constants.ERROR.OK[0]) throw fromNative(errorStruct.read(), op);
  }

  /** Calls a function without an argument struct. */
  end(name: EndName, self: bigint, op: string): void {
    const code = this.#symbols[name](self, errorStruct.reset());
    if (code !== constants.ERROR.OK[0]) throw fromNative(errorStruct.read(), op);
  }

  /** Copies host memory of the library into `into`. */
  hostRead(address: bigint, into: ArrayBufferView): void {
    if (into.byteLength === 0) return;
    const code = this.#symbols.deepep_host_read(address, into, BigInt(into.byteLength));
    if (code !== 0) {
      throw new EpError(`Cannot read ${into.byteLength} bytes: bad address`, { code: "internal", op: "copy" });
    }
  }

  /** Copies `from` into host memory of the library. */
  hostWrite(address: bigint, from: ArrayBufferView): void {
    if (from.byteLength === 0) return;
    const code = this.#symbols.deepep_host_write(address, from, BigInt(from.byteLength));
    if (code !== 0) {
      throw new EpError(`Cannot write ${from.byteLength} bytes: bad address`, { code: "internal", op: "copy" });
    }
  }

  /** A fresh completion id. */
  nextId(): number {
    return this.#completions.nextId();
  }

  /** Gives up an id whose call was refused. */
  forget(id: number): void {
    this.#completions.forget(id);
  }

  /** The status of the completion `id`, once it is queued. */
  completed(id: number): Promise<number> {
    return this.#completions.wait(id);
  }

  /** The failure that the completion `id` came with, after reading the queue; 0 for none, or none yet. */
  statusOf(id: number): number {
    if (id === 0) return 0;
    this.poll();
    return this.#completions.statusOf(id);
  }

  /** Whether the completion `id` has come, after reading the queue. */
  hasCompleted(id: number): boolean {
    this.poll();
    return this.#completions.has(id);
  }

  /** Reads the queue: promises of what has come are kept. */
  poll(): void {
    this.#completions.poll();
  }

  /** Now and then takes completions that nobody waits for off the queue, which a program that never awaits would grow. */
  sweep(): void {
    this.#completions.sweep();
  }

  /** The failure of the operation whose completion `id` came with `status`, as an error. */
  failure(buffer: bigint, id: number, op: string, status: number): EpError {
    statusStruct.pack({ id });
    const code = this.#symbols.deepep_get_status(buffer, statusStruct.bytes, errorStruct.reset());
    if (code === status) return fromNative(errorStruct.read(), op);
    // Operations that a graph replays have no ids: their record is the latest.
    if (op === "graph") {
      statusStruct.pack({ id: 0 });
      const latest = this.#symbols.deepep_get_status(buffer, statusStruct.bytes, errorStruct.reset());
      if (latest === status) return fromNative(errorStruct.read(), op);
    }
    // The record has gone with the buffer, or made room for later ones; the completion's status is left.
    const word = errorCode(status);
    return new EpError(`Cannot finish ${op}: it failed with ${word}; its record is gone`, { code: word, op });
  }

  /** How many devices it sees; 0 also where it cannot look: creating a buffer says why, as everywhere. */
  get numDevices(): number {
    capabilitiesStruct.pack({});
    const code = this.#symbols.deepep_get_capabilities(0n, capabilitiesStruct.bytes, errorStruct.reset());
    return code === constants.ERROR.OK[0] ? capabilitiesStruct.get("num_devices") : 0;
  }

  /** What device `index` can do. */
  capabilities(index = 0): Capabilities {
    capabilitiesStruct.pack({});
    this.call("deepep_get_capabilities", BigInt(index), capabilitiesStruct, "capabilities");
    const c = capabilitiesStruct.read();
    return {
      backend: this.backend,
      name: c.name,
      numDevices: c.num_devices,
      numSms: c.num_sms,
      computeCapability: c.compute_capability,
      totalBytes: Number(c.total_bytes),
      driverVersion: c.driver_version === 0
        ? ""
        : `${Math.floor(c.driver_version / 1000)}.${Math.floor(c.driver_version % 1000 / 10)}`,
      mps: c.mps === 1,
      maxRanks: c.max_ranks,
      features: c.features,
    };
  }
}

const open = new Map<string, Promise<Device>>();

/** Where a device's library is, and how it is listened to. */
export interface DeviceOptions {
  readonly path?: string | undefined;
  readonly wake?: Wake | undefined;
}

/** Opens a backend's library; the same device for the same options in this realm. @throws {LibraryError} */
export function openDevice(backend: Backend, { path, wake }: DeviceOptions = {}): Promise<Device> {
  const key = `${backend}:${wake ?? "poll"}:${path ?? ""}`;
  const found = open.get(key);
  if (found) return found;
  const opening = openLibrary(backend, path === undefined ? {} : { path }).then((library) =>
    new Device(backend, library, wake)
  );
  open.set(key, opening);
  opening.catch(() => open.delete(key));
  return opening;
}

/** Opens the best backend that works here and says which and why. @throws {LibraryError} when none does */
export async function openBest(options: DeviceOptions = {}): Promise<{ device: Device; reason: string }> {
  const tried: { short: string; whole: string }[] = [];
  for (const backend of ["nvshmem", "cuda", "cpu"] as const) {
    if (backend === "nvshmem") { // only worth its set-up between nodes: asked for by name
      continue;
    }
    try {
      const device = await openDevice(backend, options);
      if (device.capabilities().numDevices === 0) throw new LibraryError("it sees no device");
      return {
        device,
        reason: tried.length === 0 ? `${backend} works here` : tried.map(({ short }) => `no ${short}`).join("; "),
      };
    } catch (error) {
      const [first] = (error as Error).message.split("\n"); // the rest lists the places that were looked at
      tried.push({ short: `${backend}: ${first!.replace(/, tried:$/, "")}`, whole: (error as Error).message });
    }
  }
  throw new LibraryError(`Cannot find a backend that works here\n${tried.map(({ whole }) => whole).join("\n")}`);
}
