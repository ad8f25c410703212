/**
 * Streams and events: order on the device. A stream runs its work in order; an event marks a point that other streams,
 * or the host, wait for. In: native objects made by a buffer, or a foreign `cudaStream_t` address. Called by users and
 * by every operation.
 */
import type { Device } from "./device.ts";
import { EpError } from "./error.ts";
import { struct } from "./ffi/struct.ts";

const eventStruct = struct("deepep_event_args");
const elapsedStruct = struct("deepep_event_elapsed_args");

/** A stream of a device: work enqueued on it runs in order. */
export class Stream {
  /** The native stream; on CUDA a `cudaStream_t`. */
  readonly address: bigint;
  /** @ignore Use `buffer.createStream()` or {@linkcode Stream.from}. */
  constructor(address: bigint) {
    this.address = address;
  }
  /** Wraps a foreign stream, as another binding gives it. It is never destroyed from here. */
  static from(address: bigint): Stream {
    if (typeof address !== "bigint") {
      throw new TypeError(`Cannot wrap a stream: address is ${typeof address}, needs a bigint`);
    }
    return new Stream(address);
  }
}

/** The native stream, checked to be one: another address would be taken for a stream by a GPU's driver. */
export function streamAddress(op: string, stream: Stream): bigint {
  if (!(stream instanceof Stream)) throw new TypeError(`Cannot ${op}: stream is no stream`);
  return stream.address;
}

/** What an event needs of the buffer it belongs to. */
export interface EventOwner {
  readonly device: Device;
  readonly native: bigint;
  /** Takes back a native event that nobody can use any more. */
  giveEvent(native: bigint): void;
  /** A native event of the end of an operation, found by its completion id. */
  endOf(id: number): bigint;
}

// A native event at rest is a small host object; giving it back late costs nothing, so collection may do it.
const collected = new FinalizationRegistry<{ owner: EventOwner; native: bigint }>(({ owner, native }) => {
  owner.giveEvent(native);
});

/**
 * A point in a stream. `event.wait(stream)` orders another stream after it; `await event` waits on the host. Being awaitable,
 * an event that an async function returns by itself is awaited there: return it in an object to hand it on.
 *
 * The event of a captured operation, or of a captured stream, orders what is captured with it and is of no use outside of
 * that capture: there use the event that `graph.launch()` returns.
 */
export class EpEvent implements PromiseLike<void> {
  readonly #owner: EventOwner;
  readonly #op: string;
  readonly #id: number | "captured";
  #settled: Promise<void> | undefined;
  /** 0 until it is asked for: most operations are waited for by their stream, or by the host, which needs their id alone. */
  #native = 0n;

  /**
   * @ignore Operations and `buffer.record()` make events. `id` is the operation's completion id, 0 for none; an operation
   * that was captured never completes: the replays of its graph do. Without a native event an id is needed.
   */
  constructor(owner: EventOwner, op: string, id: number | "captured", native = 0n) {
    this.#owner = owner;
    this.#op = op;
    this.#id = id;
    if (native !== 0n) this.#hold(native);
  }

  #hold(native: bigint): void {
    this.#native = native;
    collected.register(this, { owner: this.#owner, native });
  }

  /** The native event, made when it is first asked for. */
  get address(): bigint {
    if (this.#native === 0n) this.#hold(this.#owner.endOf(this.#id as number));
    return this.#native;
  }

  /**
   * Makes `stream` wait for this point. Returns at once; costs the host one call.
   *
   * @throws {EpError} `invalidArgument` when the point was captured and `stream` is not part of the same capture
   */
  wait(stream: Stream): void {
    if (!(stream instanceof Stream)) throw new TypeError("Cannot make a stream wait: stream is no stream");
    eventStruct.pack({ stream: stream.address });
    this.#owner.device.call("deepep_event_wait", this.address, eventStruct, "event");
  }

  /** Whether the point has been reached. @throws {EpError} `invalidArgument` when it was captured */
  get done(): boolean {
    if (typeof this.#id === "number" && this.#id !== 0) return this.#owner.device.hasCompleted(this.#id);
    eventStruct.pack({});
    this.#owner.device.call("deepep_event_query", this.address, eventStruct, "event");
    return eventStruct.get("done") === 1;
  }

  /**
   * Milliseconds from `earlier`'s point to this one, as the device measured them. Both must have been reached: `await` them,
   * or see `done`. The resolution is about a microsecond. The event of an operation keeps no time, which would cost every
   * call a microsecond: measure between events of `buffer.record()`.
   *
   * @throws {EpError} `invalidArgument` when one of the points has not been reached yet, or was captured
   */
  elapsedSince(earlier: EpEvent): number {
    if (!(earlier instanceof EpEvent)) throw new TypeError("Cannot measure a time: earlier is no event");
    elapsedStruct.pack({ since: earlier.address });
    this.#owner.device.call("deepep_event_elapsed", this.address, elapsedStruct, "event");
    return Number(elapsedStruct.get("elapsed_ns")) / 1e6;
  }

  /** Throws the failure of the operation, if it has ended in one. Does not wait. */
  check(): void {
    if (this.#id === "captured" || this.#id === 0) return; // failures are those of the replays; a point has none
    const { device, native } = this.#owner;
    const status = device.statusOf(this.#id);
    if (status !== 0) throw device.failure(native, this.#id, this.#op, status);
  }

  /** Resolves when the point is reached. @throws {EpError} when the operation failed, or was captured */
  then<A = void, B = never>(
    onDone?: ((value: void) => A | PromiseLike<A>) | null,
    onError?: ((reason: unknown) => B | PromiseLike<B>) | null,
  ): Promise<A | B> {
    return (this.#settled ??= this.#wait()).then(onDone, onError);
  }

  async #wait(): Promise<void> {
    const { device, native } = this.#owner;
    if (this.#id === "captured") {
      throw new EpError(
        `Cannot wait for the end of a captured ${this.#op}: it orders streams inside the capture; await what graph.launch() returns`,
        { code: "invalidArgument", op: this.#op },
      );
    }
    const id = this.#id || device.nextId();
    if (this.#id === 0) {
      try {
        eventStruct.pack({ done_id: id });
        device.call("deepep_event_notify", this.address, eventStruct, "event");
      } catch (error) {
        device.forget(id);
        throw error;
      }
    }
    const status = await device.completed(id);
    if (status !== 0) throw device.failure(native, id, this.#op, status);
  }
}
