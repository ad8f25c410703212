/**
 * How the file of a library is found: option, environment, beside the package, cache, download.
 *
 * In: a server on this machine that counts its requests, and a cache folder of this test. Every wrong turn must end in an
 * error that lists what was tried; nothing unverified may be kept or used.
 */

import { createHash } from "node:crypto";
import { chmodSync, existsSync, mkdirSync, readdirSync, readFileSync, statSync, writeFileSync } from "node:fs";
import { createServer } from "node:http";
import type { AddressInfo } from "node:net";
import { join } from "node:path";
import process from "node:process";
import { after, before, beforeEach, test } from "node:test";
import { pathToFileURL } from "node:url";
import { assert, assertEquals, assertMatch, assertRejects, assertStringIncludes } from "@std/assert";
import { LibraryError } from "../lib/error.ts";
import { locate, type Place, placeOf } from "../lib/ffi/locate.ts";
import { temporaryFolder } from "./support/compile.ts";

const sha256 = (data: string): string => createHash("sha256").update(data).digest("hex");
const body = "a library";
const name = "libdeepep_test.so";
const variables = ["DEEPEP_LIBRARY_TEST", "XDG_CACHE_HOME", "HOME"] as const;
const kept = Object.fromEntries(variables.map((name) => [name, process.env[name]]));

let served = body;
let status = 200;
let numRequests = 0;
const server = createServer((_, response) => {
  numRequests++;
  response.writeHead(status).end(served);
});
let cache = "";

before(() => new Promise<void>((resolve) => void server.listen(0, "127.0.0.1", resolve)));
after(() => {
  for (const [name, value] of Object.entries(kept)) setEnv(name, value);
  return new Promise<void>((resolve) => void server.close(() => resolve()));
});
beforeEach(() => {
  [served, status, numRequests, cache] = [body, 200, 0, temporaryFolder()];
  setEnv("DEEPEP_LIBRARY_TEST", undefined);
  setEnv("XDG_CACHE_HOME", cache);
});

function setEnv(name: string, value: string | undefined): void {
  if (value === undefined) delete process.env[name];
  else process.env[name] = value;
}

function place(overrides: Partial<Place> = {}): Place {
  return {
    name,
    platform: "linux-x64",
    env: "DEEPEP_LIBRARY_TEST",
    url: new URL(`http://127.0.0.1:${(server.address() as AddressInfo).port}/1.0.0/${name}`),
    sha256: sha256(body),
    advice: "Do something",
    ...overrides,
  };
}

const cached = (): string => join(cache, "deepep", sha256(body).slice(0, 16), name);

test("a backend's place follows from its name", () => {
  const { name, env, url, platform } = placeOf("cuda");
  assertEquals([name, env], ["libdeepep_cuda.so", "DEEPEP_LIBRARY_CUDA"]);
  assert(url.href.endsWith(`/lib/native/${platform}/libdeepep_cuda.so`), url.href);
});

test("the option goes before the environment, the environment before the rest", async () => {
  const folder = temporaryFolder();
  const [first, second, beside] = ["1.so", "2.so", "3.so"].map((name) => join(folder, name)) as [
    string,
    string,
    string,
  ];
  for (const file of [first, second, beside]) writeFileSync(file, body);
  const here = place({ url: pathToFileURL(beside) });
  setEnv("DEEPEP_LIBRARY_TEST", second);
  assertEquals(await locate(here, first), first);
  assertEquals(await locate(here), second);
  setEnv("DEEPEP_LIBRARY_TEST", "");
  assertEquals(await locate(here), beside);
  assertEquals(numRequests, 0);
});

test("a file beside the package that is not this release's is refused", async () => {
  const file = join(temporaryFolder(), name);
  writeFileSync(file, body.slice(1)); // truncated
  const error = await assertRejects(() => locate(place({ url: pathToFileURL(file) })), LibraryError, "SHA-256");
  for (const words of [file, sha256(body), sha256(body.slice(1)), "DEEPEP_LIBRARY_TEST"]) {
    assert(error.message.includes(words), error.message);
  }
});

test("a file that its user names is taken or refused, never replaced", async () => {
  const none = join(temporaryFolder(), "none.so");
  await assertRejects(
    () => locate(place(), none),
    LibraryError,
    `the option library names ${none}, which does not exist`,
  );
  setEnv("DEEPEP_LIBRARY_TEST", none);
  await assertRejects(() => locate(place()), LibraryError, `DEEPEP_LIBRARY_TEST names ${none}, which does not exist`);
  assertEquals(numRequests, 0);
});

test("a remote library is fetched once, then comes from the cache", async () => {
  assertEquals(await locate(place()), cached());
  assertEquals(readFileSync(cached(), "utf8"), body);
  assertEquals(statSync(cached()).mode & 0o777, 0o755);
  served = "something else";
  assertEquals(await locate(place()), cached());
  assertEquals(numRequests, 1);
  assertEquals(readdirSync(join(cached(), "..")), [name]);
});

test("without XDG_CACHE_HOME the cache is ~/.cache", async () => {
  setEnv("XDG_CACHE_HOME", undefined);
  setEnv("HOME", cache);
  assertEquals(await locate(place()), join(cache, ".cache/deepep", sha256(body).slice(0, 16), name));
});

test("many at once agree, and leave one file", async () => {
  assertEquals(new Set(await Promise.all(Array.from({ length: 16 }, () => locate(place())))), new Set([cached()]));
  assertEquals(readdirSync(join(cached(), "..")), [name]);
});

test("a cached file that was damaged is fetched again", async () => {
  await locate(place());
  writeFileSync(cached(), "damaged");
  assertEquals(await locate(place()), cached());
  assertEquals([numRequests, readFileSync(cached(), "utf8")], [2, body]);
});

test("a download with the wrong hash is refused and not kept", async () => {
  served = "tampered";
  const error = await assertRejects(() => locate(place()), LibraryError);
  for (const text of [sha256("tampered"), sha256(body), "8 bytes", "nothing was kept", cached(), "Do something"]) {
    assertStringIncludes(error.message, text);
  }
  assertEquals(existsSync(join(cache, "deepep")), false);
});

test("the error lists everything that was tried", async () => {
  status = 404;
  const error = await assertRejects(() => locate(place()), LibraryError);
  assertEquals(error.message.split("\n").map((line) => line.trim()), [
    `Cannot find ${name}, tried:`,
    "the option library: not given",
    "DEEPEP_LIBRARY_TEST: not set",
    `${cached()}: no such file`,
    `${place().url}: status 404`,
    "Do something",
  ]);
  const beside = pathToFileURL(join(cache, name));
  const local = await assertRejects(() => locate(place({ url: beside, sha256: undefined })), LibraryError);
  assertStringIncludes(local.message, `${join(cache, name)}: no such file`);
  assertStringIncludes(local.message, `the manifest of this release: no ${name} for linux-x64`);
});

test("no cache folder, or one that cannot be written, is an error that says so", async () => {
  const file = join(cache, "a file");
  writeFileSync(file, "");
  setEnv("XDG_CACHE_HOME", file);
  assertMatch((await assertRejects(() => locate(place()), LibraryError)).message, /ENOTDIR|EEXIST|not a directory/i);
  const readOnly = join(cache, "read-only");
  mkdirSync(readOnly);
  chmodSync(readOnly, 0o500);
  setEnv("XDG_CACHE_HOME", readOnly);
  if (process.getuid?.() !== 0) await assertRejects(() => locate(place()), LibraryError, "EACCES");
  setEnv("XDG_CACHE_HOME", undefined);
  setEnv("HOME", undefined);
  await assertRejects(() => locate(place()), LibraryError, "neither XDG_CACHE_HOME nor HOME is set");
});
