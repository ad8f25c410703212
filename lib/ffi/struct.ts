/**
 * Codecs of the structs that cross the border.
 *
 * In: the structs of `abi.ts`. Out: their layout by C's natural alignment, which `scripts/abi.ts` also writes into the
 * header as static_asserts, so that TypeScript and the C compiler check each other; and `struct()`, a reusable block of
 * bytes with typed fields. Setters check what Bun would coerce in silence. Every call into a library packs with these.
 */

import { type Field, type FieldType, type StructName, structs } from "./abi.ts";

/** A field and its place. */
export interface PlacedField {
  readonly name: string;
  readonly type: FieldType;
  readonly direction: "in" | "out";
  readonly doc: string;
  /** Bytes from the begin of the struct. */
  readonly offset: number;
  /** Bytes of the field. */
  readonly bytes: number;
}

/** The layout of a struct. */
export interface StructLayout {
  readonly name: StructName;
  /** `sizeof`, trailing padding included. */
  readonly size: number;
  readonly fields: readonly PlacedField[];
}

const scalarBytes = { i32: 4, u32: 4, f32: 4, i64: 8, u64: 8, f64: 8 } as const;

/** The number of bytes of a `u8[n]` field, or undefined for a scalar. */
export function textBytes(type: FieldType): number | undefined {
  const match = /^u8\[(\d+)\]$/.exec(type);
  return match ? Number(match[1]) : undefined;
}

/** Lays a struct out as a C compiler does. */
export function layoutOf(name: StructName): StructLayout {
  let end = 0;
  let alignment = 1;
  const fields: PlacedField[] = [];
  for (const [field, [type, direction, doc]] of Object.entries<Field>(structs[name].fields)) {
    const text = textBytes(type);
    const bytes = text ?? scalarBytes[type as keyof typeof scalarBytes];
    const align = text === undefined ? bytes : 1;
    const offset = Math.ceil(end / align) * align;
    fields.push({ name: field, type, direction, doc, offset, bytes });
    end = offset + bytes;
    alignment = Math.max(alignment, align);
  }
  return { name, size: Math.ceil(end / alignment) * alignment, fields };
}

/** What a field reads as: 64-bit integers are bigint, `u8[n]` is text up to its first zero byte. */
type Read<T> = T extends "i64" | "u64" ? bigint : T extends `u8[${number}]` ? string : number;
/** What a field may be set to: 64-bit integers take safe integers too, `u8[n]` takes text or bytes. */
type Written<T> = T extends "i64" | "u64" ? bigint | number : T extends `u8[${number}]` ? string | Uint8Array : number;
type Fields<N extends StructName> = (typeof structs)[N]["fields"];

/** The fields of a struct as read. */
export type StructValues<N extends StructName> = {
  -readonly [K in keyof Fields<N>]: Fields<N>[K] extends readonly [infer T, ...unknown[]] ? Read<T> : never;
};

/** The fields of a struct that a call writes. */
export type StructOutputs<N extends StructName> = {
  -readonly [K in keyof Fields<N> as Fields<N>[K] extends readonly [unknown, "out", ...unknown[]] ? K : never]:
    Fields<N>[K] extends readonly [infer T, ...unknown[]] ? Read<T> : never;
};

/** The fields of a struct to be written; what is missing becomes 0. */
export type StructInput<N extends StructName> = {
  readonly [K in Exclude<keyof Fields<N>, "size">]?: Fields<N>[K] extends readonly [infer T, ...unknown[]]
    ? Written<T> | undefined
    : never;
};

/** A reusable struct. */
export interface StructCodec<N extends StructName = StructName> {
  readonly name: N;
  /** The memory; lend it to a call. It stays the same for the life of the struct. */
  readonly bytes: Uint8Array<ArrayBuffer>;
  /**
   * Writes `size` and the given fields, and 0 into all others. Fields may come in several objects: merging them first would
   * cost more than packing.
   *
   * @throws {RangeError} if a value does not fit its field
   * @throws {TypeError} if a value has the wrong type, or there is no such field
   */
  pack(...values: readonly StructInput<N>[]): this;
  /** Writes `size`, and 0 into all other fields; answers the bytes. For structs that a call only writes. */
  reset(): Uint8Array<ArrayBuffer>;
  /** Writes one field, with the checks of `pack`. */
  set<K extends keyof StructInput<N> & string>(field: K, value: NonNullable<StructInput<N>[K]>): void;
  /** Reads one field. */
  get<K extends keyof StructValues<N> & string>(field: K): StructValues<N>[K];
  /** Reads every field. */
  read(): StructValues<N>;
  /** Reads the fields that a call writes: a third of the cost of `read` for the large structs. */
  outputs(): StructOutputs<N>;
  /** Takes over the bytes of another struct of this kind, as received from a peer. */
  load(bytes: Uint8Array): this;
}

type Setter = (value: unknown) => void;
type Getter = () => number | bigint | string;
interface Codec {
  /** What need not be written over zeros: 1 = the number 0, 2 = the bigint too, 0 = neither. */
  readonly zeros: 0 | 1 | 2;
  readonly set: Setter;
  readonly get: Getter;
}

const decoder = new TextDecoder();
const encoder = new TextEncoder();

function show(value: unknown): string {
  if (typeof value === "string") return JSON.stringify(value);
  return typeof value === "bigint" ? `${value}n` : String(value);
}

function wrongType(field: string, value: unknown, wanted: string): TypeError {
  return new TypeError(`Cannot pack ${field}: ${show(value)} is not ${wanted}`);
}

function outOfRange(field: string, value: unknown, low: number | bigint, high: number | bigint): RangeError {
  return new RangeError(`Cannot pack ${field}: ${show(value)} is not an integer in ${low} … ${high}`);
}

function codec32(view: DataView, at: number, field: string, type: "i32" | "u32"): Codec {
  const signed = type === "i32";
  const low = signed ? -0x8000_0000 : 0;
  const high = signed ? 0x7fff_ffff : 0xffff_ffff;
  const check = (value: unknown): void => {
    if (typeof value !== "number") throw wrongType(field, value, "a number");
    throw outOfRange(field, value, low, high);
  };
  return signed
    ? {
      zeros: 1,
      set: (value) =>
        typeof value === "number" && (value | 0) === value ? view.setInt32(at, value, true) : check(value),
      get: () => view.getInt32(at, true),
    }
    : {
      zeros: 1,
      set: (value) =>
        typeof value === "number" && (value >>> 0) === value ? view.setUint32(at, value, true) : check(value),
      get: () => view.getUint32(at, true),
    };
}

function codec64(view: DataView, at: number, field: string, type: "i64" | "u64"): Codec {
  const signed = type === "i64";
  const low = signed ? -(1n << 63n) : 0n;
  const high = signed ? (1n << 63n) - 1n : (1n << 64n) - 1n;
  const least = Number(low);
  const setNumber = (value: unknown): void => {
    if (typeof value !== "number") throw wrongType(field, value, "a bigint");
    if (!Number.isSafeInteger(value) || value < least) throw outOfRange(field, value, low, high);
    view.setUint32(at, value, true); // modulo 2^32
    view.setInt32(at + 4, Math.floor(value / 0x1_0000_0000), true);
  };
  const setI64 = (value: unknown): void => {
    if (typeof value !== "bigint") return setNumber(value);
    if (value < low || value > high) throw outOfRange(field, value, low, high);
    view.setBigInt64(at, value, true);
  };
  const setU64 = (value: unknown): void => {
    if (typeof value !== "bigint") return setNumber(value);
    if (value < low || value > high) throw outOfRange(field, value, low, high);
    view.setBigUint64(at, value, true);
  };
  return signed
    ? { zeros: 2, set: setI64, get: () => view.getBigInt64(at, true) }
    : { zeros: 2, set: setU64, get: () => view.getBigUint64(at, true) };
}

function codecFloat(view: DataView, at: number, field: string, type: "f32" | "f64"): Codec {
  const check = (value: unknown): number => {
    if (typeof value !== "number") throw wrongType(field, value, "a number");
    return value;
  };
  return type === "f32"
    ? { zeros: 0, set: (value) => view.setFloat32(at, check(value), true), get: () => view.getFloat32(at, true) }
    : { zeros: 0, set: (value) => view.setFloat64(at, check(value), true), get: () => view.getFloat64(at, true) };
}

function codecText(bytes: Uint8Array, at: number, length: number, field: string): Codec {
  const place = bytes.subarray(at, at + length);
  const set = (value: unknown): void => {
    if (typeof value !== "string" && !(value instanceof Uint8Array)) throw wrongType(field, value, "text or bytes");
    const text = typeof value === "string";
    const from = text ? encoder.encode(value) : value;
    const room = text ? length - 1 : length; // text ends with a zero byte
    if (from.length > room) throw new RangeError(`Cannot pack ${field}: ${from.length} bytes, the field holds ${room}`);
    place.fill(0);
    place.set(from);
  };
  const get = (): string => {
    const end = place.indexOf(0);
    return decoder.decode(place.subarray(0, end < 0 ? length : end));
  };
  return { zeros: 0, set, get };
}

function codecOf(bytes: Uint8Array, view: DataView, struct: string, f: PlacedField): Codec {
  const field = `${struct}.${f.name}`;
  switch (f.type) {
    case "i32":
    case "u32":
      return codec32(view, f.offset, field, f.type);
    case "i64":
    case "u64":
      return codec64(view, f.offset, field, f.type);
    case "f32":
    case "f64":
      return codecFloat(view, f.offset, field, f.type);
    default:
      return codecText(bytes, f.offset, f.bytes, field);
  }
}

/** Makes a struct with all fields 0 but `size`. */
export function struct<N extends StructName>(name: N): StructCodec<N> {
  const layout = layoutOf(name);
  // The ArrayBuffer comes first: Bun may move a small `new Uint8Array(n)` when its buffer is first read.
  const memory = new ArrayBuffer(layout.size);
  const bytes = new Uint8Array(memory);
  const view = new DataView(memory);
  // Without a prototype, so that no field is mistaken for a property of it. A Map is three times as slow under Bun.
  const codecs: Record<string, Codec> = Object.create(null);
  for (const f of layout.fields) codecs[f.name] = codecOf(bytes, view, name, f);
  const hasSize = "size" in codecs;
  const codec = (field: string): Codec => {
    const found = codecs[field];
    if (!found) throw new TypeError(`Cannot pack ${name}: it has no field ${field}`);
    return found;
  };
  // A struct is mostly packed with the same fields in the same order: to compare names costs less than to look them up.
  const order: { readonly field: string; readonly codec: Codec }[] = [];
  const outputs = layout.fields.filter((f) => f.direction === "out").map((f) => [f.name, codec(f.name).get] as const);
  const self: StructCodec<N> = {
    name,
    bytes,
    pack(...values: readonly StructInput<N>[]) {
      self.reset();
      let nth = 0;
      for (const part of values as readonly Record<string, unknown>[]) {
        for (const field in part) {
          let place = order[nth];
          if (place?.field !== field) place = order[nth] = { field, codec: codec(field) };
          nth++;
          const value = part[field], { zeros, set } = place.codec;
          if (value === undefined || value === 0 && zeros > 0 || value === 0n && zeros > 1) continue; // it is there
          set(value);
        }
      }
      return self;
    },
    reset() {
      bytes.fill(0);
      if (hasSize) view.setUint32(0, layout.size, true);
      return bytes;
    },
    set: (field, value) => codec(field).set(value),
    get: (field) => codec(field).get() as never,
    read: () => Object.fromEntries(layout.fields.map((f) => [f.name, codec(f.name).get()])) as StructValues<N>,
    outputs() {
      const values: Record<string, unknown> = {};
      for (const [field, get] of outputs) values[field] = get();
      return values as StructOutputs<N>;
    },
    load(from: Uint8Array) {
      if (from.length !== layout.size) {
        throw new RangeError(`Cannot load ${name}: ${from.length} bytes, the struct has ${layout.size}`);
      }
      bytes.set(from);
      return self;
    },
  };
  return self.pack();
}
