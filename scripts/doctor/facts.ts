/**
 * What the doctor finds on a machine: facts, without judgement.
 *
 * In: the environment, the libraries, the driver. Out: a plain object, which `--json` prints and diagnose.ts reads. Every look
 * is bounded and none throws: what cannot be looked at is absent, or carries the words of the refusal.
 */
import { execFile } from "node:child_process";
import { createHash } from "node:crypto";
import { existsSync, readdirSync, readFileSync } from "node:fs";
import { join } from "node:path";
import process from "node:process";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";
import { EpBuffer, Group } from "../../mod.ts";
import { type Backend, type Capabilities, openDevice } from "../../lib/device.ts";
import { struct } from "../../lib/ffi/struct.ts";
import { locate, placeOf } from "../../lib/ffi/locate.ts";

/** A backend's library. */
export interface LibraryFacts {
  readonly backend: Backend;
  readonly path?: string;
  readonly bytes?: number;
  readonly sha256?: string;
  /** What the manifest of this release says; undefined when the release has no such file. */
  readonly wanted: string | undefined;
  /** Why it cannot be found or opened. */
  readonly error?: string;
}

/** Whether a backend works on a device: a rank was created, and a dispatch and combine came back right. */
export interface BackendFacts {
  readonly backend: "cpu" | "cuda";
  readonly device: number;
  /** The message of `EpBuffer.create`, or of what failed after it. */
  readonly error?: string;
}

/** How device `from` reaches the memory of device `to`. */
export interface PeerFacts {
  readonly from: number;
  readonly to: number;
  readonly access?: boolean;
  readonly performanceRank?: number;
  readonly error?: string;
}

/** Everything. */
export interface Facts {
  readonly runtime: string;
  /** Whether this process may open libraries. */
  readonly ffi: "granted" | "denied" | "prompt";
  /** The kernel's part of the NVIDIA driver, as it names itself. */
  readonly kernelDriver?: string;
  readonly libraries: readonly LibraryFacts[];
  readonly backends: readonly BackendFacts[];
  /** As the cuda library sees them. */
  readonly gpus: readonly Capabilities[];
  /** As nvidia-smi sees them, a line each: known even where the library does not start. */
  readonly nvidiaSmi?: readonly string[];
  readonly topology?: string;
  readonly peers: readonly PeerFacts[];
  readonly nvshmem: readonly string[];
}

const run = promisify(execFile);

/** The output of a program, or undefined when it cannot be run. */
async function output(program: string, args: readonly string[]): Promise<string | undefined> {
  try {
    const { stdout } = await run(program, args, { timeout: 20_000 });
    return stdout.trim();
  } catch {
    return undefined;
  }
}

/** What `look` gives, or undefined when it may not or cannot. */
function tried<T>(look: () => T): T | undefined {
  try {
    return look();
  } catch {
    return undefined;
  }
}

const env = (name: string): string | undefined => tried(() => process.env[name]) || undefined;

interface DenoPermissions {
  version: { deno: string };
  permissions: { query(descriptor: { name: "ffi"; path?: string }): Promise<{ state: Facts["ffi"] }> };
}

async function runtimeFacts(): Promise<Pick<Facts, "runtime" | "ffi">> {
  const machine = `${process.platform}-${process.arch}`;
  const deno = (globalThis as unknown as { Deno?: DenoPermissions }).Deno;
  if (!deno) return { runtime: `Bun ${process.versions["bun"] ?? "?"}, ${machine}`, ffi: "granted" };
  const folder = fileURLToPath(new URL("../../lib/native", import.meta.url));
  const { state } = await deno.permissions.query({ name: "ffi", path: folder });
  return { runtime: `Deno ${deno.version.deno}, ${machine}`, ffi: state };
}

async function libraryFacts(backend: Backend): Promise<LibraryFacts> {
  const place = placeOf(backend), wanted = place.sha256;
  try {
    const path = await locate(place);
    const bytes = tried(() => readFileSync(path));
    const facts = {
      backend,
      path,
      wanted,
      ...(bytes && { bytes: bytes.length, sha256: createHash("sha256").update(bytes).digest("hex") }),
    };
    try {
      await openDevice(backend);
      return facts;
    } catch (error) {
      return { ...facts, error: (error as Error).message };
    }
  } catch (error) {
    return { backend, wanted, error: (error as Error).message };
  }
}

/** Runs a layer on one rank: what a user's first program would do. */
async function backendFacts(backend: BackendFacts["backend"], device: number): Promise<BackendFacts> {
  const shape = { hidden: 16, numExperts: 2, numTopk: 1, maxTokensPerRank: 2, timeoutMs: 10_000 };
  try {
    const [group] = Group.local(1);
    await using buffer = await EpBuffer.create(group!, { backend, device, ...shape });
    using x = buffer.tensor("bf16", [2, 16], new Float32Array(32).fill(3));
    using topkIdx = buffer.tensor("i32", [2, 1], Int32Array.of(1, 0));
    using recv = await buffer.dispatch(x, { topkIdx });
    using out = await buffer.combine(recv.x, recv.handle);
    const right = (await out.x.read()).every((bits) => bits === 0x4040);
    return right ? { backend, device } : { backend, device, error: "a dispatch and combine came back wrong" };
  } catch (error) {
    return { backend, device, error: (error as Error).message };
  }
}

async function gpuFacts(): Promise<Pick<Facts, "gpus" | "peers">> {
  const gpus: Capabilities[] = [], peers: PeerFacts[] = [];
  try {
    const device = await openDevice("cuda");
    const { numDevices } = device.capabilities();
    for (let i = 0; i < numDevices; i++) gpus.push(device.capabilities(i));
    const args = struct("deepep_peer_access_args");
    for (let from = 0; from < numDevices; from++) {
      for (let to = 0; to < numDevices; to++) {
        if (from === to) continue;
        try {
          args.pack({ peer: to });
          device.call("deepep_get_peer_access", BigInt(from), args, "doctor");
          peers.push({ from, to, access: args.get("access") === 1, performanceRank: args.get("performance_rank") });
        } catch (error) {
          peers.push({ from, to, error: (error as Error).message });
        }
      }
    }
  } catch {
    // The backend's own line says why.
  }
  return { gpus, peers };
}

/** Files of NVSHMEM: where the environment says, in Python's packages, on the system. */
async function nvshmemFacts(): Promise<string[]> {
  const name = /^libnvshmem_host\.so(\.\d+)*$/;
  const python = "import sysconfig; print(sysconfig.get_paths()['purelib'])";
  const packages = await output("python3", ["-c", python]) ?? "";
  const home = env("NVSHMEM_HOME") ?? env("NVSHMEM_DIR");
  const folders = [
    ...(env("DEEPEP_NVSHMEM") ? [env("DEEPEP_NVSHMEM")!] : []),
    ...(home ? [join(home, "lib")] : []),
    ...(env("LD_LIBRARY_PATH") ?? "").split(":"),
    ...(packages ? [join(packages, "nvidia/nvshmem/lib")] : []),
    "/usr/lib/x86_64-linux-gnu",
    "/usr/lib/x86_64-linux-gnu/nvshmem/13",
    "/usr/local/nvshmem/lib",
    "/usr/lib64",
  ].filter((folder) => folder !== "" && (tried(() => existsSync(folder)) ?? false));
  return [...new Set(folders)].flatMap((folder) =>
    (tried(() => readdirSync(folder)) ?? []).filter((file) => name.test(file)).map((file) => join(folder, file))
  );
}

/** Looks at everything. */
export async function look(): Promise<Facts> {
  const runtime = await runtimeFacts();
  const libraries = [await libraryFacts("cpu"), await libraryFacts("cuda"), await libraryFacts("nvshmem")];
  const { gpus, peers } = await gpuFacts();
  const backends = [await backendFacts("cpu", 0)];
  for (let i = 0; i < Math.max(1, gpus.length); i++) backends.push(await backendFacts("cuda", i));
  const version = tried(() => readFileSync("/proc/driver/nvidia/version", "utf8").split("\n")[0]!);
  const smi = await output("nvidia-smi", [
    "--query-gpu=index,name,driver_version,memory.total,compute_cap",
    "--format=csv,noheader",
  ]);
  const topology = smi === undefined ? undefined : await output("nvidia-smi", ["topo", "-m"]);
  return {
    ...runtime,
    ...(version && { kernelDriver: version.replace(/^NVRM version:\s*/, "").replace(/\s+/g, " ") }),
    libraries,
    backends,
    gpus,
    ...(smi && { nvidiaSmi: smi.split("\n") }),
    ...(topology && { topology }),
    peers,
    nvshmem: await nvshmemFacts(),
  };
}
