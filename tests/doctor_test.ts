/**
 * The doctor: what it finds on this machine under this runtime, and what it advises in conditions of other machines, each
 * with the words that `EpBuffer.create` has for it there.
 */
import { spawnSync } from "node:child_process";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import { adviceFor, diagnose, format } from "../scripts/doctor/diagnose.ts";
import type { Facts } from "../scripts/doctor/facts.ts";
import type { Capabilities } from "../lib/device.ts";
import { root } from "./support/compile.ts";
import { runArgs } from "./support/transport.ts";

function doctor(args: readonly string[], env: Record<string, string> = {}): { status: number | null; stdout: string } {
  const { status, stdout, stderr } = spawnSync(
    process.execPath,
    [...runArgs(join(root, "scripts/doctor.ts")), ...args],
    { encoding: "utf8", timeout: 60_000, env: { ...process.env, ...env } },
  );
  assertEquals(stderr, "");
  return { status, stdout };
}

const none = { DEEPEP_LIBRARY_CPU: "/nowhere/cpu.so", DEEPEP_LIBRARY_CUDA: "/nowhere/cuda.so" };

test("on this machine the cpu backend works, and the report says so", { timeout: 60_000 }, () => {
  const { status, stdout } = doctor([]);
  assertEquals(status, 0);
  for (const words of ["✓ cpu: a dispatch and combine came back right", "may open libraries", "A backend works here"]) {
    assertStringIncludes(stdout, words);
  }
});

test("with --json it prints facts and findings", { timeout: 60_000 }, () => {
  const { stdout } = doctor(["--json"]);
  const { ok, sections, facts } = JSON.parse(stdout) as ReturnType<typeof diagnose> & { facts: Facts };
  assertEquals(ok, true);
  assertEquals(sections[0]!.title, "Runtime");
  assertEquals(facts.libraries.map(({ backend }) => backend), ["cpu", "cuda", "nvshmem"]);
  assertEquals(facts.backends[0], { backend: "cpu", device: 0 });
});

test("where no backend works it exits with 1 and says what was looked for", { timeout: 60_000 }, () => {
  const { status, stdout } = doctor([], none);
  assertEquals(status, 1);
  assertStringIncludes(stdout, "✗ cpu: Cannot find libdeepep_cpu.so: DEEPEP_LIBRARY_CPU names /nowhere/cpu.so");
  assertStringIncludes(stdout, "No backend works here");
});

const h100: Capabilities = {
  backend: "cuda",
  name: "NVIDIA H100 80GB HBM3",
  numDevices: 2,
  numSms: 132,
  computeCapability: 90,
  totalBytes: 85_000_000_000,
  driverVersion: "13.0",
  mps: false,
  maxRanks: 64,
  features: 0,
};
const healthy: Facts = {
  runtime: "Bun 1.4.5, linux-x64",
  ffi: "granted",
  kernelDriver: "NVIDIA UNIX x86_64 Kernel Module 580.65",
  libraries: [{ backend: "cuda", path: "/lib/cuda.so", bytes: 3, sha256: "aa", wanted: "aa" }],
  backends: [{ backend: "cpu", device: 0 }, { backend: "cuda", device: 0 }],
  gpus: [h100, h100],
  peers: [{ from: 0, to: 1, access: true, performanceRank: 0 }, { from: 1, to: 0, access: true, performanceRank: 0 }],
  nvshmem: ["/usr/lib/libnvshmem_host.so.3"],
};

test("a healthy machine has no cross, and two GPUs show how they reach each other", () => {
  const text = format(diagnose(healthy));
  assertEquals(text.includes("✗"), false, text);
  assertStringIncludes(text, "✓ GPU 0: NVIDIA H100 80GB HBM3, 132 SMs, 79.2 GiB, compute capability 9.0");
  assertStringIncludes(text, "✓ GPU 1: yes(0)  self");
  assertStringIncludes(text, "✓ the driver is for CUDA 13.0");
});

// The messages are those of the library; the first words of the advice are what must follow.
const conditions: [string, string, string][] = [
  [
    "no driver",
    "no NVIDIA driver was found (libcuda.so.1): install one for CUDA 13.0 or later, or take the cpu backend",
    "install the NVIDIA driver",
  ],
  [
    "an old driver",
    "the NVIDIA driver is for CUDA 12.4, this library needs one for CUDA 13.0 or later",
    "update the NVIDIA driver",
  ],
  [
    "no GPU",
    "there is a driver, but no GPU that this process may use (is CUDA_VISIBLE_DEVICES empty?)",
    "see that nvidia-smi lists a GPU",
  ],
  [
    "a wrong architecture",
    "this library has no code for GPU 0 (Tesla V100), whose compute capability is 7.0: it needs 8.0 or later",
    "use a GPU of compute capability 8.0",
  ],
  ["no peer access", "GPU 0 has no peer access to GPU 1", "put the ranks on GPUs that reach each other"],
  ["no MPS", "ranks 0 and 1 are processes that share GPU 0 without CUDA MPS", "start CUDA MPS"],
  [
    "a library of another release",
    "Cannot use x.so: its ABI version is 7, this package needs 1",
    "the library and the",
  ],
];

for (const [name, message, advice] of conditions) {
  test(`advice for ${name} follows from the message of EpBuffer.create`, () => {
    assert(adviceFor(message).startsWith(advice), adviceFor(message));
    const sick: Facts = { ...healthy, backends: [{ backend: "cuda", device: 0, error: `Cannot create: ${message}` }] };
    const diagnosis = diagnose(sick);
    assertEquals(diagnosis.ok, false);
    assertStringIncludes(format(diagnosis), `✗ cuda on GPU 0: Cannot create: ${message}\n      -> ${advice}`);
  });
}

test("facts about GPUs get the same advice as the messages", () => {
  const old = diagnose({ ...healthy, gpus: [{ ...h100, computeCapability: 70 }] });
  const split = diagnose({ ...healthy, peers: [{ from: 0, to: 1, access: false, performanceRank: 0 }] });
  const bare = diagnose({ ...healthy, gpus: [], backends: [{ backend: "cpu", device: 0 }] });
  assertStringIncludes(
    format(old),
    `✗ GPU 0: NVIDIA H100 80GB HBM3, 132 SMs, 79.2 GiB, compute capability 7.0\n      -> use a GPU`,
  );
  assertStringIncludes(format(split), "✗ GPU 0: self    NO\n      -> put the ranks on GPUs that reach each other");
  assertStringIncludes(format(bare), "· none is seen\n      -> see that nvidia-smi lists a GPU");
  assertStringIncludes(format(diagnose(healthy)), "off: ranks in one process");
});
