/**
 * The doctor's judgement: what is well, what is not, and what to do about it.
 *
 * In: facts. Out: lines under headings. Pure, so that conditions of machines that are not at hand can be tested. Where a
 * backend does not work, the line is the message of `EpBuffer.create` itself, and the advice goes with it.
 */
import type { Facts, LibraryFacts } from "./facts.ts";

/** A finding. `ok` is undefined where there is nothing to judge. */
export interface Line {
  readonly ok?: boolean;
  readonly text: string;
  /** What to do. */
  readonly advice?: string;
}

/** Findings about one thing. */
export interface Section {
  readonly title: string;
  readonly lines: readonly Line[];
}

/** What the doctor says. */
export interface Diagnosis {
  /** Whether any backend works. */
  readonly ok: boolean;
  readonly sections: readonly Section[];
}

const firstLine = (text: string): string => text.split("\n")[0]!.replace(/, tried:$/, "");

/** What to do about messages that several places share, by their words. */
const remedies: readonly [RegExp, string][] = [
  [
    /--allow-ffi|Requires ffi access/i,
    "run Deno with --allow-ffi, or --allow-ffi=lib/native",
  ],
  [/SHA-256/, "install the package again, or rebuild: bun scripts/build.ts"],
  [/ABI version/, "the library and the package are of different versions: install both again, or rebuild"],
  [/Cannot find lib/, "build it in a checkout (bun scripts/build.ts), or name the file with DEEPEP_LIBRARY_<BACKEND>"],
  [
    /no NVIDIA driver|libcuda/i,
    "install the NVIDIA driver; in a container start it with the GPU (--gpus all) and its toolkit; the cpu backend needs none",
  ],
  [
    /driver is for CUDA|driver version is insufficient|older than/i,
    "update the NVIDIA driver to the version that the message names",
  ],
  [
    /no GPU|no CUDA-capable device|sees no device/i,
    "see that nvidia-smi lists a GPU and that CUDA_VISIBLE_DEVICES does not hide it; the cpu backend needs none",
  ],
  [
    /no code for|compute capability|no kernel image|architecture/i,
    "use a GPU of compute capability 8.0 or later, or rebuild with its architecture: bun scripts/build.ts --backend cuda",
  ],
  [
    /could not ask for/,
    "the driver itself fails: see whether nvidia-smi topo -m answers, and what the kernel's log says of NVRM (dmesg)",
  ],
  // Before peer access and memory, of which CUDA IPC's messages speak too.
  [
    /CUDA IPC/,
    "run the ranks in one process; or in processes of one machine and one container, on GPUs that reach each other, with a " +
    "driver that has CUDA IPC (some virtual machines have none)",
  ],
  [
    /peer access/i,
    "put the ranks on GPUs that reach each other (nvidia-smi topo -m), and see that no virtualisation or IOMMU setting forbids it",
  ],
  [
    /MPS/,
    "start CUDA MPS (nvidia-cuda-mps-control -d), give each process a GPU of its own, or run the ranks in one process",
  ],
  [/multiprocessors|SMs/, "use fewer ranks on the GPU, or fewer SMs an operation (numSms)"],
  [
    /pinned memory|shared memory could not be had/,
    "free memory of the host, or raise what this process or container may have of it (ulimit -l, docker run --memory)",
  ],
  [
    /out of memory|not to be had/i,
    "make the buffer smaller (EpBuffer.sizeHint(options) says what it takes), or end what else fills the GPU: nvidia-smi lists it",
  ],
];

/** What to do about a message of `EpBuffer.create`. */
export function adviceFor(message: string): string {
  return remedies.find(([words]) => words.test(message))?.[1] ?? "see the message";
}

function library({ backend, path, bytes, sha256, wanted, error }: LibraryFacts): Line {
  if (path === undefined) {
    const text = `${backend}: ${firstLine(error ?? "not found")}`;
    // A release need not have every backend; then its absence is no fault.
    return wanted === undefined
      ? { text: `${text}; this release has none` }
      : { ok: false, text, advice: adviceFor(text) };
  }
  const where = `${backend}: ${path}`;
  if (error !== undefined) return { ok: false, text: `${where}: ${firstLine(error)}`, advice: adviceFor(error) };
  const what = `${where}, ${bytes ?? "?"} bytes, sha256 ${sha256?.slice(0, 16) ?? "?"}`;
  if (sha256 === undefined) return { ok: true, text: `${what} (it may not be read, so it was not compared)` };
  if (sha256 === wanted) return { ok: true, text: `${what}, as the manifest says` };
  return { text: `${what}: not the one of the manifest, taken because you named it` };
}

function driver(facts: Facts): Line[] {
  const [gpu] = facts.gpus;
  const lines: Line[] = [];
  if (facts.kernelDriver) lines.push({ ok: true, text: facts.kernelDriver });
  if (gpu) lines.push({ ok: true, text: `the driver is for CUDA ${gpu.driverVersion}` });
  if (lines.length === 0) {
    lines.push({
      ok: false,
      text: "none is loaded: there is no /proc/driver/nvidia/version",
      advice: adviceFor("no NVIDIA driver"),
    });
  }
  return lines;
}

const GIB = 2 ** 30;

function gpus(facts: Facts): Line[] {
  if (facts.gpus.length > 0) {
    return facts.gpus.map((gpu, i) => {
      const { name, numSms, totalBytes, computeCapability: cc } = gpu;
      const text = `GPU ${i}: ${name}, ${numSms} SMs, ${(totalBytes / GIB).toFixed(1)} GiB, ` +
        `compute capability ${Math.floor(cc / 10)}.${cc % 10}`;
      return cc >= 80 ? { ok: true, text } : { ok: false, text, advice: adviceFor("compute capability") };
    });
  }
  const seen = facts.nvidiaSmi ?? [];
  if (seen.length === 0) return [{ ok: false, text: "none is seen", advice: adviceFor("no GPU") }];
  // Why is in the words of the backend.
  const why = facts.backends.find(({ backend }) => backend === "cuda")?.error ?? "no GPU";
  return seen.map((line) => ({
    ok: false,
    text: `nvidia-smi sees ${line}; the cuda library does not`,
    advice: adviceFor(why),
  }));
}

function peers(facts: Facts): Line[] {
  if (facts.gpus.length < 2) return [{ text: "there is no second GPU" }];
  return facts.gpus.map((_, from): Line => {
    const errors = new Set<string>();
    const cells = facts.gpus.map((_, to) => {
      if (from === to) return "self";
      const found = facts.peers.find((p) => p.from === from && p.to === to);
      if (found?.error === undefined) return found?.access ? `yes(${found.performanceRank})` : "NO";
      errors.add(firstLine(found.error));
      return "?";
    });
    const text = `GPU ${from}: ${cells.map((cell) => cell.padEnd(7)).join(" ").trimEnd()}`;
    const faults = [...cells.includes("NO") ? ["peer access"] : [], ...errors];
    if (faults.length === 0) return { ok: true, text };
    const advice = [...new Set(faults.map(adviceFor))].join("; ");
    return { ok: false, text: errors.size === 0 ? text : `${text} (${[...errors].join("; ")})`, advice };
  });
}

function mps(facts: Facts): Line[] {
  if (facts.gpus.length === 0) return [{ text: "there is no GPU to share" }];
  if (facts.gpus.every((gpu) => gpu.mps)) return [{ ok: true, text: "on: several processes may share a GPU" }];
  return [{
    text: "off: ranks in one process, or a GPU for each process, do not need it; several processes on one GPU do",
    advice: adviceFor("MPS"),
  }];
}

function nvshmem(facts: Facts): Line[] {
  if (facts.nvshmem.length > 0) return facts.nvshmem.map((file) => ({ ok: true, text: file }));
  return [{
    text: "not found; only ranks on several machines need it",
    advice: "nothing to do: no backend of this version uses it",
  }];
}

/** Judges. */
export function diagnose(facts: Facts): Diagnosis {
  const ffi: Line = facts.ffi === "granted"
    ? { ok: true, text: "may open libraries (FFI)" }
    : { ok: false, text: `may not open libraries: the permission is "${facts.ffi}"`, advice: adviceFor("--allow-ffi") };
  const backends = facts.backends.map(({ backend, device, error }): Line => {
    const name = backend === "cpu" ? "cpu" : `cuda on GPU ${device}`;
    if (error === undefined) return { ok: true, text: `${name}: a dispatch and combine came back right` };
    return { ok: false, text: `${name}: ${firstLine(error)}`, advice: adviceFor(error) };
  });
  return {
    ok: facts.backends.some(({ error }) => error === undefined),
    sections: [
      { title: "Runtime", lines: [{ ok: true, text: facts.runtime }, ffi] },
      { title: "Libraries", lines: facts.libraries.map(library) },
      { title: "Driver", lines: driver(facts) },
      { title: "GPUs", lines: gpus(facts) },
      { title: "Peer access (the driver's rank of the link, smaller is faster)", lines: peers(facts) },
      ...(facts.topology ? [{ title: "Links", lines: facts.topology.split("\n").map((text) => ({ text })) }] : []),
      { title: "CUDA MPS", lines: mps(facts) },
      { title: "NVSHMEM", lines: nvshmem(facts) },
      { title: "Backends", lines: backends },
    ],
  };
}

/** Text for people: a mark, a finding, and below it what to do. */
export function format({ sections, ok }: Diagnosis): string {
  const mark = (line: Line): string => line.ok === undefined ? "·" : line.ok ? "✓" : "✗";
  const text = sections.map(({ title, lines }) =>
    [title, ...lines.flatMap((l) => [`  ${mark(l)} ${l.text}`, ...(l.advice ? [`      -> ${l.advice}`] : [])])].join(
      "\n",
    )
  );
  return [...text, ok ? "A backend works here." : "No backend works here."].join("\n\n");
}
