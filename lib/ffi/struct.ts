/**
 * Codecs of the structs that cross the border.
 *
 * In: the structs of `abi.ts`. Out: their layout by C's natural alignment, which `scripts/abi.ts` also writes into the
 * header as static_asserts, so that TypeScript and the C compiler check each other.
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
