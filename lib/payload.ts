/**
 * Checks of what users hand in: payload rows, scales and routing, turned into the fields of a struct. Bun coerces FFI
 * arguments silently, so nothing crosses the border unchecked. Called by dispatch.ts, combine.ts and low_latency.ts.
 */
import type { Core } from "./core.ts";
import { type DType, itemSize } from "./dtype.ts";
import { EpError } from "./error.ts";
import { Tensor } from "./tensor.ts";

/** Rows with scales beside them: FP8 with one scale per 128 channels or per token, packed UE8M0, or any other format. */
export interface ScaledRows<D extends DType = DType, S extends DType = DType> {
  /** Payload, `[numTokens, columns]` of any dtype, the row a multiple of 16 bytes. */
  data: Tensor<D>;
  /** Scales, `[numTokens, numScales]` of any dtype and any strides. */
  scales: Tensor<S>;
}
/** What a dispatch carries: bf16 `[numTokens, hidden]`, rows of single bytes of any format, or rows with scales. */
export type Payload = Tensor | ScaledRows;

/** Words for messages: `bf16 [4, 7168]`. */
export const describe = (t: Tensor): string => `${t.dtype} [${t.shape.join(", ")}]`;

/** Checks that something is a tensor, of `core` or foreign, whose memory was not given back. */
export function checkLive(core: Core, op: string, name: string, tensor: Tensor): void {
  if (!(tensor instanceof Tensor)) throw new TypeError(`Cannot ${op}: ${name} is no tensor`);
  if (tensor.hold && tensor.hold.owner !== core) {
    throw new TypeError(`Cannot ${op}: ${name} belongs to ${tensor.hold.owner.label}, not to ${core.label}`);
  }
  if (tensor.released) {
    throw new EpError(`Cannot ${op}: ${name} was given back by ${tensor.hold!.released}`, { code: "closed", op });
  }
  if (tensor.hold) core.uses(tensor.hold);
}

function fits(shape: readonly number[], wanted: readonly (number | undefined)[]): boolean {
  if (shape.length !== wanted.length) return false;
  for (let i = 0; i < wanted.length; i++) if (wanted[i] !== undefined && wanted[i] !== shape[i]) return false;
  return true;
}

/** Checks that a tensor may be used by an operation on `core`. */
export function checkTensor(
  core: Core,
  op: string,
  name: string,
  tensor: Tensor,
  dtypes: readonly DType[],
  shape: readonly (number | undefined)[],
): void {
  checkLive(core, op, name, tensor);
  if (dtypes.length > 0 && !dtypes.includes(tensor.dtype)) {
    throw new TypeError(`Cannot ${op}: ${name} is ${describe(tensor)}, needs ${dtypes.join(" or ")}`);
  }
  if (!fits(tensor.shape, shape)) {
    const want = shape.map((n) => n ?? "any").join(", ");
    throw new TypeError(`Cannot ${op}: ${name} is ${describe(tensor)}, needs shape [${want}]`);
  }
}

/** {@linkcode checkTensor}, and that the elements follow each other. Returns the address, 0 for an absent tensor. */
export function flat(
  core: Core,
  op: string,
  name: string,
  tensor: Tensor | undefined,
  dtypes: readonly DType[],
  shape: readonly (number | undefined)[],
): bigint {
  if (tensor === undefined) return 0n;
  checkTensor(core, op, name, tensor, dtypes, shape);
  if (!tensor.contiguous) throw new TypeError(`Cannot ${op}: ${name} is not contiguous`);
  return tensor.address;
}

/** Bytes from a row to the next. Rows themselves must be contiguous and 16-byte aligned. */
export function rowStride(op: string, name: string, tensor: Tensor): bigint {
  const width = itemSize[tensor.dtype], columns = tensor.shape.at(-1)!;
  if (columns > 1 && tensor.strides.at(-1) !== 1) {
    throw new TypeError(`Cannot ${op}: a row of ${name} is not contiguous`);
  }
  const bytes = (tensor.shape[0]! > 1 ? tensor.strides[0]! : columns) * width;
  if (bytes % 16 !== 0 || tensor.address % 16n !== 0n) {
    throw new RangeError(
      `Cannot ${op}: rows of ${name} are ${bytes} bytes apart at address ${tensor.address}, both must be multiples of 16`,
    );
  }
  return BigInt(bytes);
}

/** The payload fields of a struct. */
export interface PayloadFields {
  x: bigint;
  x_stride: bigint;
  row_bytes: number;
  num_scales: number;
  scale_elem_bytes: number;
  scales: bigint;
  scales_row_stride: bigint;
  scales_elem_stride: bigint;
}

/** The parts of a payload. */
export function parts(op: string, x: Payload): { data: Tensor; scales: Tensor | undefined } {
  if (x === null || typeof x !== "object") {
    throw new TypeError(`Cannot ${op}: x is ${x === null ? "null" : typeof x}, needs a tensor`);
  }
  return "data" in x ? { data: x.data, scales: x.scales } : { data: x, scales: undefined };
}

/** Checks rows and scales of `numTokens` tokens. */
export function payloadFields(core: Core, op: string, x: Payload, numTokens: number): PayloadFields {
  const { data, scales } = parts(op, x);
  checkTensor(core, op, "x", data, scales ? [] : ["bf16", "f8e4m3", "u8", "i8"], [numTokens, undefined]);
  const rowBytes = data.shape[1]! * itemSize[data.dtype], { maxRowBytes, maxScaleBytes } = core.options;
  if (rowBytes === 0 || rowBytes % 16 !== 0 || rowBytes > maxRowBytes) {
    throw new RangeError(
      `Cannot ${op}: a row of x is ${rowBytes} bytes (${
        describe(data)
      }), needs a multiple of 16 up to the buffer's ${maxRowBytes}`,
    );
  }
  const fields: PayloadFields = {
    x: data.address,
    x_stride: rowStride(op, "x", data),
    row_bytes: rowBytes,
    num_scales: 0,
    scale_elem_bytes: 0,
    scales: 0n,
    scales_row_stride: 0n,
    scales_elem_stride: 0n,
  };
  if (!scales) return fields;
  checkTensor(core, op, "x.scales", scales, [], [numTokens, undefined]);
  const width = itemSize[scales.dtype], numScales = scales.shape[1]!;
  if (numScales === 0 || numScales * width > maxScaleBytes) {
    throw new RangeError(
      `Cannot ${op}: a row of x.scales is ${numScales * width} bytes (${
        describe(scales)
      }), needs 1 up to the buffer's ${maxScaleBytes}`,
    );
  }
  return {
    ...fields,
    num_scales: numScales,
    scale_elem_bytes: width,
    scales: scales.address,
    scales_row_stride: BigInt(scales.strides[0]! * width),
    scales_elem_stride: BigInt(scales.strides[1]! * width),
  };
}

/** The routing fields of a struct. */
export interface RoutingFields {
  num_tokens: number;
  num_topk: number;
  topk_idx_bytes: number;
  topk_idx: bigint;
}

/** Checks `topkIdx` of at most `maxTokens` tokens. Its values are checked where they lie, by the operation. */
export function routingFields(core: Core, op: string, topkIdx: Tensor, maxTokens: number): RoutingFields {
  const address = flat(core, op, "topkIdx", topkIdx, ["i32", "i64"], [undefined, undefined]);
  const [numTokens, numTopk] = topkIdx.shape as [number, number];
  if (numTokens > maxTokens) {
    throw new RangeError(`Cannot ${op}: topkIdx has ${numTokens} tokens, the buffer holds ${maxTokens} a rank`);
  }
  if (numTopk < 1 || numTopk > core.options.numTopk) {
    throw new RangeError(
      `Cannot ${op}: topkIdx has ${numTopk} entries a token, the buffer takes 1 to ${core.options.numTopk}`,
    );
  }
  return { num_tokens: numTokens, num_topk: numTopk, topk_idx_bytes: itemSize[topkIdx.dtype], topk_idx: address };
}
