/**
 * A library that only notes its calls, and a buffer on it: what is asked of a library before anything reaches a GPU. In: calls.
 * Out: fresh objects. Called by tests of lib/.
 */
import { EpError, type Tensor } from "@deepep/deepep";
import { Core } from "../../lib/core.ts";
import type { Device } from "../../lib/device.ts";
import { constants } from "../../lib/ffi/abi.ts";
import type { StructCodec } from "../../lib/ffi/struct.ts";
import { resolveOptions } from "../../lib/plan.ts";

const { FEATURE } = constants;

/** A call that was made. */
export interface Call {
  readonly name: string;
  readonly self: bigint;
  readonly args: Record<string, number | bigint | string>;
}

/** A library that answers every call with fresh objects, and fails those that `refuse` names. */
export class FakeDevice {
  readonly backend = "cuda";
  readonly calls: Call[] = [];
  refuse = "";
  #next = 256n;
  #id = 0n;

  call(name: string, self: bigint, args: StructCodec): void {
    const values = args.read() as Record<string, number | bigint | string>;
    this.calls.push({ name, self, args: values });
    if (name === this.refuse) throw new EpError(`${name} is refused`, { code: "invalidArgument", op: "test" });
    const set = args.set as (field: string, value: number | bigint) => void;
    for (const field of ["stream", "event", "handle", "address", "graph"]) {
      if (values[field] === 0n && !/dispatch|combine|begin|wait|query/.test(name)) set(field, this.#next += 256n);
    }
    if (name === "deepep_buffer_get_info") {
      set("num_ranks", 2);
      set("num_local_experts", 2);
      set("free_slots", 0b10);
    }
    if (name === "deepep_dispatch") set("max_rows", 8);
  }
  end(name: string, self: bigint): void {
    this.calls.push({ name, self, args: {} });
  }
  capabilities() {
    return { features: FEATURE.NORMAL[0] | FEATURE.GRAPHS[0] };
  }
  nextId(): bigint {
    return ++this.#id;
  }
  forget(): void {}
  hostRead(): void {}
  failure(): EpError {
    return new EpError("the call has failed", { code: "timeout", op: "test" });
  }
  sweep(): void {}
  hasCompleted(): boolean {
    return false;
  }
  statusOf(): number {
    return 0;
  }
  completed(): Promise<number> {
    return Promise.resolve(0);
  }
  /** The calls of a name since the last look. */
  of(name: string): Call[] {
    return this.calls.filter((call) => call.name === name);
  }
}

/** A buffer of rank 0 of two. */
export function fakeWorld(): { device: FakeDevice; core: Core; x: Tensor<"bf16">; topkIdx: Tensor<"i32"> } {
  const device = new FakeDevice();
  const options = resolveOptions({ hidden: 16, numExperts: 4, numTopk: 2, maxTokensPerRank: 4, maxRecvTokens: 8 }, 2);
  const core = new Core(device as unknown as Device, 7n, options);
  return { device, core, x: core.alloc("bf16", [4, 16]), topkIdx: core.alloc("i32", [4, 2]) };
}
