/**
 * Tensors: an address, a dtype, a shape and strides. They are views of memory that a buffer allocated, of a slot's
 * received rows, or of a foreign address; this file knows nothing of how memory is moved except through `TensorOwner`.
 */
import { arrayName, type DType, itemSize, type TypedArrayOf, viewAs } from "./dtype.ts";
import { EpError } from "./error.ts";
import type { EpEvent, Stream } from "./stream.ts";

/** What a tensor needs of the buffer that made it. */
export interface TensorOwner {
  readonly label: string;
  /** Whether it is closed: then its memory is gone. */
  readonly closed: boolean;
  readTensor(tensor: Tensor, stream?: Stream): Promise<ArrayBuffer>;
  writeTensor(tensor: Tensor, data: ArrayBufferView, stream?: Stream): void;
  freeTensor(address: bigint, stream?: Stream): void;
}

/** Who keeps the memory of a tensor, and until when. */
export interface Hold {
  readonly owner: TensorOwner;
  /** False once the memory was given back. */
  alive: boolean;
  /** What gave it back, for the error message. */
  released?: string;
  /** The operation that writes the tensor, if one does. */
  producer?: EpEvent;
}

const elements = (shape: readonly number[]): number => shape.reduce((a, b) => a * b, 1);

/** Strides, in elements, of a row-major tensor. */
export function rowMajor(shape: readonly number[]): number[] {
  const strides: number[] = new Array(shape.length);
  for (let i = shape.length - 1, step = 1; i >= 0; i--) {
    strides[i] = step;
    step *= shape[i]!;
  }
  return strides;
}

// Only warns: memory is given back by `release()`, never by the collector, because streams may still use it.
/** @ignore */
export const forgotten: FinalizationRegistry<{ what: string; owner: TensorOwner | undefined }> =
  new FinalizationRegistry(({ what, owner }) => {
    if (owner?.closed) return;
    const times = (forgottenTimes.get(what) ?? 0) + 1;
    forgottenTimes.set(what, times);
    // A loop that forgets says it once, and again after ten, a hundred, a thousand times.
    if (Number.isInteger(Math.log10(times))) {
      const count = times === 1 ? "" : `, ${times} times now`;
      console.warn(`deepep: ${what} was never released${count}; declare it with "using", or call release()`);
    }
  });
const forgottenTimes = new Map<string, number>();

/** A view of device memory. Shapes are in elements, strides too; addresses are 64-bit. */
export class Tensor<D extends DType = DType> implements Disposable {
  /** The address of the first element. */
  readonly address: bigint;
  /** The element type. */
  readonly dtype: D;
  /** Elements along each dimension. */
  readonly shape: readonly number[];
  /** @ignore Who keeps the memory; undefined for foreign memory. */
  readonly hold: Hold | undefined;
  /** Undefined until somebody asks, in a tensor that is row-major: most are never asked for their strides. */
  #strides: readonly number[] | undefined;
  readonly #owns: boolean;

  /** @ignore Use `buffer.tensor()` or {@linkcode Tensor.from}. */
  constructor(
    address: bigint,
    dtype: D,
    shape: readonly number[],
    options: { strides?: readonly number[]; hold?: Hold; owns?: boolean } = {},
  ) {
    this.address = address;
    this.dtype = dtype;
    this.shape = shape;
    this.#strides = options.strides;
    this.hold = options.hold;
    this.#owns = options.owns ?? false;
    if (this.#owns) {
      forgotten.register(this, { what: `a ${dtype} tensor [${shape.join(", ")}]`, owner: options.hold?.owner }, this);
    }
  }

  /**
   * Wraps a foreign address: memory of PyTorch, cuBLAS or TensorRT reached through other bindings. It is never freed
   * from here, and must outlive the operations that use it.
   *
   * @throws {TypeError} when the address is no bigint or the dtype unknown
   * @throws {RangeError} when a dimension or stride is no whole number, or the address is 0
   */
  static from<D extends DType>(
    address: bigint,
    dtype: D,
    shape: readonly number[],
    options: { strides?: readonly number[] } = {},
  ): Tensor<D> {
    if (typeof address !== "bigint") {
      throw new TypeError(`Cannot wrap a tensor: address is ${typeof address}, needs a bigint`);
    }
    if (!(dtype in itemSize)) throw new TypeError(`Cannot wrap a tensor: unknown dtype ${String(dtype)}`);
    if (!shape.every((n) => Number.isSafeInteger(n) && n >= 0)) {
      throw new RangeError(`Cannot wrap a tensor: shape is [${shape.join(", ")}]`);
    }
    if (address <= 0n && elements(shape) > 0) throw new RangeError(`Cannot wrap a tensor: address is ${address}`);
    if (options.strides && options.strides.length !== shape.length) {
      throw new RangeError(`Cannot wrap a tensor: ${options.strides.length} strides for ${shape.length} dimensions`);
    }
    if (!(options.strides ?? []).every((n) => Number.isSafeInteger(n) && n >= 0)) {
      throw new RangeError(`Cannot wrap a tensor: strides are [${options.strides!.join(", ")}]`);
    }
    return new Tensor(address, dtype, [...shape], options.strides ? { strides: [...options.strides] } : {});
  }

  /** Elements from one to the next along each dimension. */
  get strides(): readonly number[] {
    return this.#strides ??= rowMajor(this.shape);
  }
  /** Elements in all. */
  get size(): number {
    return elements(this.shape);
  }
  /** Bytes of the elements. */
  get byteLength(): number {
    return this.size * itemSize[this.dtype];
  }
  /** Whether elements follow each other in row-major order. */
  get contiguous(): boolean {
    if (this.#strides === undefined) return true;
    const want = rowMajor(this.shape);
    return this.shape.every((n, i) => n <= 1 || this.strides[i] === want[i]);
  }
  /** Whether the memory was given back. */
  get released(): boolean {
    return this.hold?.alive === false;
  }

  /** A view of rows `begin` … `end` of the first dimension. */
  slice(begin: number, end: number = this.shape[0] ?? 0): Tensor<D> {
    const rows = this.shape[0] ?? 0;
    if (!(Number.isSafeInteger(begin) && Number.isSafeInteger(end) && 0 <= begin && begin <= end && end <= rows)) {
      throw new RangeError(`Cannot slice [${begin}, ${end}): the tensor has ${rows} rows`);
    }
    const address = this.address + BigInt(begin * this.strides[0]! * itemSize[this.dtype]);
    return this.#view(address, [end - begin, ...this.shape.slice(1)], this.strides);
  }

  /** The same memory under another shape. @throws {RangeError} when sizes differ or the tensor is not contiguous */
  reshape(...shape: number[]): Tensor<D> {
    if (elements(shape) !== this.size || !this.contiguous) {
      throw new RangeError(`Cannot reshape [${this.shape.join(", ")}] to [${shape.join(", ")}]`);
    }
    return this.#view(this.address, shape, rowMajor(shape));
  }

  #view(address: bigint, shape: readonly number[], strides: readonly number[]): Tensor<D> {
    return new Tensor(address, this.dtype, shape, { strides, ...(this.hold ? { hold: this.hold } : {}) });
  }

  /**
   * Copies the elements to the host, in the order of `stream` (default: the buffer's). bf16 and f8e4m3 come as raw bits.
   * A strided tensor is read as it lies in memory, gathered to row-major order.
   *
   * @throws {EpError} when the operation that writes the tensor failed, or the memory was released
   */
  async read(options: { stream?: Stream } = {}): Promise<TypedArrayOf<D>> {
    const owner = this.#owner("read");
    const bytes = await owner.readTensor(this as Tensor, options.stream);
    return viewAs(this.dtype, new Uint8Array(bytes));
  }

  /**
   * Copies elements from the host, in the order of `stream`. The data may be changed as soon as this returns. For bytes
   * of any kind there is `buffer.write`.
   *
   * @throws {TypeError} when the array is not the dtype's, as in a `Float32Array` for an i32 tensor
   */
  write(data: TypedArrayOf<D>, options: { stream?: Stream } = {}): void {
    const owner = this.#owner("write");
    if (!this.contiguous) throw new RangeError("Cannot write: the tensor is not contiguous");
    // By name, since an array may come from another realm. Bytes of another type would be taken as they are.
    const given = Object.prototype.toString.call(data).slice(8, -1), wanted = arrayName(this.dtype);
    if (given !== wanted) throw new TypeError(`Cannot write: a tensor of ${this.dtype} takes ${wanted}, not ${given}`);
    if (data.byteLength !== this.byteLength) {
      throw new RangeError(`Cannot write ${data.byteLength} bytes: the tensor has ${this.byteLength}`);
    }
    owner.writeTensor(this as Tensor, data, options.stream);
    // All that a failed operation left here has gone.
    if (this.#owns) delete this.hold!.producer;
  }

  /**
   * Gives the memory back: it is used again after what `stream` has enqueued now, and after every operation so far. Views
   * and foreign tensors have nothing to give back.
   */
  release(options: { stream?: Stream } = {}): void {
    if (!this.#owns || !this.hold?.alive) return;
    this.hold.alive = false;
    this.hold.released = "tensor.release()";
    forgotten.unregister(this);
    this.hold.owner.freeTensor(this.address, options.stream);
  }
  /** {@linkcode release}. */
  [Symbol.dispose](): void {
    this.release();
  }

  #owner(what: string): TensorOwner {
    if (!this.hold) {
      throw new TypeError(`Cannot ${what}: a foreign tensor has no buffer, use buffer.${what}(tensor)`);
    }
    if (!this.hold.alive) {
      throw new EpError(`Cannot ${what} the tensor: it was given back by ${this.hold.released}`, {
        code: "closed",
        op: what,
      });
    }
    return this.hold.owner;
  }
}
