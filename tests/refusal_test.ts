/**
 * What `EpBuffer.create` says on machines that the CUDA backend cannot run on, and that the doctor's advice for these very words
 * names the cure. Only an emulated device can be made one that does not do, so scripts/check.ts runs this, and no GPU machine.
 */
import { spawnSync } from "node:child_process";
import { join } from "node:path";
import process from "node:process";
import { test } from "node:test";
import { assert, assertEquals, assertStringIncludes } from "@std/assert";
import { adviceFor, type Diagnosis } from "../scripts/doctor/diagnose.ts";
import type { Facts } from "../scripts/doctor/facts.ts";
import { root } from "./support/compile.ts";
import { notEmulated } from "./support/cuda.ts";
import { suite } from "./support/suite.ts";
import { runArgs } from "./support/transport.ts";

/** A machine that does not do, and what is said there. */
interface Machine {
  readonly env: Readonly<Record<string, string>>;
  /** Ranks of one process. Default 1. */
  readonly ranks?: number;
  /** Whether each rank has a process of its own. */
  readonly processes?: true;
  readonly code: string;
  /** What each rank says, by its number and the other's. */
  readonly says: (rank: number, other: number) => string;
  /** What the advice has among its words. */
  readonly cure: string;
}

const gpu = (index: number): string => `GPU ${index} (emulated device)`;

const machines: Readonly<Record<string, Machine>> = {
  "no driver": {
    env: { EMULATED_DRIVER_VERSION: "0" },
    code: "system",
    says: () =>
      "no NVIDIA driver was found (libcuda.so.1): install one for CUDA 13.0 or later, or take the cpu backend",
    cure: "install the NVIDIA driver",
  },
  "a driver that is too old": {
    env: { EMULATED_DRIVER_VERSION: "12040" },
    code: "system",
    says: () => "the NVIDIA driver is for CUDA 12.4, this library needs one for CUDA 13.0 or later",
    cure: "update the NVIDIA driver",
  },
  "no GPU": {
    env: { EMULATED_DEVICES: "0" },
    code: "system",
    says: () => "there is a driver, but no GPU that this process may use (is CUDA_VISIBLE_DEVICES empty?)",
    cure: "CUDA_VISIBLE_DEVICES does not hide it",
  },
  "a GPU that is too old": {
    env: { EMULATED_COMPUTE_CAPABILITY: "75" },
    code: "unsupported",
    says: () => `this library has no code for ${gpu(0)}, whose compute capability is 7.5: it needs 8.0 or later`,
    cure: "use a GPU of compute capability 8.0 or later",
  },
  "two GPUs that do not reach each other": {
    env: { EMULATED_DEVICES: "2", EMULATED_PEER_ACCESS: "0" },
    ranks: 2,
    code: "unsupported",
    says: (rank, other) =>
      `${gpu(rank)} cannot reach the memory of rank ${other} on ${gpu(other)}: ` +
      "there is neither NVLink nor PCIe peer access",
    cure: "put the ranks on GPUs that reach each other",
  },
  "two GPUs of which nobody knows whether they reach each other": {
    env: { EMULATED_DEVICES: "2", EMULATED_PEER_ACCESS: "2" },
    ranks: 2,
    code: "system",
    says: () => "CUDA could not ask for peer access: the emulated device says so (cudaErrorNotSupported)",
    cure: "the driver itself fails",
  },
  "two processes on a GPU without MPS": {
    env: {},
    processes: true,
    code: "unsupported",
    says: (_, other) =>
      `rank ${other} in process N shares ${
        gpu(0)
      } with this process without CUDA MPS: their kernels would take turns of ` +
      "milliseconds and wait for each other. Start MPS (nvidia-cuda-mps-control -d) before both, put the ranks into one " +
      "process, or set DEEPEP_ALLOW_TIME_SLICING=1",
    cure: "start CUDA MPS (nvidia-cuda-mps-control -d)",
  },
  "two processes where the driver has no CUDA IPC": {
    env: { EMULATED_MPS: "1" },
    processes: true,
    code: "unsupported",
    says: (_, other) => `rank ${other} could not make a CUDA IPC handle: put the ranks into one process`,
    cure: "run the ranks in one process",
  },
  "two processes that do not reach each other by CUDA IPC": {
    env: { DEEPEP_ALLOW_TIME_SLICING: "1", EMULATED_IPC: "1" },
    processes: true,
    code: "system",
    says: (_, other) =>
      `the memory of rank ${other} could not be mapped on GPU 0: the emulated device says so (cudaErrorNotSupported). Ranks ` +
      "in separate processes need CUDA IPC: one machine and one container, and GPUs that reach each other " +
      "(deepep_get_peer_access)",
    cure: "processes of one machine and one container",
  },
  "a host with too little memory": {
    env: { EMULATED_MEMORY_MB: "1" },
    code: "outOfMemory",
    says: () => "there is no pinned memory",
    cure: "free memory of the host",
  },
  "a GPU with too little memory": {
    env: { EMULATED_MEMORY_MB: "16" }, // enough for what is pinned, which is emulated as memory of the device
    code: "outOfMemory",
    says: () => "the N bytes of its symmetric memory are not to be had on GPU 0: N of N are free",
    cure: "make the buffer smaller",
  },
};

interface Said {
  readonly rank: number;
  readonly code: string;
  readonly message: string;
}

/** The output of a program on a machine. */
function run(machine: Machine, file: string, args: readonly string[]): string {
  // How the surrounding tests have it must not count.
  const { DEEPEP_ALLOW_TIME_SLICING: _, WORLD_SIZE: __, ...ours } = process.env;
  const all = [...runArgs(join(root, file)), ...args];
  const env = { ...ours, ...machine.env };
  const { status, stdout, stderr } = spawnSync(process.execPath, all, { encoding: "utf8", timeout: 50_000, env });
  assertEquals([status, stderr], [0, ""]);
  return stdout;
}

/** What a rank says, from the beginning. Each is created before they are connected. */
const wholly = (machine: Machine, rank: number): string =>
  `Cannot ${machine.processes || machine.ranks ? "connect" : "create a buffer"}: ${machine.says(rank, 1 - rank)}`;

/** What became of `EpBuffer.create` on each rank. */
function create(machine: Machine): Said[] {
  const child = "tests/support/refusal_child.ts";
  const output = machine.processes
    ? run(machine, "scripts/launch.ts", ["--ranks", "2", "--no-prefix", join(root, child)])
    : run(machine, child, [String(machine.ranks ?? 1)]);
  return output.trim().split("\n").map((line) => JSON.parse(line) as Said).sort((a, b) => a.rank - b.rank);
}

/** Numbers that are this run's: of processes, and of bytes. */
const settled = (text: string): string =>
  text.replace(/(?<=process )\d+/g, "N").replace(/\d+(?= bytes| of)/g, "N").replace(/(?<= of )\d+/g, "N");

suite("cuda: refusals", notEmulated, () => {
  for (const [name, machine] of Object.entries(machines)) {
    test(`${name}: create says what is wrong, and the doctor what to do`, { timeout: 60_000 }, () => {
      const all = create(machine);
      assertEquals(all.length, machine.processes ? 2 : machine.ranks ?? 1);
      for (const { rank, code, message } of all) {
        assertEquals([code, settled(message)], [machine.code, wholly(machine, rank)]);
        assertStringIncludes(adviceFor(message), machine.cure);
      }
    });
  }

  // One process is what the doctor tries; of other machines it tells what it sees of them.
  for (const name of ["no driver", "a driver that is too old", "no GPU", "a GPU that is too old"]) {
    test(`${name}: the doctor itself says so, and that the cpu backend works`, { timeout: 60_000 }, () => {
      const machine = machines[name]!;
      const { ok, sections, facts } = JSON.parse(run(machine, "scripts/doctor.ts", ["--json"])) as
        & Diagnosis
        & { facts: Facts };
      const [, { error } = {}] = facts.backends;
      assertEquals([ok, error], [true, wholly(machine, 0)]);
      const [cpu, cuda] = sections.find(({ title }) => title === "Backends")!.lines;
      assertEquals([cpu!.ok, cuda!.ok, cuda!.text], [true, false, `cuda on GPU 0: ${error}`]);
      assertStringIncludes(cuda!.advice!, machine.cure);
      const gpus = sections.find(({ title }) => title === "GPUs")!.lines;
      assert(gpus.every((line) => line.ok === false && line.advice), JSON.stringify(gpus));
    });
  }

  test("peer access that is missing or unknown: the doctor shows it", { timeout: 60_000 }, () => {
    const missing = run(machines["two GPUs that do not reach each other"]!, "scripts/doctor.ts", []);
    assertStringIncludes(missing, "✗ GPU 1: NO      self\n      -> put the ranks on GPUs that reach each other");
    const unknown = run(
      machines["two GPUs of which nobody knows whether they reach each other"]!,
      "scripts/doctor.ts",
      [],
    );
    const error = "CUDA could not ask for peer access: the emulated device says so (cudaErrorNotSupported)";
    assertStringIncludes(unknown, "✗ GPU 1: ?       self (");
    assertStringIncludes(unknown, `${error})\n      -> the driver itself fails`);
  });
});
