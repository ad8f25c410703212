/**
 * The inside of a buffer: the native object, its streams, events and slots. In: a connected native buffer from
 * connect.ts. Out: what dispatch.ts, combine.ts and low_latency.ts need to pack one struct and make one call. Not
 * exported to users; buffer.ts is.
 */
import { constants, type StructName } from "./ffi/abi.ts";
import { struct, type StructCodec, type StructInput } from "./ffi/struct.ts";
import type { CallName, Capabilities, Device } from "./device.ts";
import type { DType } from "./dtype.ts";
import { EpError, nativeCode } from "./error.ts";
import type { Captured } from "./graph.ts";
import { Routings, type SharedRouting } from "./handle.ts";
import { allocTensor, copy, free, readTensor, writeTensor } from "./memory.ts";
import type { ResolvedOptions } from "./plan.ts";
import { EpEvent, type EventOwner, Stream, streamAddress } from "./stream.ts";
import type { Hold, Tensor, TensorOwner } from "./tensor.ts";

const streamStruct = struct("deepep_stream_create_args");
const eventCreateStruct = struct("deepep_event_create_args");
const eventStruct = struct("deepep_event_args");
const releaseStruct = struct("deepep_slot_release_args");
const outputStruct = struct("deepep_expert_output_args");
const refuseStruct = struct("deepep_refuse_args");
const barrierStruct = struct("deepep_barrier_args");
const infoStruct: StructCodec<"deepep_buffer_info"> = struct("deepep_buffer_info");
const statsStruct: StructCodec<"deepep_buffer_stats"> = struct("deepep_buffer_stats");

const MOST_IDLE_EVENTS = 64;

/** Options that every operation takes. */
export interface OperationOptions {
  /** The caller's stream: the operation begins after what is enqueued there. Default: the buffer's own stream. */
  stream?: Stream;
  /** Begin after this event instead of `stream`'s present work. */
  previousEvent?: EpEvent;
  /** Do not make `stream` wait for the operation; order it with the returned event. Default false. */
  asyncFinish?: boolean;
  /** Multiprocessors to use; 0 or absent = the plan's choice. Ignored by the cpu backend. */
  numSms?: number;
  /** Deadline of each wait in the operation, milliseconds. Default: the buffer's. */
  timeoutMs?: number;
}

/** The values of the fields that every operation's struct ends with. */
export interface StreamFields {
  stream: bigint;
  previous_event: bigint;
  event: bigint;
  done_id: number;
  flags: number;
  timeout_ms: number;
  num_sms: number;
}

/** An operation that is about to be enqueued: its name, the fields that its struct ends with, and the event of its end. */
export interface Operation {
  readonly op: string;
  readonly fields: StreamFields;
  readonly event: EpEvent;
}

/** Who holds a slot. */
interface Holder {
  readonly op: string;
  /** The number of its call. */
  readonly call: number;
  readonly hold: Hold;
}

/** A connected native buffer with everything that belongs to it. */
export class Core implements EventOwner, TensorOwner {
  readonly device: Device;
  readonly deviceIndex: number;
  readonly native: bigint;
  readonly options: ResolvedOptions;
  readonly rank: number;
  readonly numRanks: number;
  readonly numLocalExperts: number;
  readonly firstLocalExpert: number;
  readonly label: string;
  readonly stream: Stream;
  readonly commStream: Stream;
  /** Native events at rest, for points of streams to come; those of operations are made as such. */
  readonly #idleEvents: bigint[] = [];
  readonly routings: Routings = new Routings(this);
  /** How often who takes part has been changed here. NaN, which equals no number: the device may change it by itself. */
  maskings = 0;
  /** Graphs that were not released. */
  readonly graphs: Set<Disposable> = new Set();
  /** The capture that is open, if one is: then operations are recorded instead of run. */
  captured: Captured | undefined;
  /** What the device can do. */
  readonly capabilities: Capabilities;
  readonly #outputs = new Map<number, bigint>();
  readonly #holders = new Map<number, Holder>();
  readonly #pending = new Map<number, Promise<unknown>>();
  readonly #streams = new Set<Stream>();
  #closing: Promise<void> | undefined;
  #numCalls = 0;
  /** The latest operation that was enqueued, which ends after all others, and the stream that waits for it, if one does. */
  #latest: { readonly event: EpEvent; readonly waits: bigint | undefined } | undefined;
  /** Where memory is freed that operations may still use. */
  #reclaim: Stream | undefined;

  constructor(device: Device, native: bigint, options: ResolvedOptions, deviceIndex = 0) {
    this.device = device;
    this.deviceIndex = deviceIndex;
    this.capabilities = device.capabilities(deviceIndex);
    this.native = native;
    this.options = options;
    const info = this.info();
    this.rank = info.rank;
    this.numRanks = info.num_ranks;
    this.numLocalExperts = info.num_local_experts;
    this.firstLocalExpert = info.first_local_expert;
    this.label = `the buffer of rank ${this.rank}`;
    this.commStream = new Stream(info.comm_stream);
    this.stream = this.createStream();
  }

  /** Facts, as the library has them now. */
  info(): ReturnType<typeof infoStruct.read> {
    this.open("look at the buffer");
    infoStruct.pack({});
    this.call("deepep_buffer_get_info", infoStruct, "info");
    return infoStruct.read();
  }

  /** Counters, see {@linkcode EpBuffer.stats}. */
  stats(): ReturnType<typeof statsStruct.read> {
    this.open("look at the buffer");
    statsStruct.pack({});
    this.call("deepep_buffer_get_stats", statsStruct, "stats");
    return statsStruct.read();
  }

  /** One call on this buffer. */
  call(name: CallName, args: StructCodec<StructName>, op: string): void {
    this.device.call(name, this.native, args, op);
  }

  /**
   * Packs `values` with the operation's fields and makes the one call that enqueues it. A refused operation completes
   * nothing, so its id is given up.
   */
  launch<N extends StructName>(
    name: CallName,
    args: StructCodec<N>,
    values: readonly StructInput<N>[],
    { op, fields, event }: Operation,
  ): void {
    try {
      args.pack(...values, fields as unknown as StructInput<N>);
      this.call(name, args as unknown as StructCodec, op);
    } catch (error) {
      this.device.forget(fields.done_id);
      throw error;
    }
    if (this.captured) return;
    this.#latest = {
      event,
      waits: fields.flags & constants.FLAG.ASYNC_FINISH[0] ? undefined : fields.stream,
    };
  }

  /**
   * Makes a collective call. When this rank refuses it, the peers are told: the call counts as made and fails on every
   * rank, instead of leaving the others waiting and the ranks one call apart. A call that is captured is not made yet.
   */
  collective<T>(op: keyof typeof constants.OP, launch: () => T): T {
    try {
      return launch();
    } catch (error) {
      this.#refuse(op, error);
      throw error;
    }
  }

  #refuse(op: keyof typeof constants.OP, error: unknown): void {
    if (this.#closing || this.captured) return;
    refuseStruct.pack({ op: constants.OP[op][0], code: nativeCode(error) });
    try {
      this.call("deepep_refuse", refuseStruct, "refuse");
    } catch {
      // Only a buffer that has failed refuses this too, and of that the others have heard.
    }
  }

  /** Throws when the buffer is closed. `doing` is what was asked, as in `dispatch`. */
  open(doing: string): void {
    if (this.#closing) {
      throw new EpError(`Cannot ${doing}: ${this.label} is closed`, { code: "closed", op: doing, rank: this.rank });
    }
  }

  // --- streams and events

  createStream(): Stream {
    this.open("create a stream");
    streamStruct.pack({});
    this.call("deepep_stream_create", streamStruct, "stream");
    const stream = new Stream(streamStruct.get("stream"));
    this.#streams.add(stream);
    return stream;
  }

  /** Ends a stream after its work, without blocking the event loop for it. */
  async destroyStream(stream: Stream): Promise<void> {
    if (stream === this.stream) throw new RangeError("Cannot destroy a stream: it is the buffer's own");
    if (!this.#streams.delete(stream)) return;
    await this.record(stream);
    if (!this.#closing) this.device.end("deepep_stream_destroy", stream.address, "stream");
  }

  /** A native event, used before or new. */
  #event(): bigint {
    return this.#idleEvents.pop() ?? this.endOf(0);
  }

  giveEvent(native: bigint): void {
    if (this.closed) return; // it has gone with the buffer, or will
    if (this.#idleEvents.length < MOST_IDLE_EVENTS) this.#idleEvents.push(native);
    else this.device.end("deepep_event_destroy", native, "event");
  }

  /** A new native event: of the end of the operation with this completion id, or, for 0, of nothing yet. */
  endOf(id: number): bigint {
    eventCreateStruct.pack({ done_id: id });
    this.call("deepep_event_create", eventCreateStruct, "event");
    return eventCreateStruct.get("event");
  }

  /** Records the present work of `stream`. */
  record(stream: Stream = this.stream): EpEvent {
    this.open("record an event");
    return this.#mark(stream);
  }

  #mark(stream: Stream): EpEvent {
    const address = streamAddress("record an event", stream), native = this.#event();
    eventStruct.pack({ stream: address });
    this.device.call("deepep_event_record", native, eventStruct, "event");
    return new EpEvent(this, "event", 0, native);
  }

  /** Fields and event for an operation `op` that is about to be enqueued. */
  operation(op: string, options: OperationOptions, flags: number): Operation {
    this.open(op);
    const { timeoutMs = 0, numSms = 0, previousEvent } = options;
    const { captured } = this;
    const stream = streamAddress(op, options.stream ?? captured?.stream ?? this.stream);
    if (!(Number.isSafeInteger(timeoutMs) && timeoutMs >= 0 && timeoutMs <= 86_400_000)) {
      throw new RangeError(`Cannot ${op}: timeoutMs is ${timeoutMs}, needs 0 to 86400000`);
    }
    if (!(Number.isSafeInteger(numSms) && numSms >= 0 && numSms <= 65_535)) {
      throw new RangeError(`Cannot ${op}: numSms is ${numSms}, needs 0 to 65535`);
    }
    if (previousEvent !== undefined && !(previousEvent instanceof EpEvent)) {
      throw new TypeError(`Cannot ${op}: previousEvent is no event`);
    }
    if (!captured) this.device.sweep();
    const previous_event = previousEvent?.address ?? 0n;
    // A captured operation has no id by which its end could be found later.
    const native = captured ? this.#event() : 0n, id = captured ? 0 : this.device.nextId();
    this.#numCalls++;
    return {
      op,
      event: new EpEvent(this, op, captured ? "captured" : id, native),
      fields: {
        stream,
        previous_event,
        event: native,
        done_id: id,
        flags: flags | (options.asyncFinish ? constants.FLAG.ASYNC_FINISH[0] : 0),
        timeout_ms: timeoutMs,
        num_sms: numSms,
      },
    };
  }

  /** The status of a completion, once it has come; {@linkcode close} waits for it too. Give it to {@linkcode check}. */
  status(id: number): Promise<number> {
    const done = this.device.completed(id);
    this.#pending.set(id, done);
    return done;
  }

  /** Throws the failure of the operation whose completion came with `status`. */
  check(status: number, id: number, op: string): void {
    this.#pending.delete(id);
    if (status !== 0) throw this.device.failure(this.native, id, op, status);
  }

  /** Enqueues a barrier of all unmasked ranks. */
  barrier(options: OperationOptions): EpEvent {
    return this.collective("BARRIER", () => {
      const operation = this.operation("barrier", options, 0);
      this.launch("deepep_barrier", barrierStruct, [], operation);
      return operation.event;
    });
  }

  // --- captures: graph.ts makes them

  /** Enqueues a replay of a graph. */
  launchGraph(graph: bigint, stream: Stream, args: StructCodec<"deepep_graph_args">): EpEvent {
    const address = streamAddress("launch a graph", stream);
    this.needsNoCapture("launch a graph");
    this.device.sweep();
    const native = this.#event(), id = this.device.nextId();
    try {
      args.pack({ stream: address, done_id: id, event: native });
      this.device.call("deepep_graph_launch", graph, args, "graph");
    } catch (error) {
      this.device.forget(id);
      this.giveEvent(native);
      throw error;
    }
    const event = new EpEvent(this, "graph", id, native);
    this.#latest = { event, waits: address };
    return event;
  }

  /** Throws while a capture is open: `doing` needs the host, or would not be part of a replay. */
  needsNoCapture(doing: string): void {
    if (!this.captured) return;
    throw new EpError(`Cannot ${doing} in a capture: do it before or after`, {
      code: "invalidArgument",
      op: "graph",
      rank: this.rank,
    });
  }

  /** Notes memory that an operation uses, for the graph that is being captured, if one is. */
  uses(hold: Hold): void {
    this.captured?.used.add(hold);
  }
  /** Notes which operation writes some memory, so that who reads it hears of its failure. */
  writes(hold: Hold | undefined, event: EpEvent): void {
    if (!hold) return;
    hold.producer = event;
    this.captured?.used.add(hold);
    this.captured?.written.add(hold);
  }
  /** Keeps a native handle for the graph that is being captured, if one is. */
  keeps(routing: SharedRouting): void {
    if (!this.captured || this.captured.routings.has(routing)) return;
    this.captured.routings.add(routing);
    routing.users++;
  }

  // --- slots

  /** Throws when every slot is held, naming the holders; -1 lets the library choose. */
  wantSlot(op: string): number {
    if (this.#holders.size >= this.options.numSlots) {
      const who = [...this.#holders.values()].map(({ op, call }) => `${op} #${call}`).join(" and ");
      throw new EpError(
        `Cannot ${op}: all ${this.options.numSlots} slots are held by ${who}; release a result, or create the buffer with a larger numSlots`,
        { code: "noFreeSlot", op, rank: this.rank, expected: this.options.numSlots, seen: this.#holders.size },
      );
    }
    if (!this.captured) return -1;
    // A graph fills the same slot at every replay, so a captured call names it.
    for (let slot = 0; slot < this.options.numSlots; slot++) {
      if (this.captured.freeSlots >> slot & 1 && !this.#holders.has(slot)) return slot;
    }
    throw new EpError(`Cannot ${op}: no slot was free when the capture began`, {
      code: "noFreeSlot",
      op,
      rank: this.rank,
    });
  }

  /** Notes who holds a slot that the library has just taken. */
  holdSlot(slot: number, op: string): Hold {
    const hold: Hold = { owner: this, alive: true };
    this.captured?.slots.set(slot, "held");
    this.#holders.set(slot, { op, call: this.#numCalls, hold });
    return hold;
  }

  /** Gives a slot back in the order of `stream`: one that an open capture has taken to the capture's later calls. Idempotent. */
  releaseSlot(slot: number, hold: Hold, stream: Stream = this.captured?.stream ?? this.stream): void {
    if (!hold.alive) return;
    this.#giveSlot(slot, stream);
    hold.alive = false;
    hold.released = "result.release()";
    this.#holders.delete(slot);
    if (this.captured?.slots.has(slot)) {
      this.captured.slots.set(slot, "released");
      this.captured.used.delete(hold); // the graph keeps the slot, whatever became of this result
      this.captured.written.delete(hold);
    }
  }

  /** Slots that were given back in a capture: its graph holds them, or nobody when there is none. */
  keepSlots(slots: readonly number[], hold: Hold | undefined): void {
    for (const slot of slots) {
      if (hold) this.#holders.set(slot, { op: "graph", call: this.#numCalls, hold });
      else this.#giveSlot(slot, this.stream);
    }
  }
  /** Gives back what a graph held. */
  dropSlots(slots: readonly number[], stream: Stream): void {
    for (const slot of slots) {
      this.#holders.delete(slot);
      this.#giveSlot(slot, stream);
    }
  }

  #giveSlot(slot: number, stream: Stream): void {
    if (this.#closing) return;
    releaseStruct.pack({ slot, stream: stream.address });
    this.call("deepep_slot_release", releaseStruct, "release");
  }

  /** The expert-output region of a held slot, for writing in the order of `stream`. */
  expertOutput(slot: number, options: OperationOptions): bigint {
    const latest = this.#latest;
    this.launch("deepep_expert_output", outputStruct, [{ slot }], this.operation("expertOutput", options, 0));
    this.#latest = latest; // a wait of the caller's stream, which uses no tensor
    const address = outputStruct.get("address");
    this.#outputs.set(slot, address);
    return address;
  }

  /** The address of a slot's expert-output region, once it was asked for. */
  outputAddress(slot: number): bigint | undefined {
    return this.#outputs.get(slot);
  }

  // --- memory: memory.ts does it

  /** A new tensor of this buffer's device. */
  alloc<D extends DType>(dtype: D, shape: readonly number[], producer?: EpEvent): Tensor<D> {
    const tensor = allocTensor(this, dtype, shape);
    if (producer) this.writes(tensor.hold, producer);
    return tensor;
  }
  freeTensor(address: bigint, stream: Stream = this.stream): void {
    if (!this.#closing) free(this, address, "DEVICE", this.#afterOperations(stream)); // else it went with the buffer
  }
  /** Enqueues a copy between addresses. */
  copy(dst: bigint, src: bigint, bytes: number, stream: Stream = this.stream): void {
    copy(this, dst, src, bytes, stream);
  }
  readTensor(tensor: Tensor, stream: Stream = this.stream): Promise<ArrayBuffer> {
    return readTensor(this, tensor, stream);
  }
  writeTensor(tensor: Tensor, data: ArrayBufferView, stream: Stream = this.stream): void {
    writeTensor(this, tensor, data, stream);
  }

  /**
   * A stream that comes after `stream`'s present work and after every operation so far. Mostly `stream` itself, which
   * waits for operations; but with `asyncFinish`, or when the operation waited on another stream, it does not, and
   * memory that a pending operation reads or writes must not be handed out again (DeepEP keeps such tensors in the event).
   */
  #afterOperations(stream: Stream): Stream {
    const address = streamAddress("free a tensor", stream);
    if (this.#latest?.event.done) this.#latest = undefined;
    if (!this.#latest || this.#latest.waits === address) return stream;
    if (this.captured?.stream.address === address) return stream; // what a graph uses is not handed out again
    this.#reclaim ??= this.createStream();
    this.#mark(stream).wait(this.#reclaim);
    this.#latest.event.wait(this.#reclaim);
    return this.#reclaim;
  }

  // --- the end

  /** Frees the native buffer once nothing awaits it. Local: never waits for a peer. */
  close(): Promise<void> {
    return this.#closing ??= this.#close();
  }

  get closed(): boolean {
    return this.#closing !== undefined;
  }

  async #close(): Promise<void> {
    // The native destroy blocks until the streams are at rest. They may wait for ranks that this very thread drives, so
    // the waiting is done here, where the event loop goes on.
    const rest = [this.commStream, ...this.#streams].map((stream) => this.#mark(stream));
    for (const { hold } of this.#holders.values()) {
      hold.alive = false;
      hold.released = "closing the buffer";
    }
    this.#holders.clear();
    await Promise.allSettled(rest);
    while (this.#pending.size > 0) await Promise.allSettled([...this.#pending.values()]);
    for (const graph of this.graphs) graph[Symbol.dispose]();
    this.routings.clear();
    this.#idleEvents.length = 0;
    this.device.end("deepep_buffer_destroy", this.native, "close");
  }
}
