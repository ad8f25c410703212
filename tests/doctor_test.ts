/**
 * The doctor: what it finds on this machine under this runtime, and what it advises in conditions of other machines, each
 * with the words that `EpBuffer.create` has for it there.
 */
import { spawnSync } from "node:child_process";
import { readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import { adviceFor, diagnose, format } from "../scripts/doctor/diagnose.ts";
import type { Facts } from "../scripts/doctor/facts.ts";
import type { Capabilities } from "../lib/device.ts";
import { root } from "./support/compile.ts";
import { runArgs } from "./support/transport.ts";

function run(args: readonly string[], env: Record<string, string> = {}) {
  const all = [...runArgs(join(root, "scripts/doctor.ts")), ...args];
  return spawnSync(process.execPath, all, { encoding: "utf8", timeout: 60_000, env: { ...process.env, ...env } });
}

function doctor(args: readonly string[], env: Record<string, string> = {}): { status: number | null; stdout: string } {
  const { status, stdout, stderr } = run(args, env);
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

test("--help says how it is called, and so does a flag that it does not know", { timeout: 60_000 }, () => {
  const { status, stdout } = doctor(["--help"]);
  assertEquals(status, 0);
  assertStringIncludes(stdout, "Usage: doctor.ts [--json]");
  const wrong = run(["--jsom"]);
  assertEquals([wrong.status, wrong.stdout], [2, ""]);
  for (const words of ["--jsom", "Usage: doctor.ts [--json]"]) assertStringIncludes(wrong.stderr, words);
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

// The messages are those of the library, as the next test sees; the first words of the advice are what must follow.
const gpu = "GPU 0 (NVIDIA H100 80GB HBM3)";
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
    "this library has no code for GPU 0 (Tesla V100-SXM2-16GB), whose compute capability is 7.0: it needs 8.0 or later",
    "use a GPU of compute capability 8.0",
  ],
  [
    "no peer access",
    `${gpu} cannot reach the memory of rank 1 on GPU 1 (NVIDIA H100 80GB HBM3): there is neither NVLink nor PCIe peer access`,
    "put the ranks on GPUs that reach each other",
  ],
  [
    "no MPS",
    `rank 1 in process 4242 shares ${gpu} with this process without CUDA MPS: their kernels would take turns of milliseconds ` +
    "and wait for each other. Start MPS (nvidia-cuda-mps-control -d) before both, put the ranks into one process, or set " +
    "DEEPEP_ALLOW_TIME_SLICING=1",
    "start CUDA MPS",
  ],
  [
    "no CUDA IPC",
    "rank 1 could not make a CUDA IPC handle: put the ranks into one process",
    "run the ranks in one process",
  ],
  [
    "CUDA IPC between containers",
    "the memory of rank 1 could not be mapped on GPU 0: invalid argument (cudaErrorInvalidValue). Ranks in separate processes " +
    "need CUDA IPC: one machine and one container, and GPUs that reach each other (deepep_get_peer_access)",
    "run the ranks in one process; or in processes of one machine and one container",
  ],
  [
    "too little memory of a GPU",
    "the 90194313216 bytes of its symmetric memory are not to be had on GPU 0: 1024 of 85000000000 are free",
    "make the buffer smaller (EpBuffer.sizeHint",
  ],
  ["too little memory of the host", "67108864 bytes of pinned memory are not to be had", "free memory of the host"],
  [
    "too many ranks on a GPU",
    `8 ranks on the device * 32 multiprocessors = 256, but ${gpu} has 132: their kernels could not run at once`,
    "use fewer ranks on the GPU",
  ],
  [
    "a library of another release",
    "Cannot use x.so: its ABI version is 7, this package needs 1",
    "the library and the",
  ],
];

test("the messages are those of the library", () => {
  const folders = ["cuda/host", "lib/ffi"].map((folder) => join(root, folder));
  const files = folders.flatMap((folder) =>
    readdirSync(folder).filter((name) => /\.(cpp|ts)$/.test(name)).map((name) =>
      readFileSync(join(folder, name), "utf8")
    )
  );
  // String literals that follow each other are one. A place for a value takes any, and what has few words of its own says nothing.
  const literals = files.flatMap((text) => text.match(/"(?:[^"\\\n]|\\.)*"(?:\s*"(?:[^"\\\n]|\\.)*")*|`[^`]*`/g) ?? []);
  const patterns = literals
    .map((literal) => literal.slice(1, -1).replace(/"\s*"/g, "").replace(/\\n[^]*/, "").split(/%[a-z]+|\$\{[^}]*\}/))
    .filter((parts) => parts.join("").length > 20)
    .map((parts) => new RegExp(`^${parts.map((part) => part.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join(".+")}$`));
  const invented = conditions.filter(([, message]) => !patterns.some((pattern) => pattern.test(message)));
  assertEquals(invented, []);
});

for (const [name, message, advice] of conditions) {
  test(`advice for ${name} follows from the message of EpBuffer.create`, () => {
    assert(adviceFor(message).startsWith(advice), adviceFor(message));
    const sick: Facts = {
      ...healthy,
      backends: [{ backend: "cuda", device: 0, error: `Cannot create a buffer: ${message}` }],
    };
    const diagnosis = diagnose(sick);
    assertEquals(diagnosis.ok, false);
    assertStringIncludes(format(diagnosis), `✗ cuda on GPU 0: Cannot create a buffer: ${message}\n      -> ${advice}`);
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
  assertStringIncludes(format(bare), "✗ none is seen\n      -> see that nvidia-smi lists a GPU");
  assertStringIncludes(format(diagnose(healthy)), "off: ranks in one process");
});

test("a machine without a GPU has crosses with what to do, and a backend that works", () => {
  const error = "Cannot create a buffer: no NVIDIA driver was found (libcuda.so.1): install one for CUDA 13.0 or later";
  const { kernelDriver: _, ...rest } = healthy;
  const diagnosis = diagnose({
    ...rest,
    gpus: [],
    peers: [],
    backends: [{ backend: "cpu", device: 0 }, { backend: "cuda", device: 0, error }],
  });
  assertEquals(diagnosis.ok, true);
  const text = format(diagnosis);
  assertStringIncludes(
    text,
    "✗ none is loaded: there is no /proc/driver/nvidia/version\n      -> install the NVIDIA driver",
  );
  assertStringIncludes(text, "✗ none is seen\n      -> see that nvidia-smi lists a GPU");
  assertStringIncludes(text, `✗ cuda on GPU 0: ${error}\n      -> install the NVIDIA driver`);
  assertStringIncludes(text, "✓ cpu: a dispatch and combine came back right");
});

test("a GPU that nvidia-smi sees and the library does not has the advice of the backend", () => {
  const error =
    "Cannot create a buffer: the NVIDIA driver is for CUDA 12.4, this library needs one for CUDA 13.0 or later";
  const backends: Facts["backends"] = [{ backend: "cuda", device: 0, error }];
  const text = format(diagnose({ ...healthy, gpus: [], peers: [], nvidiaSmi: ["0, NVIDIA H100, 550.54"], backends }));
  assertStringIncludes(
    text,
    "✗ nvidia-smi sees 0, NVIDIA H100, 550.54; the cuda library does not\n      -> update the NVIDIA driver",
  );
});

test("a question for peer access that fails is a cross with the error", () => {
  const error =
    "Cannot look at the access between devices: CUDA could not ask for peer access: unknown error (cudaErrorUnknown)";
  const gpus = [h100, h100, h100];
  const yes = { access: true, performanceRank: 0 };
  const text = format(diagnose({
    ...healthy,
    gpus,
    peers: [
      { from: 0, to: 1, error },
      { from: 0, to: 2, error },
      { from: 1, to: 0, access: false, performanceRank: 0 },
      { from: 1, to: 2, error },
      { from: 2, to: 0, ...yes },
      { from: 2, to: 1, ...yes },
    ],
  }));
  const advice = "the driver itself fails: see whether nvidia-smi topo -m answers";
  assertStringIncludes(text, `✗ GPU 0: self    ?       ? (${error})\n      -> ${advice}`);
  assertStringIncludes(
    text,
    `✗ GPU 1: NO      self    ? (${error})\n      -> put the ranks on GPUs that reach each other`,
  );
  assertStringIncludes(text, `; ${advice}`);
  assertStringIncludes(text, "✓ GPU 2: yes(0)  yes(0)  self");
});
