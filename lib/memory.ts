/**
 * Memory of a buffer's device: tensors, copies, fills, and the way to and from the host. In: a Core. Out: tensors, and work
 * enqueued on a stream. Pinned staging memory of the library stands between JavaScript and the device, because JavaScript's
 * memory may move or die while a stream still copies. Called by core.ts and buffer.ts.
 */
import { constants } from "./ffi/abi.ts";
import { struct } from "./ffi/struct.ts";
import type { Core } from "./core.ts";
import { type DType, itemSize } from "./dtype.ts";
import { type Stream, streamAddress } from "./stream.ts";
import { type Hold, Tensor } from "./tensor.ts";

const allocStruct = struct("deepep_alloc_args");
const copyStruct = struct("deepep_copy_args");
const fillStruct = struct("deepep_fill_args");

type Kind = keyof typeof constants.MEMORY;

function alloc(core: Core, bytes: number, kind: Kind): bigint {
  allocStruct.pack({ bytes: BigInt(Math.max(bytes, 1)), kind: constants.MEMORY[kind][0] });
  core.call("deepep_alloc", allocStruct, "alloc");
  return allocStruct.get("address");
}

/** Frees memory after what is enqueued on `stream` now; at once without one. */
export function free(core: Core, address: bigint, kind: Kind, stream?: Stream): void {
  allocStruct.pack({ bytes: 1n, kind: constants.MEMORY[kind][0], address, stream: stream?.address ?? 0n });
  core.call("deepep_free", allocStruct, "free");
}

/** A new tensor. */
export function allocTensor<D extends DType>(core: Core, dtype: D, shape: readonly number[]): Tensor<D> {
  core.open("allocate a tensor");
  if (!(dtype in itemSize)) throw new TypeError(`Cannot allocate a tensor: unknown dtype ${String(dtype)}`);
  if (!shape.every((n) => Number.isSafeInteger(n) && n >= 0)) {
    throw new RangeError(`Cannot allocate a tensor: shape is [${shape.join(", ")}]`);
  }
  const bytes = shape.reduce((a, b) => a * b, itemSize[dtype]);
  const hold: Hold = { owner: core, alive: true };
  return new Tensor(alloc(core, bytes, "DEVICE"), dtype, [...shape], { hold, owns: true }); // the array is the caller's
}

/** Enqueues a copy between addresses. `id` completes when it is done. */
export function copy(core: Core, dst: bigint, src: bigint, bytes: number, stream: Stream, id = 0): void {
  core.open("copy");
  copyStruct.pack({ dst, src, bytes: BigInt(bytes), stream: streamAddress("copy", stream), done_id: id });
  core.call("deepep_copy", copyStruct, "copy");
}

/** Enqueues a fill of a contiguous tensor with a byte value. */
export function fill(core: Core, tensor: Tensor, value: number, stream: Stream = core.stream): void {
  core.open("fill a tensor");
  if (!tensor.contiguous) throw new RangeError("Cannot fill: the tensor is not contiguous");
  if (!(Number.isInteger(value) && value >= 0 && value <= 255)) {
    throw new RangeError(`Cannot fill: value is ${value}, needs a byte, 0 to 255`);
  }
  const bytes = BigInt(tensor.byteLength);
  fillStruct.pack({ dst: tensor.address, bytes, value, stream: streamAddress("fill", stream) });
  core.call("deepep_fill", fillStruct, "fill");
}

/** Row-major bytes of a tensor, as they are when `stream` has come so far. */
export async function readTensor(core: Core, tensor: Tensor, stream: Stream): Promise<ArrayBuffer> {
  core.open("read a tensor");
  core.needsNoCapture("read a tensor");
  const span = spanOf(tensor), bytes = new ArrayBuffer(span);
  if (span > 0) {
    const staging = alloc(core, span, "HOST"), id = core.device.nextId();
    try {
      copy(core, staging, tensor.address, span, stream, id);
      core.check(await core.status(id), id, "read");
      core.device.hostRead(staging, new Uint8Array(bytes));
    } catch (error) {
      core.device.forget(id);
      throw error;
    } finally {
      free(core, staging, "HOST");
    }
    tensor.hold?.producer?.check();
  }
  return tensor.contiguous ? bytes : gather(tensor, bytes);
}

/** Enqueues the writing of a contiguous tensor. `data` may be changed as soon as this returns. */
export function writeTensor(core: Core, tensor: Tensor, data: ArrayBufferView, stream: Stream): void {
  core.open("write a tensor");
  core.needsNoCapture("write a tensor");
  if (data.byteLength === 0) return;
  const staging = alloc(core, data.byteLength, "HOST");
  try {
    core.device.hostWrite(staging, data);
    copy(core, tensor.address, staging, data.byteLength, stream);
  } catch (error) {
    free(core, staging, "HOST");
    throw error;
  }
  free(core, staging, "HOST", stream);
}

/** Bytes from a tensor's first element to its last, both included. */
function spanOf(tensor: Tensor): number {
  if (tensor.size === 0) return 0;
  const last = tensor.shape.reduce((sum, n, i) => sum + (n - 1) * tensor.strides[i]!, 0);
  return (last + 1) * itemSize[tensor.dtype];
}

/** Row-major elements of a strided tensor whose span is `bytes`. */
function gather(tensor: Tensor, bytes: ArrayBuffer): ArrayBuffer {
  const { shape, strides, dtype } = tensor;
  const out = new ArrayBuffer(tensor.byteLength);
  // Elements travel as integers of their width: a float array may change the bits of a NaN.
  const Words = {
    1: Uint8Array,
    2: Uint16Array,
    4: Uint32Array,
    8: BigUint64Array,
  }[itemSize[dtype]] as typeof Uint32Array;
  const source = new Words(bytes), to = new Words(out);
  const index: number[] = shape.map(() => 0);
  for (let i = 0, at = 0; i < to.length; i++) {
    to[i] = source[at]!;
    for (let d = shape.length - 1; d >= 0; d--) {
      at += strides[d]!;
      if (++index[d]! < shape[d]!) break;
      at -= shape[d]! * strides[d]!;
      index[d] = 0;
    }
  }
  return out;
}
