/** scripts/serve.ts as it is run: it asks itself and gets every row back, answers others, refuses nonsense, ends when told. */
import { Buffer } from "node:buffer";
import { createServer } from "node:http";
import { type AddressInfo, connect, type Socket } from "node:net";
import process from "node:process";
import { test } from "node:test";
import { assert, assertEquals, assertMatch } from "@std/assert";
import type { FromLoad, Load, LoadReport } from "../scripts/serve/load.ts";
import { exactRow, route } from "../scripts/serve/messages.ts";
import { bounded, startChild, until } from "./support/group_worlds.ts";
import { Random } from "./support/random.ts";

const SHAPE = { ranks: 2, tokens: 6, hidden: 256, experts: 10, topk: 3 };
const flags = Object.entries(SHAPE).flatMap(([name, value]) => [`--${name}`, String(value)]);
const start = (...more: string[]) =>
  startChild("scripts/serve.ts", ["--backend", "cpu", "--port", "0", ...flags, ...more]);

test("serve: clients get their rows back from decode steps, and delays are measured", bounded, async () => {
  const child = start("--load", "3", "--seconds", "2"), { code } = await child.ended;
  assertEquals(code, 0, child.output.stderr);
  const report = JSON.parse(child.output.stdout);
  const { serve, backend, ranks, wrong, errors, failures, maskedRanks, requests, steps, eventLoopDelay } = report;
  assertEquals([serve, backend, ranks, wrong, errors, failures, maskedRanks], ["passed", "cpu", 2, 0, 0, 0, []]);
  assert(requests > 10 && steps > 10 && report.stepsPerSecond > 0, child.output.stdout);
  assertEquals(eventLoopDelay.workers.length, 2);
  for (const { count, p50, p99, max } of [eventLoopDelay.main, ...eventLoopDelay.workers]) {
    assert(count > 100 && p50 >= 0 && p50 <= p99 && p99 <= max && max > 0, child.output.stdout);
  }
  assertEquals(report.mainUnder1Ms, eventLoopDelay.main.p99 < 1);
  assertEquals([report.rate, report.latencyMs.count], [0, requests]);
});

test("serve: requests come at the rate that is asked for, and count from their time on", bounded, async () => {
  const child = start("--load", "4", "--rate", "40", "--seconds", "2"), { code } = await child.ended;
  assertEquals(code, 0, child.output.stderr);
  const { serve, rate, requests, requestsPerSecond, latencyMs } = JSON.parse(child.output.stdout);
  assertEquals([serve, rate, requestsPerSecond, latencyMs.count], ["passed", 40, Math.round(requests / 2), requests]);
  assert(requests > 20 && requests <= 81, child.output.stdout);
});

test("serve: a request that had to wait for slow answers before it was slow itself", bounded, async () => {
  const slow = createServer(async (request, response) => {
    const body: Uint8Array[] = [];
    for await (const chunk of request) body.push(chunk);
    setTimeout(() => response.end(Buffer.concat(body)), 100);
  });
  await new Promise<void>((resolve) => slow.listen(0, "127.0.0.1", () => resolve()));
  const worker = new Worker(new URL("../scripts/serve/load.ts", import.meta.url), { type: "module" });
  const heard = () => new Promise<FromLoad>((resolve) => worker.onmessage = ({ data }) => resolve(data));
  assertEquals(await heard(), "listening");
  const url = `http://127.0.0.1:${(slow.address() as AddressInfo).port}`;
  const load: Load = { url, clients: 1, rate: 100, warmupSeconds: 0, seconds: 1, hidden: 16, tokens: 1 };
  worker.postMessage(load);
  assertEquals(await heard(), "warm");
  const { requests, wrong, errors, latencyMs } = await heard() as LoadReport;
  worker.terminate();
  slow.close();
  assertEquals([wrong, errors], [0, 0]);
  assert(requests >= 2 && requests <= 11, `${requests} answers of 100 ms in a second`);
  // The last of n was due after 10 (n - 1) ms, and was answered after 100 n; timers may be early.
  assert(
    latencyMs.max >= 98 * requests - 10 * (requests - 1), // timers may be early
    `${requests} answers, the last after ${latencyMs.max} ms`,
  );
});

test("serve: it answers while steps run, refuses what makes no sense, and ends when it is told", bounded, async () => {
  const child = start();
  await until(() => child.output.stderr.includes("\n"), "the server");
  const url = /listening on (\S+)/.exec(child.output.stderr)![1]!;
  const post = (body: Uint8Array<ArrayBuffer>) => fetch(`${url}/generate`, { method: "POST", body });
  const random = new Random(1), rows = Array.from({ length: 4 }, () => exactRow(SHAPE.hidden, () => random.float()));
  const sent = new Uint16Array(4 * SHAPE.hidden);
  rows.forEach((row, i) => sent.set(row, i * SHAPE.hidden));
  const answers = await Promise.all(Array.from({ length: 8 }, () => post(new Uint8Array(sent.buffer))));
  for (const answer of answers) assertEquals(new Uint16Array(await answer.arrayBuffer()), sent);
  const before = await (await fetch(`${url}/metrics`)).json();
  await new Promise((resolve) => setTimeout(resolve, 100));
  const after = await (await fetch(`${url}/metrics`)).json();
  assert(after.steps > before.steps, "steps go on without requests");
  assertEquals([after.requests, after.failures, after.maskedRanks], [8, 0, []]);
  const tooLong = new Uint8Array(2 * SHAPE.hidden * 7), chunked = { method: "POST", duplex: "half" };
  const stream = (...chunks: Uint8Array[]) => new Blob(chunks as Uint8Array<ArrayBuffer>[]).stream();
  const refused = [
    await post(new Uint8Array(10)),
    await post(new Uint8Array(0)),
    await post(tooLong),
    await fetch(`${url}/generate`, { ...chunked, body: stream(tooLong) }),
    await fetch(url),
  ];
  assertEquals(refused.map(({ status }) => status), [400, 400, 413, 413, 404]);
  for (const response of refused) await response.body?.cancel();
  const whole = await fetch(`${url}/generate`, { ...chunked, body: stream(new Uint8Array(sent.buffer)) });
  assertEquals(new Uint16Array(await whole.arrayBuffer()), sent);
  const idle = connect(Number(new URL(url).port), "127.0.0.1"); // holds up nobody
  idle.on("error", () => {});
  await new Promise<void>((resolve) => idle.once("connect", () => resolve()));
  process.kill(child.process.pid!, "SIGTERM"); // by the process: Deno takes a child that it signals itself for killed
  assertEquals(await child.ended, { code: 0, signal: null }, child.output.stderr);
  idle.destroy();
});

test("serve: more requests than have room are refused, whether or not they come to an end", bounded, async () => {
  const child = start();
  await until(() => child.output.stderr.includes("\n"), "the server");
  const url = /listening on (\S+)/.exec(child.output.stderr)![1]!, { port } = new URL(url);
  const status = async () => {
    const response = await fetch(`${url}/metrics`);
    await response.body?.cancel();
    return response.status;
  };
  const half = "POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 512\r\n\r\nsome";
  const stalled: Socket[] = [];
  while (stalled.length < 256) { // one after another: a burst may be more than the system keeps for the server
    const socket = connect(Number(port), "127.0.0.1").on("error", () => {});
    await new Promise<void>((resolve) => socket.once("connect", () => resolve()));
    socket.write(half);
    stalled.push(socket);
  }
  await until(async () => await status() === 503, "a refusal");
  for (const socket of stalled.splice(1)) socket.destroy();
  await until(async () => await status() === 200, "room");
  process.kill(child.process.pid!, "SIGTERM"); // the one that is left is not waited for
  assertEquals(await child.ended, { code: 0, signal: null }, child.output.stderr);
  stalled[0]!.destroy();
});

test("serve: flags that make no sense end it with 1", bounded, async () => {
  const child = start("--hidden", "none"), { code } = await child.ended;
  assertEquals([code, child.output.stdout], [1, ""]);
  assertMatch(child.output.stderr, /--hidden is none, needs a whole number from 1/);
});

test("serve: a row's experts differ, and its weights sum up to 1", () => {
  const random = new Random(2);
  for (const [experts, topk] of [[10, 3], [8, 8], [256, 8], [5, 1]] as const) {
    const shape = { tokens: 1, hidden: 16, experts, topk };
    for (let i = 0; i < 50; i++) {
      const idx = new Int32Array(topk), weights = new Float32Array(topk);
      route(random.bf16(16), shape, idx, weights);
      assertEquals(new Set(idx).size, topk);
      assert(idx.every((expert) => expert >= 0 && expert < experts));
      assertEquals(weights.reduce((a, b) => a + b), 1);
    }
  }
});
