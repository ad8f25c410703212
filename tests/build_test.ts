/**
 * The build, on a small tree of its own: what is compiled again and what is not, what `--check` finds, what is refused.
 *
 * In: a copy of the build's scripts with two source files and one header. Out: libraries in temporary folders. The tests are
 * in order: each one changes the tree that the one before has left.
 */

import { spawnSync } from "node:child_process";
import { appendFileSync, cpSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { describe, test } from "node:test";
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import { noCompiler, root, temporaryFolder } from "./support/compile.ts";

const runtime = "Deno" in globalThis ? [process.execPath, "run", "-A", "--no-config"] : [process.execPath];
const library = "lib/native/linux-x64/libdeepep_cpu.so";

/** A tree with a library of one function, which answers what the header says. */
function smallTree(): string {
  const tree = temporaryFolder();
  const copied = ["scripts/build.ts", "scripts/native", "lib/ffi/abi.ts", "lib/native/manifest.ts", "deno.json"];
  for (const path of [...copied, "cuda/compat", "cuda/abi"]) {
    cpSync(join(root, path), join(tree, path), { recursive: true });
  }
  const manifest = readFileSync(join(tree, "lib/native/manifest.ts"), "utf8");
  const empty = "{ abiVersion: 1, sourceHash: {}, compilers: {}, files: {} };\n";
  writeFileSync(
    join(tree, "lib/native/manifest.ts"),
    manifest.replace(/(export const manifest: Manifest = )[^]*/, `$1${empty}`),
  );
  mkdirSync(join(tree, "cuda/cpu"));
  mkdirSync(join(tree, "cuda/api"));
  writeFileSync(join(tree, "cuda/cpu/answer.hpp"), "constexpr int answer = 6;\n");
  writeFileSync(
    join(tree, "cuda/api/answer.cpp"),
    '#include "answer.hpp"\nextern "C" __attribute__((visibility("default"))) int deepep_answer() { return answer; }\n' +
      "int hidden_answer() { return 7; }\n",
  );
  writeFileSync(join(tree, "cuda/cpu/bystander.cpp"), "int bystander() { return 1; }\n");
  return tree;
}

function build(tree: string, ...args: string[]): { status: number | null; output: string } {
  const [program, ...rest] = [...runtime, "scripts/build.ts", ...args] as [string, ...string[]];
  const env = { ...process.env, CUDA_HOME: join(tree, "nowhere"), NO_COLOR: "1" };
  const { status, stdout, stderr } = spawnSync(program, rest, { cwd: tree, env, encoding: "utf8", timeout: 60_000 });
  return { status, output: stdout + stderr };
}

/** When each object was made. */
function objects(tree: string): Map<string, number> {
  const folder = join(tree, "build/cpu");
  const names = readdirSync(folder).filter((name) => name.endsWith(".o"));
  return new Map(names.map((name) => [name.replace(/\.[0-9a-f]+\.o$/, ""), statSync(join(folder, name)).mtimeMs]));
}

/** Builds, and answers which sources were compiled. */
function compiled(tree: string): string[] {
  const before = objects(tree);
  const { status, output } = build(tree, "--backend", "cpu");
  assertEquals([status, status === 0 ? "" : output], [0, ""]);
  return [...objects(tree)].filter(([name, made]) => before.get(name) !== made).map(([name]) => name).sort();
}

describe("the build", { skip: noCompiler }, () => {
  const tree = smallTree();
  const bytes = (): Uint8Array => readFileSync(join(tree, library));

  test("makes what can be made here, and a manifest that the check agrees with", () => {
    assertStringIncludes(build(tree, "--check").output, "libdeepep_cpu.so is not in the manifest");
    const { status, output } = build(tree);
    assertEquals([status, status === 0 ? "" : output], [0, ""]);
    assertStringIncludes(output, "libdeepep_cuda.so is not built");
    assertStringIncludes(build(tree, "--check").output, "The libraries are those of the sources");
  });

  test("compiles nothing again that has not changed", () => {
    const before = bytes();
    assertEquals(compiled(tree), []);
    assertEquals(bytes(), before);
  });

  test("compiles again what includes a changed header, and the check tells before", () => {
    const before = bytes();
    writeFileSync(join(tree, "cuda/cpu/answer.hpp"), "constexpr int answer = 8;\n");
    const check = build(tree, "--check");
    assertEquals(check.status, 1);
    assertStringIncludes(check.output, "libdeepep_cpu.so was built from other sources");
    assertEquals(compiled(tree), ["cuda_api_answer.cpp"]);
    assert(Buffer.compare(before, bytes()) !== 0, "the library has not changed");
    assertEquals(build(tree, "--check").status, 0);
  });

  test("compiles again when a new header could be the one that is included", () => {
    writeFileSync(join(tree, "cuda/api/answer.hpp"), "constexpr int answer = 9;\n");
    assertEquals(compiled(tree).includes("cuda_api_answer.cpp"), true);
  });

  test("makes the same bytes elsewhere", () => {
    const other = join(temporaryFolder(), "another/place");
    for (const path of ["scripts", "lib", "cuda", "deno.json"]) {
      cpSync(join(tree, path), join(other, path), { recursive: true });
    }
    const { status, output } = build(other, "--backend", "cpu", "--out", "out");
    assertEquals([status, status === 0 ? "" : output], [0, ""]);
    assertEquals(readFileSync(join(other, "out/libdeepep_cpu.so")), bytes());
  });

  test("refuses what the same compilers do not make of the same sources, and the check what is not the manifest's", () => {
    const path = join(tree, "lib/native/manifest.ts");
    const text = readFileSync(path, "utf8");
    writeFileSync(path, text.replace(/sha256: "[0-9a-f]{64}"/, `sha256: "${"0".repeat(64)}"`));
    const rebuilt = build(tree, "--backend", "cpu", "--out", "out");
    assertEquals(rebuilt.status, 1);
    assertStringIncludes(rebuilt.output, "but the committed one of the same sources and compilers 000");
    assertStringIncludes(build(tree, "--check").output, "but the manifest says 000");
    writeFileSync(path, text);
    appendFileSync(join(tree, library), "x");
    assertEquals(build(tree, "--check").status, 1);
  });

  test("refuses a file that its recipe does not name, backends that there are not, and parts of a release", () => {
    mkdirSync(join(tree, "cuda/other"));
    writeFileSync(join(tree, "cuda/other/answer.hpp"), "constexpr int more = 1;\n");
    appendFileSync(join(tree, "cuda/api/answer.hpp"), '#include "cuda/other/answer.hpp"\n');
    const refused = (words: string, ...args: string[]): void => {
      const { status, output } = build(tree, ...args);
      assertEquals(status, 1);
      assertStringIncludes(output, words);
    };
    refused("includes cuda/other/answer.hpp, which its recipe does not name", "--backend", "cpu");
    refused("Cannot build gpu: there are cpu, cuda", "--backend", "gpu");
    refused("nowhere has no bin/nvcc", "--backend", "cuda");
    refused("say with --out where", "--arch", "sm_90");
  });
});
