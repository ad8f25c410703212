/**
 * All ranks of a bench in this process: their buffers, and the gate that holds them back.
 *
 * In: options of the buffers. Out: a chain of calls can be enqueued behind a shut gate and then runs without the host, so
 * that its time is the device's alone. The gate is a barrier with an injected delay on rank 0; where a backend has no
 * injection, chains begin when the host begins. Called by timing.ts and the ops.
 */
import process from "node:process";
import { setTimeout as sleep } from "node:timers/promises";
import { type BufferOptions, EpBuffer, type EpEvent, Group, type Stream, Tensor } from "../../mod.ts";
import { constants } from "../../lib/ffi/abi.ts";
import { struct } from "../../lib/ffi/struct.ts";
import type { DType } from "../../lib/dtype.ts";
import type { BenchOptions } from "./options.ts";

const injectStruct = struct("deepep_inject_args");

/** Microseconds of a monotonic clock. */
export function nowUs(): number {
  return Number(process.hrtime.bigint()) / 1000;
}

/** A stream that a chain runs on, with a buffer of its device. */
export interface Lane {
  readonly buffer: EpBuffer;
  readonly stream: Stream;
}

/** The ranks. */
export class Ranks implements AsyncDisposable {
  readonly buffers: readonly EpBuffer[];
  readonly groups: readonly Group[];

  private constructor(groups: readonly Group[], buffers: readonly EpBuffer[]) {
    this.groups = groups;
    this.buffers = buffers;
  }

  /** Creates a buffer on each rank. */
  static async create(numRanks: number, options: BenchOptions, buffer: BufferOptions): Promise<Ranks> {
    const groups = Group.local(numRanks);
    const all: BufferOptions = {
      ...buffer,
      backend: options.backend,
      ...(options.library === undefined ? {} : { library: options.library }),
      ...(options.numSms === 0 ? {} : { numSms: options.numSms }),
    };
    return new Ranks(groups, await Promise.all(groups.map((group) => EpBuffer.create(group, all))));
  }

  /** Whether chains can be held back. */
  get hasGate(): boolean {
    return (this.buffers[0]!.capabilities.features & constants.FEATURE.INJECT[0]) !== 0;
  }

  /** The communication streams, on which operations run. */
  get lanes(): Lane[] {
    return this.buffers.map((buffer) => ({ buffer, stream: buffer.commStream }));
  }

  /** Waits until every rank's work has ended. */
  async rest(): Promise<void> {
    await Promise.all(this.buffers.map((buffer) => buffer.barrier()));
  }

  /** Shuts the gate in front of `lanes` for `delayMs`. The events end when it opens. */
  shut(lanes: readonly Lane[], delayMs: number): EpEvent[] {
    const { OP, PHASE, INJECT } = constants;
    injectStruct.pack({
      op: OP.BARRIER[0],
      phase: PHASE.NOTIFY[0],
      action: INJECT.DELAY[0],
      delay_us: Math.ceil(delayMs * 1000),
      count: 1,
    });
    this.buffers[0]!.core.call("deepep_inject", injectStruct, "inject");
    const opened = this.buffers.map((buffer) => buffer.barrier({ stream: buffer.commStream }));
    const own = new Set(this.buffers.map((buffer) => buffer.commStream.address));
    lanes.forEach(({ stream }, i) => {
      if (!own.has(stream.address)) opened[i % opened.length]!.wait(stream);
    });
    return opened;
  }

  /** Closes the buffers and leaves the groups. */
  async [Symbol.asyncDispose](): Promise<void> {
    await Promise.all(this.buffers.map((buffer) => buffer.close()));
    await Promise.all(this.groups.map((group) => group[Symbol.asyncDispose]()));
    await sleep(0); // what was closed is collected before the next ranks come
  }
}

/** The same memory as a tensor of no buffer, for a buffer that did not make it. */
export function foreign<D extends DType>(tensor: Tensor<D>, rows = tensor.shape[0]!): Tensor<D> {
  return Tensor.from(tensor.address, tensor.dtype, [rows, ...tensor.shape.slice(1)], { strides: tensor.strides });
}
