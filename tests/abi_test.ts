/**
 * The ABI as TypeScript and as C see it.
 *
 * In: `lib/ffi/abi.ts`, `cuda/abi/deepep.h`. The C compiler prints sizes, offsets, constants and parameter counts of the
 * header, and they must be those of the codecs; the header must be the generated one, and valid in C11 and C++.
 */

import { execFileSync } from "node:child_process";
import { readFileSync } from "node:fs";
import { join } from "node:path";
import { test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { ABI_VERSION, constants, functions, limits, type StructName, structs } from "../lib/ffi/abi.ts";
import { layoutOf, struct } from "../lib/ffi/struct.ts";
import { header } from "../scripts/abi.ts";
import { compile, noCompiler, root } from "./support/compile.ts";

const layouts = (Object.keys(structs) as StructName[]).map(layoutOf);

test("the header is the generated one", () => {
  assertEquals(readFileSync(join(root, "cuda/abi/deepep.h"), "utf8"), header());
});

test("C places every field where the codecs do", { skip: noCompiler }, () => {
  const places = layouts.flatMap(({ name, size, fields }) => [
    [name, size] as const,
    ...fields.flatMap((f) => [[`${name}.${f.name}`, f.offset], [`bytes of ${name}.${f.name}`, f.bytes]] as const),
  ]);
  const prints = layouts.flatMap(({ name, fields }) => [
    `sizeof(${name})`,
    ...fields.flatMap((f) => [`offsetof(${name}, ${f.name})`, `sizeof(((${name}*)0)->${f.name})`]),
  ]).map((expression) => `  printf("%zu\\n", ${expression});`);
  const program = compile(
    `#include <stdio.h>\n#include "cuda/abi/deepep.h"\nint main(void) {\n${prints.join("\n")}\n}\n`,
    "layout",
  );
  const printed = execFileSync(program, { encoding: "utf8" }).trim().split("\n").map(Number);
  assertEquals(places.map(([name], i) => [name, printed[i]]), places.map(([name, value]) => [name, value]));
});

test("C sees every constant with its value", { skip: noCompiler }, () => {
  const values = [
    ["DEEPEP_ABI_VERSION", ABI_VERSION],
    ...Object.entries(limits).map(([name, [value]]) => [`DEEPEP_MAX_${name}`, value]),
    ...Object.entries(constants).flatMap(([group, members]) =>
      Object.entries<readonly [number, string]>(members).map(([name, [value]]) => [
        group === "ERROR" && name === "OK" ? "DEEPEP_OK" : `DEEPEP_${group}_${name}`,
        value,
      ])
    ),
  ];
  const asserts = values.map(([name, value]) => `static_assert(${name} == ${value}, "${name}");`).join("\n");
  compile(`#include "cuda/abi/deepep.h"\n${asserts}\nint main(void) {}\n`, "constants");
});

test("the header is valid C11 and C++17, and declares every function", { skip: noCompiler }, () => {
  const uses = Object.keys(functions).map((name) => `  (void)&${name};`).join("\n");
  const source = `#include "cuda/abi/deepep.h"\nvoid use(void);\nvoid use(void) {\n${uses}\n}\n`;
  for (const [language, standard] of [["c", "c11"], ["c++", "c++17"]] as const) {
    execFileSync(
      "gcc",
      ["-x", language, `-std=${standard}`, "-Wall", "-Wextra", "-pedantic", "-Werror", `-I${root}`]
        .concat(["-fsyntax-only", "-"]),
      { input: source, stdio: ["pipe", "pipe", "pipe"] },
    );
  }
});

test("every struct that a call takes begins with its size", () => {
  const taken = new Set(Object.values(functions).flatMap(({ args }) => args.map(([, type]) => type as string)));
  for (const { name, size, fields } of layouts) {
    if (!taken.has(name)) continue;
    assertEquals(fields[0]?.name, "size", name);
    assertEquals(struct(name).get("size" as never) as unknown, size);
  }
});

test("codes and bits are distinct within a group", () => {
  for (const [group, members] of Object.entries(constants)) {
    const values = Object.values<readonly [number, string]>(members).map(([value]) => value);
    assertEquals(new Set(values).size, values.length, group);
    if (["FEATURE", "FLAG", "BUFFER"].includes(group)) {
      assert(values.every((value) => value > 0 && (value & (value - 1)) === 0), `${group} has a value that is no bit`);
    }
  }
});
