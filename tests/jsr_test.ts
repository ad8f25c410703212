/**
 * The package as its users get it: from JSR in Deno, from node_modules in Bun.
 *
 * In: a registry on this machine that serves the working tree. A program imports the package, the library is fetched,
 * verified, cached and used; a second run needs neither net nor write permission; tampered bytes are refused.
 */

import { execFile } from "node:child_process";
import { cpSync, existsSync, readdirSync, writeFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import { manifest } from "../lib/native/manifest.ts";
import { root, temporaryFolder } from "./support/compile.ts";
import { config, packageFiles, startJsr } from "./support/jsr_mock.ts";

const library = `${process.platform}-${process.arch}/libdeepep_cpu.so`;
const deno = join(root, "node_modules/.bin/deno");
const bun = join(root, "node_modules/.bin/bun");
const missing = !existsSync(join(root, "lib/native", library))
  ? `there is no ${library}`
  : [deno, bun].filter((path) => !existsSync(path)).map((path) => `there is no ${path}`)[0] ?? false;

const program = (specifier: string): string =>
  `import { EpBuffer, Group } from ${JSON.stringify(specifier)};
await using buffer = await EpBuffer.create(Group.local(1)[0]!, {
  backend: "cpu", hidden: 8, numExperts: 1, numTopk: 1, maxTokensPerRank: 1,
});
using x = buffer.tensor("bf16", [1, 8], new Float32Array(8).fill(3));
using topkIdx = buffer.tensor("i32", [1, 1], Int32Array.of(0));
using recv = await buffer.dispatch(x, { topkIdx });
console.log("received", [...await recv.x.read()].slice(0, 8).join());
`;
const received = `received ${Array<number>(8).fill(0x4040).join()}`;

interface Outcome {
  status: number;
  output: string;
}

function run(command: string, args: string[], cwd: string, env: Record<string, string>): Promise<Outcome> {
  const { DEEPEP_LIBRARY_CPU: _, ...rest } = process.env;
  return new Promise((resolve) => {
    execFile(command, args, { cwd, env: { ...rest, NO_COLOR: "1", ...env }, timeout: 120_000 }, (error, out, err) => {
      resolve({ status: error ? 1 : 0, output: out + err });
    });
  });
}

test("from JSR: fetch, verify, cache; then without net", { skip: missing, timeout: 240_000 }, async () => {
  await using jsr = await startJsr();
  const [folder, denoDir, cache] = [temporaryFolder(), temporaryFolder(), temporaryFolder()];
  writeFileSync(join(folder, "program.ts"), program(`jsr:${config.name}@${config.version}`));
  const env = { JSR_URL: jsr.url, DENO_DIR: denoDir, XDG_CACHE_HOME: cache };
  const always = ["run", "--no-lock", "--no-prompt", `--allow-ffi=${cache}`, `--allow-read=${cache}`]
    .concat("--allow-env=DEEPEP_LIBRARY_CPU,XDG_CACHE_HOME,HOME");
  const first = [...always, `--allow-net=${jsr.host}`, `--allow-write=${cache}`, "program.ts"];
  const libraryRequests = (): number => jsr.requests.filter((path) => path.endsWith(".so")).length;

  jsr.tamper = true;
  const tampered = await run(deno, first, folder, env);
  assertEquals(tampered.status, 1, tampered.output);
  assertStringIncludes(tampered.output, "LibraryError");
  assertStringIncludes(tampered.output, `but the manifest says ${manifest.files[library]!.sha256}`);
  assertEquals(readdirSync(cache), []);

  jsr.tamper = false;
  const good = await run(deno, first, folder, env);
  assertStringIncludes(good.output, received);
  assertEquals([good.status, libraryRequests()], [0, 2]);

  const again = await run(deno, [...always, "program.ts"], folder, env);
  assertStringIncludes(again.output, received);
  assertEquals([again.status, libraryRequests()], [0, 2]);
});

test("from node_modules: the library lies beside the package", { skip: missing, timeout: 240_000 }, async () => {
  const folder = temporaryFolder();
  const home = join(folder, "node_modules", config.name);
  for (const path of packageFiles()) cpSync(join(root, path), join(home, path));
  writeFileSync(join(home, "package.json"), JSON.stringify({ name: config.name, type: "module", exports: "./mod.ts" }));
  writeFileSync(join(folder, "program.ts"), program(config.name));
  const { status, output } = await run(bun, ["run", "program.ts"], folder, { XDG_CACHE_HOME: folder });
  assertStringIncludes(output, received);
  assertEquals(status, 0);
  assert(!existsSync(join(folder, "deepep")), "nothing is cached");
});
