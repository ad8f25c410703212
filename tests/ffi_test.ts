/**
 * The FFI layer by itself: struct codecs, the symbol table, opening libraries, completions.
 *
 * In: a tiny C library compiled here, which has the ABI's symbols and a queue that real threads push to. No kernel runs.
 */

import { execFile } from "node:child_process";
import { writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { pathToFileURL } from "node:url";
import { promisify } from "node:util";
import { assert, assertEquals, assertLess, assertRejects, assertStringIncludes, assertThrows } from "@std/assert";
import { LibraryError } from "../lib/error.ts";
import { ABI_VERSION, constants, functions, type StructName, structs } from "../lib/ffi/abi.ts";
import { type CompletionOptions, Completions, wakeOf } from "../lib/ffi/completions.ts";
import { type Library, openLibrary } from "../lib/ffi/open.ts";
import { layoutOf, struct, type StructInput } from "../lib/ffi/struct.ts";
import { symbolTable } from "../lib/ffi/types.ts";
import { noCompiler, root, temporaryFolder } from "./support/compile.ts";
import { fakeLibrary } from "./support/fake_library.ts";

let fake: Promise<Library> | undefined;
const openFake = (): Promise<Library> => fake ??= openLibrary("cpu", { path: fakeLibrary() });

// ---- structs

test("a struct packs each field in its place, and 0 in the others", () => {
  const args = struct("deepep_dispatch_args");
  const view = new DataView(args.bytes.buffer);
  args.pack({ x: 0xffff_ffff_ffff_ffffn, slot: -1, flags: 0xffff_ffff, num_tokens: 7, counts_id: 2 ** 53 - 1 });
  const offset = new Map(layoutOf("deepep_dispatch_args").fields.map((f) => [f.name, f.offset]));
  assertEquals(view.getUint32(0, true), args.bytes.length);
  assertEquals(view.getBigUint64(offset.get("x")!, true), 0xffff_ffff_ffff_ffffn);
  assertEquals(view.getInt32(offset.get("slot")!, true), -1);
  assertEquals(view.getUint32(offset.get("flags")!, true), 0xffff_ffff);
  assertEquals(args.get("counts_id"), 2n ** 53n - 1n);
  args.pack({ num_tokens: 8, x: undefined });
  assertEquals({ ...args.read(), size: 0, num_tokens: 0 }, { ...struct("deepep_dispatch_args").read(), size: 0 });
  assertEquals(args.get("num_tokens"), 8);
});

test("every field of every struct keeps what it was given", () => {
  const limits = { i32: [-(2 ** 31), 2 ** 31 - 1], u32: [0, 2 ** 32 - 1], f32: [-1.5, 0.25], f64: [-1e300, 1e300] };
  const limits64 = { i64: [-(2n ** 63n), 2n ** 63n - 1n], u64: [0n, 2n ** 64n - 1n] };
  for (const name of Object.keys(structs) as StructName[]) {
    for (const pick of [0, 1]) {
      const values: Record<string, unknown> = {};
      for (const { name: field, type } of layoutOf(name).fields) {
        if (field === "size") continue;
        const pair = { ...limits, ...limits64 }[type as keyof typeof limits];
        values[field] = pair ? pair[pick] : pick === 0 ? "" : `${field} ü 漢`;
      }
      const { size: _, ...read } = struct(name).pack(values as StructInput<typeof name>).read() as Record<
        string,
        unknown
      >;
      assertEquals(read, values, name);
    }
  }
});

test("a value that does not fit is refused by name", () => {
  const pack = (values: Record<string, unknown>) => () => struct("deepep_dispatch_args").pack(values as never);
  const cases: [string, unknown][] = [
    ["num_tokens", 2 ** 31],
    ["num_tokens", 1.5],
    ["num_tokens", NaN],
    ["flags", -1],
    ["flags", 2 ** 32],
    ["x", -1n],
    ["x", 2n ** 64n],
    ["x", -1],
    ["x", 2 ** 53],
    ["x", Infinity],
  ];
  for (const [field, value] of cases) {
    const error = assertThrows(pack({ [field]: value }), RangeError, `deepep_dispatch_args.${field}`);
    assertStringIncludes(error.message, String(value));
  }
  const wrong: [string, unknown][] = [
    ["num_tokens", "7"],
    ["num_tokens", 7n],
    ["num_tokens", 0n],
    ["x", "7"],
    ["x", null],
    ["flags", true],
  ];
  for (const [field, value] of wrong) {
    assertThrows(pack({ [field]: value }), TypeError, `deepep_dispatch_args.${field}`);
  }
  assertThrows(pack({ constructor: 1 }), TypeError, "has no field constructor");
  const error = struct("deepep_error");
  assertThrows(() => error.pack({ message: 0 as never }), TypeError, "deepep_error.message");
  assertThrows(() => error.pack({ message: "x".repeat(448) }), RangeError, "deepep_error.message: 448 bytes");
  assertEquals(error.pack({ message: "x".repeat(447) }).get("message").length, 447);
});

test("a struct loads a peer's bytes, and refuses another number of them", () => {
  const sent = struct("deepep_peer_handle").pack({ rank: 3, hidden: 7168, bytes: new Uint8Array([1, 2, 3]) });
  const received = struct("deepep_peer_handle").load(sent.bytes.slice());
  assertEquals([received.get("rank"), received.get("hidden"), received.get("bytes")], [3, 7168, "\x01\x02\x03"]);
  assertThrows(() => received.load(new Uint8Array(7)), RangeError, "7 bytes");
});

// ---- symbols

test("the symbol table has each function, and nothing but scalars and lent bytes", () => {
  assertEquals(Object.keys(symbolTable), Object.keys(functions));
  for (const { args, ret } of Object.values(symbolTable)) {
    assert([...args, ret].every((type) => ["i32", "u32", "i64", "u64", "f32", "f64", "buf"].includes(type)));
    assertLess(args.length, 4);
  }
});

test("arguments and results cross as they are", { skip: noCompiler }, async () => {
  const { symbols } = await openFake();
  const args = struct("deepep_mask_args").pack({ rank: 5, masked: 1 });
  const error = struct("deepep_error");
  const code = symbols.deepep_mask(0xfedc_ba98_7654_3210n, args.bytes, error.reset());
  assertEquals(code, constants.ERROR.INVALID_ARGUMENT[0]);
  const { rank, epoch, expected, message } = error.read();
  assertEquals([rank, epoch, expected, message], [5, 0xfedc_ba98_7654_3210n, -1n, "größer"]);
  const bytes = new Uint8Array(new ArrayBuffer(16));
  symbols.deepep_host_read(0x2an, bytes.subarray(4, 12), 8n);
  assertEquals([...bytes], [0, 0, 0, 0, ...Array<number>(8).fill(42), 0, 0, 0, 0]);
});

// ---- opening

test("a library is opened once", { skip: noCompiler }, async () => {
  const library = await openFake();
  assertEquals(await openLibrary("cpu", { path: library.path }), library);
  assertEquals(library.symbols.deepep_abi_version(), ABI_VERSION);
});

test("a library that is not there, not a library, or another version is refused", { skip: noCompiler }, async () => {
  const folder = temporaryFolder();
  const text = join(folder, "text.so");
  writeFileSync(text, "not ELF");
  const cases: [string, string[]][] = [
    [join(folder, "none.so"), ["the option library names", "none.so", "does not exist"]],
    [text, ["Cannot open", "text.so", "DEEPEP_LIBRARY_CPU"]],
    [fakeLibrary({ version: 77 }), ["its ABI version is 77", `needs ${ABI_VERSION}`, "DEEPEP_LIBRARY_CPU"]],
    [fakeLibrary({ without: "deepep_combine" }), ["Cannot open", "deepep_combine"]],
  ];
  for (const [path, texts] of cases) {
    const error = await assertRejects(() => openLibrary("cpu", { path }), LibraryError);
    for (const text of texts) assertStringIncludes(error.message, text);
  }
});

// ---- completions

const later = struct("deepep_event_args");
const error = struct("deepep_error");

/** Lets a native thread complete `id` after `us` microseconds. */
function completeLater({ symbols }: Library, id: number, us: number, status = 0): void {
  assertEquals(
    symbols.deepep_event_notify(1n, later.pack({ done_id: id, stream: us, status }).bytes, error.reset()),
    0,
  );
}

function completionsOf(library: Library, options: CompletionOptions = {}, byCallback = false): Completions {
  return new Completions({
    drain: (out, capacity) => library.symbols.deepep_queue_drain(1n, out, capacity),
    wake: byCallback ? wakeOf(library, 1n) : undefined,
  }, options);
}

for (
  const [how, options, byCallback] of [
    ["turn", { spinMs: 1000 }, false],
    ["timer", { spinMs: 0 }, false],
    ["callback", { spinMs: 0 }, true],
  ] as const
) {
  test(`completions arrive by ${how}, whatever their order`, { skip: noCompiler, timeout: 20_000 }, async () => {
    const library = await openFake();
    await using completions = completionsOf(library, options, byCallback);
    const ids = Array.from({ length: 200 }, () => completions.nextId());
    for (const [i, id] of ids.entries()) completeLater(library, id, (i * 7919) % 20_000, i % 5);
    assertEquals(await Promise.all(ids.map((id) => completions.wait(id))), ids.map((_, i) => i % 5));
    assertEquals(completions.numInFlight, 0);
    for (let i = 0; i < 20; i++) { // one at a time: each wait begins asleep
      const id = completions.nextId();
      completeLater(library, id, 2000, 6);
      assertEquals(await completions.wait(id), 6);
    }
  });
}

test("a status can be asked for late, twice, or never", { skip: noCompiler }, async () => {
  const library = await openFake();
  await using completions = completionsOf(library);
  const [good, bad, never, last] = [1, 2, 3, 4].map(() => completions.nextId()) as [number, number, number, number];
  completeLater(library, good, 0, 0);
  completeLater(library, bad, 0, 5);
  completeLater(library, never, 0, 0);
  completeLater(library, last, 20_000, 0);
  assertEquals(await completions.wait(last), 0);
  assertEquals(await Promise.all([good, bad, bad].map((id) => completions.wait(id))), [0, 5, 5]);
  completions.poll();
  assertEquals(completions.numInFlight, 0);
});

test("a queue that nobody waits for is read now and then, and stays short", async () => {
  const queued: number[] = [];
  let reads = 0, longest = 0;
  const drain = (out: Uint8Array, capacity: number): number => {
    const view = new DataView(out.buffer, out.byteOffset), taken = queued.splice(0, capacity);
    reads++;
    taken.forEach((id, i) => {
      view.setBigUint64(16 * i, BigInt(id), true);
      view.setInt32(16 * i + 8, 0, true);
    });
    return taken.length;
  };
  await using completions = new Completions({ drain });
  const call = (): void => {
    completions.sweep();
    queued.push(completions.nextId());
    longest = Math.max(longest, queued.length);
  };
  for (let i = 0; i < 1000; i++) call();
  assert(longest <= 64 && reads <= 1000 / 16, `${longest} at most, ${reads} reads`);
  const slow = Array.from({ length: 300 }, () => completions.nextId()); // under way all the time
  reads = longest = 0;
  for (let i = 0; i < 1000; i++) call();
  assert(longest <= 2 * 300 + 64 && reads <= 20, `${longest} at most, ${reads} reads`);
  for (const id of slow) completions.forget(id);
  completions.poll();
  longest = 0;
  for (let i = 0; i < 1000; i++) call();
  assert(longest <= 64, `${longest} at most`);
});

test("an id that will not come is no endless wait", { skip: noCompiler }, async () => {
  const library = await openFake();
  const completions = completionsOf(library, { spinMs: 0 });
  assertThrows(() => completions.wait(1), RangeError, "never handed out");
  const [forgotten, open] = [completions.nextId(), completions.nextId()];
  const waits = [completions.wait(forgotten), completions.wait(open)];
  completions.forget(forgotten);
  await completions[Symbol.asyncDispose]();
  const closed = constants.ERROR.CLOSED[0];
  assertEquals(await Promise.all([...waits, completions.wait(open)]), [closed, closed, closed]);
});

test("a queue that is gone ends every wait with its code", { skip: noCompiler }, async () => {
  const library = await openFake();
  const completions = new Completions({ drain: (out, n) => library.symbols.deepep_queue_drain(9n, out, n) });
  assertEquals(await completions.wait(completions.nextId()), constants.ERROR.INVALID_ARGUMENT[0]);
});

test("the process lives as long as something is waited for", { skip: noCompiler, timeout: 60_000 }, async () => {
  const { path } = await openFake();
  for (const byCallback of [false, true]) {
    const program = join(temporaryFolder(), "program.ts");
    const module = (name: string) => JSON.stringify(pathToFileURL(join(root, "lib/ffi", name)).href);
    writeFileSync(
      program,
      `import { openLibrary } from ${module("open.ts")};
import { Completions, wakeOf } from ${module("completions.ts")};
import { struct } from ${module("struct.ts")};
const library = await openLibrary("cpu", { path: ${JSON.stringify(path)} });
const completions = new Completions({
  drain: (out, n) => library.symbols.deepep_queue_drain(1n, out, n),
  wake: ${byCallback} ? wakeOf(library, 1n) : undefined,
}, { spinMs: 0 });
const [waited, never] = [completions.nextId(), completions.nextId()];
const args = struct("deepep_event_args").pack({ done_id: waited, stream: 100_000, status: 4 });
library.symbols.deepep_event_notify(1n, args.bytes, struct("deepep_error").bytes);
const status = await completions.wait(waited);
await completions[Symbol.asyncDispose]();
console.log("status", status, "in flight", completions.numInFlight, never);
`,
    );
    const args = "Deno" in globalThis ? ["run", "-A", "--no-lock"] : ["run"];
    const { stdout } = await promisify(execFile)(process.execPath, [...args, program], { timeout: 30_000 });
    assertStringIncludes(stdout, "status 4 in flight 1 2\n");
  }
});

test("the queue of the cpu library wakes by callback", { timeout: 20_000 }, async (t) => {
  const library = await openLibrary("cpu").catch((error: LibraryError) => t.skip(error.message));
  if (!library) return;
  const { symbols } = library;
  const ok = (code: number): void => assertEquals(code, 0, error.get("message"));
  const queue = struct("deepep_queue_create_args");
  ok(symbols.deepep_queue_create(0n, queue.bytes, error.reset()));
  const source = queue.get("queue");
  const buffer = struct("deepep_buffer_create_args");
  buffer.pack({ num_ranks: 1, hidden: 8, num_experts: 1, num_topk: 1, max_tokens_per_rank: 1, queue: source });
  ok(symbols.deepep_buffer_create(0n, buffer.bytes, error.reset()));
  const event = struct("deepep_event_create_args");
  ok(symbols.deepep_event_create(buffer.get("buffer"), event.bytes, error.reset()));
  {
    await using completions = new Completions({
      drain: (out, capacity) => symbols.deepep_queue_drain(source, out, capacity),
      wake: wakeOf(library, source),
    }, { spinMs: 0 });
    for (let i = 0; i < 50; i++) {
      const id = completions.nextId();
      ok(symbols.deepep_event_notify(event.get("event"), later.pack({ done_id: id }).bytes, error.reset()));
      assertEquals(await completions.wait(id), 0);
    }
  }
  ok(symbols.deepep_event_destroy(event.get("event"), error.reset()));
  ok(symbols.deepep_buffer_destroy(buffer.get("buffer"), error.reset()));
  ok(symbols.deepep_queue_destroy(source, error.reset()));
});
