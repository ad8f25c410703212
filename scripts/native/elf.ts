/**
 * Reads what a shared library (ELF, 64 bits, little-endian) wants from the system and shows to it.
 *
 * In: the bytes of the file. Out: the libraries that it needs, the symbols that it imports with their versions, and those
 * that it exports. `scripts/build.ts` checks each library that it has linked with `elfProblems`; a test the committed ones.
 */

/** What {@linkcode readElf} finds. */
export interface Elf {
  /** Names of the libraries that are loaded with it. */
  readonly needed: readonly string[];
  /** Symbols that it takes from others: `name`, or `name@version`. */
  readonly imports: readonly string[];
  /** Symbols that it shows to others. */
  readonly exports: readonly string[];
  /** Whether it stays loaded when it is closed. */
  readonly stays: boolean;
}

/** The oldest glibc that the libraries run on, 2.x: RHEL 8's. */
export const MAX_GLIBC = 28;

/** glibc's own libraries. Everything else is in the library itself, or opened when it is wanted. */
const SYSTEM = ["libc", "libm", "libdl", "libpthread", "librt", "ld-linux-x86-64"];

const SHT_DYNAMIC = 6, SHT_DYNSYM = 11, SHT_VERNEED = 0x6ffffffe, SHT_VERSYM = 0x6fffffff;
const DT_NEEDED = 1, DT_FLAGS_1 = 0x6ffffffb, DF_1_NODELETE = 8;
const SHN_UNDEF = 0, STB_LOCAL = 0, STV_DEFAULT = 0;

interface Section {
  readonly type: number;
  readonly offset: number;
  readonly size: number;
  /** Index of the section with its names. */
  readonly link: number;
}

/** Reads a library. */
export function readElf(bytes: Uint8Array): Elf {
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const u16 = (at: number): number => view.getUint16(at, true);
  const u32 = (at: number): number => view.getUint32(at, true);
  const u64 = (at: number): number => Number(view.getBigUint64(at, true));
  if (u32(0) !== 0x464c457f || bytes[4] !== 2 || bytes[5] !== 1) throw new Error("not a 64-bit little-endian ELF file");

  const [table, entry, count] = [u64(40), u16(58), u16(60)];
  const sections = Array.from({ length: count }, (_, i): Section => {
    const at = table + i * entry;
    return { type: u32(at + 4), offset: u64(at + 24), size: u64(at + 32), link: u32(at + 40) };
  });
  const section = (type: number): Section | undefined => sections.find((each) => each.type === type);
  const name = (of: Section, offset: number): string => {
    const from = sections[of.link]!.offset + offset;
    return new TextDecoder().decode(bytes.subarray(from, bytes.indexOf(0, from)));
  };

  const needed: string[] = [];
  let stays = false;
  const dynamic = section(SHT_DYNAMIC);
  for (let at = dynamic?.offset ?? 0; dynamic && at < dynamic.offset + dynamic.size; at += 16) {
    if (u64(at) === DT_NEEDED) needed.push(name(dynamic, u64(at + 8)));
    if (u64(at) === DT_FLAGS_1) stays = (u64(at + 8) & DF_1_NODELETE) !== 0;
  }

  const versions = new Map<number, string>(); // by the index that .gnu.version has for each symbol
  const verneed = section(SHT_VERNEED);
  for (let at = verneed?.offset ?? 0, next = 1; verneed && next !== 0; at += next) {
    for (let aux = at + u32(at + 8), left = u16(at + 2); left > 0; left--, aux += u32(aux + 12)) {
      versions.set(u16(aux + 6), name(verneed, u32(aux + 8)));
    }
    next = u32(at + 12);
  }

  const imports: string[] = [];
  const exports: string[] = [];
  const symbols = section(SHT_DYNSYM);
  const versym = section(SHT_VERSYM);
  for (let i = 1; symbols && i < symbols.size / 24; i++) {
    const at = symbols.offset + i * 24;
    const symbol = name(symbols, u32(at));
    const local = bytes[at + 4]! >> 4 === STB_LOCAL || (bytes[at + 5]! & 3) !== STV_DEFAULT;
    if (u16(at + 6) !== SHN_UNDEF) {
      if (!local) exports.push(symbol);
      continue;
    }
    const version = versym && versions.get(u16(versym.offset + i * 2) & 0x7fff);
    imports.push(version ? `${symbol}@${version}` : symbol);
  }
  return { needed, imports: imports.sort(), exports: exports.sort(), stays };
}

/** What keeps a library from running on every system that it is for, or from living beside others in a process. */
export function elfProblems({ needed, imports, exports, stays }: Elf): string[] {
  const newer = (symbol: string): boolean => Number(/@GLIBC_2\.(\d+)/.exec(symbol)?.[1] ?? 0) > MAX_GLIBC;
  return [
    ...needed.filter((name) => !SYSTEM.includes(name.replace(/\.so.*$/, "")))
      .map((name) => `needs ${name}, which not every system has`),
    ...imports.filter((symbol) => symbol.includes("@") && !symbol.includes("@GLIBC_"))
      .map((symbol) => `needs ${symbol}, which is not glibc's`),
    ...imports.filter(newer).map((symbol) =>
      `needs ${symbol}, at most glibc 2.${MAX_GLIBC} is wanted: see cuda/compat`
    ),
    ...exports.filter((symbol) => !symbol.startsWith("deepep_")).map((symbol) => `exports ${symbol}`),
    ...(stays ? [] : ["can be unloaded while its threads run: link it with -z nodelete"]),
  ];
}
