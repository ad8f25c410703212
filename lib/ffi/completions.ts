/**
 * Turns native completions into promises.
 *
 * In: a native queue, and ids that calls are given. Out: a promise of a status for each id that is waited for. The queue
 * is polled on every turn of the event loop while work is fresh, since an empty drain costs some ten nanoseconds and any
 * other wake-up tens of microseconds; after `spinMs` it is polled by timer, or, if the source can, native code calls
 * back. Nothing runs while nothing is waited for, so the process ends when it has nothing else to do. One per realm.
 */

import { setImmediate } from "node:timers";
import { fromNative, LibraryError } from "../error.ts";
import { constants } from "./abi.ts";
import { runtime } from "./open.ts";
import { struct } from "./struct.ts";
import type { Library, NativeCallback } from "./types.ts";

/** A queue of `deepep_completion` entries. */
export interface CompletionSource {
  /** Writes up to `capacity` entries into `out`; answers how many. */
  drain(out: Uint8Array, capacity: number): number;
  /**
   * `deepep_queue_wake`. With it a long wait ends by a call from a native thread instead of by timer; Deno then needs
   * `--allow-ffi` without a path.
   */
  wake?: ((action: number, callback: bigint) => void) | undefined;
}

/** Options of {@linkcode Completions}. */
export interface CompletionOptions {
  /**
   * How long to poll on every turn after the latest news, milliseconds. Polling keeps a core busy: on the cpu backend,
   * whose kernels need the cores, make it short. Default 1.
   */
  spinMs?: number;
  /** Pause between polls after that, milliseconds. Default 1. */
  idleMs?: number;
}

const CAPACITY = 64;
const ENTRY_BYTES = 16; // deepep_completion: id u64, status i32, reserved u32
const MAX_FAILURES = 65_536;
const LEAST_SWEPT = 32;
const FOREVER_MS = 0x3fff_ffff;
const OK = constants.ERROR.OK[0];
const CLOSED = constants.ERROR.CLOSED[0];

/** The wake-up of a library's queue, for {@linkcode CompletionSource}. */
export function wakeOf({ symbols }: Library, queue: bigint): (action: number, callback: bigint) => void {
  const args = struct("deepep_queue_wake_args");
  const error = struct("deepep_error");
  return (action, callback) => {
    args.pack({ action, callback });
    if (symbols.deepep_queue_wake(queue, args.bytes, error.reset()) !== OK) throw fromNative(error.read(), "wakeQueue");
  };
}

/** Who waits for what. */
export class Completions implements AsyncDisposable {
  readonly #source: CompletionSource;
  readonly #spinMs: number;
  readonly #idleMs: number;
  readonly #out: Uint8Array<ArrayBuffer> = new Uint8Array(new ArrayBuffer(CAPACITY * ENTRY_BYTES));
  readonly #view: DataView = new DataView(this.#out.buffer);
  /** Ids handed out whose completion has not come. */
  readonly #inFlight = new Set<number>();
  readonly #waiting = new Map<number, PromiseWithResolvers<number>>();
  /** Statuses other than OK, for those who wait later. */
  readonly #failures = new Map<number, number>();
  #lastId = 0;
  #sweepAt = LEAST_SWEPT;
  #scheduled = false;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #closed = false;
  #freshAt = 0;
  readonly #notifier: Notifier | undefined;

  /** Reads `source`, which this object does not own. */
  constructor(source: CompletionSource, options: CompletionOptions = {}) {
    this.#source = source;
    this.#spinMs = options.spinMs ?? 1;
    this.#idleMs = options.idleMs ?? 1;
    // Now, where its failure can be caught, and not when something is first waited for.
    if (source.wake) this.#notifier = new Notifier(source.wake, () => this.#soon());
  }

  /** Ids whose completion has not come. */
  get numInFlight(): number {
    return this.#inFlight.size;
  }

  /**
   * A fresh id for `done_id` or `counts_id`, from 1. If the call that was to have it fails, {@linkcode forget} it. A number,
   * since sets and maps of bigints are slow; at a million a second they last for 285 years.
   */
  nextId(): number {
    this.#inFlight.add(++this.#lastId);
    return this.#lastId;
  }

  /**
   * The status that `id` completes with: `DEEPEP_OK` or a `DEEPEP_ERROR_*` code; CLOSED when the queue or the id is given
   * up before. May be called at any time after `nextId`, more than once, or never. Never rejects.
   *
   * @throws {RangeError} if `id` did not come from `nextId`, since it would never complete
   */
  wait(id: number): Promise<number> {
    if (!(id > 0 && id <= this.#lastId)) {
      throw new RangeError(`Cannot wait for completion ${id}: it was never handed out`);
    }
    if (!this.#inFlight.has(id)) return Promise.resolve(this.#failures.get(id) ?? OK);
    if (this.#closed) return Promise.resolve(CLOSED);
    const waiting = this.#waiting.get(id) ?? Promise.withResolvers<number>();
    this.#waiting.set(id, waiting);
    this.#freshAt = performance.now();
    this.#soon();
    return waiting.promise;
  }

  /** Whether an id has completed, as far as the queue was read. */
  has(id: number): boolean {
    return !this.#inFlight.has(id);
  }

  /** The status of an id that has completed, as far as the queue was read; OK when it has not. Does not wait. */
  statusOf(id: number): number {
    return this.#failures.get(id) ?? OK;
  }

  /** Drops an id whose call failed, and tells who waits for it CLOSED. */
  forget(id: number): void {
    this.#finish(id, CLOSED);
    this.#failures.delete(id);
  }

  /**
   * {@linkcode poll}, once twice as many ids are in flight as the last reading left: so that the queue of a program that never
   * waits stays bounded, at next to no cost for each call.
   */
  sweep(): void {
    if (this.#inFlight.size >= this.#sweepAt) this.poll();
  }

  /** Takes what has completed off the queue. */
  poll(): void {
    if (this.#closed) return;
    let taken = CAPACITY;
    while (taken === CAPACITY) {
      taken = this.#source.drain(this.#out, CAPACITY);
      for (let i = 0; i < taken; i++) {
        const at = i * ENTRY_BYTES;
        const id = this.#view.getUint32(at, true) + this.#view.getUint32(at + 4, true) * 0x1_0000_0000;
        this.#finish(id, this.#view.getInt32(at + 8, true));
      }
      if (taken > 0) this.#freshAt = performance.now();
    }
    this.#sweepAt = Math.max(LEAST_SWEPT, 2 * this.#inFlight.size);
    if (taken < 0) this.#giveUp(-taken); // the queue is gone
  }

  /** Stops polling and the notifier, before the queue is destroyed. Who still waits is told CLOSED. */
  async [Symbol.asyncDispose](): Promise<void> {
    if (this.#closed) return;
    this.poll();
    this.#giveUp(CLOSED);
    await this.#notifier?.stop();
  }

  #giveUp(status: number): void {
    this.#closed = true;
    clearTimeout(this.#timer);
    for (const { resolve } of this.#waiting.values()) resolve(status);
    this.#waiting.clear();
  }

  /** Polls on the next turn. */
  #soon(): void {
    if (this.#scheduled) return;
    this.#scheduled = true;
    clearTimeout(this.#timer);
    setImmediate(this.#tick);
  }

  readonly #tick = (): void => {
    this.#scheduled = false;
    this.poll();
    if (this.#waiting.size === 0) {
      this.#notifier?.rest();
    } else if (performance.now() - this.#freshAt < this.#spinMs) {
      this.#soon();
    } else if (this.#notifier) {
      this.#notifier.arm();
    } else {
      this.#timer = setTimeout(this.#tick, this.#idleMs);
    }
  };

  #finish(id: number, status: number): void {
    this.#inFlight.delete(id);
    if (status !== OK) {
      this.#failures.set(id, status);
      if (this.#failures.size > MAX_FAILURES) this.#failures.delete(this.#failures.keys().next().value!);
    }
    const waiting = this.#waiting.get(id);
    this.#waiting.delete(id);
    waiting?.resolve(status);
  }
}

/** The native thread that calls back: once for each time it is armed, at once when the queue is not empty. */
class Notifier {
  readonly #wake: (action: number, callback: bigint) => void;
  readonly #callback: NativeCallback;
  readonly #stopped: PromiseWithResolvers<void> = Promise.withResolvers<void>();
  /** No runtime is kept alive by a callback, so a timer does it while one is awaited. */
  #hold: ReturnType<typeof setTimeout> | undefined;

  constructor(wake: (action: number, callback: bigint) => void, woken: () => void) {
    if (!runtime) throw new LibraryError("Cannot make a callback: this runtime has no FFI that is known");
    this.#wake = wake;
    try {
      this.#callback = runtime.callback((kind) => {
        // Nothing more is done here: the native frame is still on the stack.
        this.rest();
        if (kind === 0) woken();
        else this.#stopped.resolve();
      });
    } catch (cause) {
      throw new LibraryError(
        `Cannot make a callback, which Deno needs --allow-ffi without a path for; wake: "poll" does without: ${
          (cause as Error).message
        }`,
        { cause },
      );
    }
    wake(constants.WAKE.START[0], this.#callback.address);
  }

  arm(): void {
    this.#hold ??= setTimeout(() => {}, FOREVER_MS);
    this.#wake(constants.WAKE.ARM[0], 0n);
  }

  /** Lets the process end, though the callback may still come. */
  rest(): void {
    clearTimeout(this.#hold);
    this.#hold = undefined;
  }

  /** Stop, last call, next macrotask, join, close: a callback closed inside itself or under its thread is a crash. */
  async stop(): Promise<void> {
    const hold = setTimeout(() => {}, FOREVER_MS); // its own: a late call with kind 0 clears the other
    this.#wake(constants.WAKE.STOP[0], 0n);
    await this.#stopped.promise;
    clearTimeout(hold);
    await new Promise((resolve) => setTimeout(resolve, 0));
    this.#wake(constants.WAKE.JOIN[0], 0n);
    this.#callback.close();
  }
}
