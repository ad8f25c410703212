/**
 * Handles and results: what a dispatch leaves behind. A result holds a slot with the received rows; its handle keeps
 * where every token went, for combine and for cached dispatch. In: a Core and what the native call wrote. Called by
 * dispatch.ts and low_latency.ts; users release them.
 */
import type { Core, OperationOptions } from "./core.ts";
import { EpError } from "./error.ts";
import { struct } from "./ffi/struct.ts";
import type { EpEvent, Stream } from "./stream.ts";
import { type Hold, Tensor } from "./tensor.ts";

const handleStruct = struct("deepep_handle_create_args");

/** How received rows are ordered: `"rank"`: a token once per rank; `"expert"`: a row per (token, local expert). */
export type RowLayout = "rank" | "expert";

/** A slot that a result holds. Shared by the result, its tensors and its handle. */
export interface HeldSlot {
  readonly index: number;
  readonly hold: Hold;
}

/** Options of `release()`. */
export interface ReleaseOptions {
  /** The memory is used again only after what is enqueued here now. Default: the buffer's own stream. */
  stream?: Stream;
}

/** Counts of a dispatch, on the host. */
export interface RecvCounts {
  /** Tokens received, each counted once. */
  readonly numTokens: number;
  /** Rows of the layout in use, alignment padding included. */
  readonly numRows: number;
  /** Entries of each local expert, rounded up to `expertAlignment`. Empty with `cpuSync: false`. */
  readonly numTokensPerExpert: readonly number[];
  /** Tokens from each source rank. Empty with `cpuSync: false`. */
  readonly numTokensPerRank: readonly number[];
}

/** A native handle, shared by the handles of a dispatch and of the cached dispatches that repeat it. */
export interface SharedRouting {
  readonly native: bigint;
  /** How many tokens it has room for. */
  readonly room: number;
  /** Handles, graphs, and calls whose result is still awaited. */
  users: number;
}

/**
 * The native handles of a buffer. Those that nobody uses any more are filled anew: what is enqueued with them comes before
 * what will be, and two calls less are microseconds of every dispatch.
 */
export class Routings {
  readonly #core: Core;
  /** All that there are, whoever uses them. */
  readonly #all = new Set<SharedRouting>();
  /** At rest, the latest last. */
  readonly #idle: SharedRouting[] = [];
  constructor(core: Core) {
    this.#core = core;
  }

  /** Makes as many as there are slots, with room for every dispatch: more are made when users keep handles. */
  prepare(): void {
    const { maxTokensPerRank, numSlots } = this.#core.options;
    for (let i = 0; i < numSlots; i++) this.#idle.push(this.#make(maxTokensPerRank));
  }

  /** A handle for so many tokens, the smallest at rest that has the room. It has no users yet. */
  take(numTokens: number): SharedRouting {
    const best = this.#idle.reduce<SharedRouting | undefined>(
      (best, one) => one.room >= numTokens && one.room < (best?.room ?? Infinity) ? one : best,
      undefined,
    );
    if (best) return this.#idle.splice(this.#idle.indexOf(best), 1)[0]!;
    // A power of two, so that it does for the next dispatch too.
    return this.#make(Math.min(this.#core.options.maxTokensPerRank, 2 ** Math.ceil(Math.log2(Math.max(1, numTokens)))));
  }

  #make(room: number): SharedRouting {
    handleStruct.pack({ num_tokens: room, num_topk: this.#core.options.numTopk });
    this.#core.call("deepep_handle_create", handleStruct, "dispatch");
    const made: SharedRouting = { native: handleStruct.get("handle"), room, users: 0 };
    this.#all.add(made);
    return made;
  }

  /** One user less; after the last one the handle is at rest. Of more than there are slots the smallest is freed. */
  drop(routing: SharedRouting): void {
    if (--routing.users > 0 || this.#core.closed) return;
    this.#idle.push(routing);
    if (this.#idle.length <= this.#core.options.numSlots) return;
    const smallest = this.#idle.reduce((least, one) => one.room < least.room ? one : least);
    this.#free(this.#idle.splice(this.#idle.indexOf(smallest), 1)[0]!);
  }

  /** Frees all, when nobody can use them any more. */
  clear(): void {
    this.#idle.length = 0;
    for (const routing of this.#all) this.#free(routing);
  }

  #free(routing: SharedRouting): void {
    this.#all.delete(routing);
    this.#core.device.end("deepep_handle_destroy", routing.native, "release");
  }
}

/** What a handle knows of its dispatch. */
export type HandleFacts = Pick<
  DispatchHandle,
  "layout" | "numTokens" | "numTopk" | "expertAlignment" | "counts" | "topkIdxDtype" | "maskings"
>;

/**
 * Where every token of a dispatch went. It belongs to its result and ends with it, unless {@linkcode keep} was called:
 * then it lives until its own `release()`, and drives cached dispatch and combine any number of times.
 */
export class DispatchHandle implements Disposable {
  /** The row layout of the dispatch. */
  readonly layout: RowLayout;
  /** Tokens this rank dispatched. */
  readonly numTokens: number;
  /** Entries a token in `topkIdx`, 0 without. */
  readonly numTopk: number;
  /** Alignment of the per-expert counts, and of expert groups. */
  readonly expertAlignment: number;
  /** Counts of what this rank receives, when the host knows them. */
  readonly counts: RecvCounts | undefined;
  /** @ignore The element type of topkIdx. */
  readonly topkIdxDtype: "i32" | "i64" | undefined;
  /** @ignore `Core.maskings` at the dispatch. */
  readonly maskings: number;
  readonly #core: Core;
  readonly #slot: HeldSlot;
  readonly #routing: SharedRouting;
  #released = false;
  #kept = false;

  /** @ignore */
  constructor(core: Core, routing: SharedRouting, slot: HeldSlot, facts: HandleFacts) {
    this.#core = core;
    this.#routing = routing;
    this.#slot = slot;
    this.layout = facts.layout;
    this.numTokens = facts.numTokens;
    this.numTopk = facts.numTopk;
    this.expertAlignment = facts.expertAlignment;
    this.counts = facts.counts;
    this.topkIdxDtype = facts.topkIdxDtype;
    this.maskings = facts.maskings;
    routing.users++;
    core.keeps(routing);
  }

  /** Keeps the handle after its result is released; release it yourself then. Returns it. */
  keep(): this {
    this.use(this.#core, "keep a handle");
    this.#kept = true;
    return this;
  }

  /** @ignore The routing, checked to belong to `core` and to be alive. */
  use(core: Core, op: string): SharedRouting {
    if (core !== this.#core) {
      throw new TypeError(`Cannot ${op}: the handle belongs to ${this.#core.label}, not to ${core.label}`);
    }
    if (this.#released) {
      throw new EpError(`Cannot ${op}: the handle was released; call handle.keep() to use it after its result`, {
        code: "closed",
        op,
      });
    }
    core.keeps(this.#routing);
    return this.#routing;
  }

  /** @ignore The slot of the result while it is held, else -1. */
  get slotIndex(): number {
    return this.#slot.hold.alive ? this.#slot.index : -1;
  }

  /**
   * The slot's expert-output region, bf16 `[maxRecvTokens, hidden]`: write expert outputs here and pass the tensor to
   * `combine`, which then copies nothing. Writes belong in `stream` order: it is made to wait, without using an SM,
   * until every peer has read what the region held before.
   *
   * @throws {EpError} `closed` when the result was released
   */
  expertOutput(options: OperationOptions = {}): Tensor<"bf16"> {
    if (!this.#slot.hold.alive) {
      throw new EpError("Cannot take the expert-output region: the result was released", {
        code: "closed",
        op: "expertOutput",
      });
    }
    const address = this.#core.expertOutput(this.#slot.index, options);
    const { maxRecvTokens, hidden } = this.#core.options;
    return new Tensor(address, "bf16", [maxRecvTokens, hidden], { hold: this.#slot.hold });
  }

  /** @ignore Ends with the result unless kept. */
  releaseWithResult(): void {
    if (!this.#kept) this.release();
  }

  /** Frees the handle. Operations already enqueued keep what they need. */
  release(): void {
    if (this.#released) return;
    this.#released = true;
    this.#core.routings.drop(this.#routing);
  }
  /** {@linkcode release}. */
  [Symbol.dispose](): void {
    this.release();
  }
}

/** Something received into a slot. Release it when its tensors have been read: `using`, or `release()`. */
export abstract class SlotResult implements Disposable {
  #event: EpEvent;
  /** @ignore */
  protected readonly core: Core;
  /** @ignore */
  protected readonly slot: HeldSlot;

  /** @ignore */
  constructor(core: Core, slot: HeldSlot, event: EpEvent) {
    this.core = core;
    this.slot = slot;
    this.#event = event;
  }

  /** Marks the end of the operation; with `recvHook` of its sending half until `hook()` was called. */
  get event(): EpEvent {
    return this.#event;
  }
  /** @ignore The receiving half was enqueued. */
  protected arrives(event: EpEvent): void {
    this.#event = event;
    this.core.writes(this.slot.hold, event);
  }

  /** Whether the slot was given back. */
  get released(): boolean {
    return !this.slot.hold.alive;
  }

  /** Gives the slot back: the next dispatch may write there after what `stream` has enqueued now. */
  release(options: ReleaseOptions = {}): void {
    this.core.releaseSlot(this.slot.index, this.slot.hold, options.stream);
  }
  /** {@linkcode release}. */
  [Symbol.dispose](): void {
    this.release();
  }
}
