/**
 * Shows what ptxas said about the kernels: registers, spills, stack, shared memory.
 *
 * In: the logs that nvcc leaves with `-Xptxas -v`. Out: a table with a line for each kernel and architecture. Spills and a
 * stack mean that registers do not suffice: traffic that no source line shows. `scripts/build.ts --ptxas` prints it.
 */

import { spawnSync } from "node:child_process";

/** A kernel on an architecture. Sizes in bytes. */
export interface KernelUse {
  readonly kernel: string;
  readonly arch: string;
  readonly registers: number;
  /** Stores and loads. */
  readonly spills: number;
  readonly stack: number;
  /** Static shared memory. */
  readonly shared: number;
}

/** `deepep::(anonymous namespace)::copy_kernel<512>` of a mangled name, without the namespaces and the arguments. */
function shortNames(mangled: readonly string[]): string[] {
  const told = spawnSync("c++filt", { input: mangled.join("\n"), encoding: "utf8" });
  const names = told.status === 0 ? told.stdout.trimEnd().split("\n") : mangled;
  return names.map((name) =>
    name.replaceAll("(anonymous namespace)::", "").replace(/^void /, "").replace(/\([^()]*\)$/, "")
      .replace(/\([a-z ]+\)(?=[\d-])/g, "").replaceAll("deepep::", "")
  );
}

/** What the logs say, by kernel and architecture. */
export function kernelUses(logs: readonly string[]): KernelUse[] {
  const found: KernelUse[] = [];
  for (const log of logs) {
    for (const part of log.split("Compiling entry function ").slice(1)) {
      const [, kernel, arch] = /^'([^']+)' for '([^']+)'/.exec(part) ?? [];
      if (!kernel || !arch) continue;
      const number = (pattern: RegExp): number => Number(pattern.exec(part)?.[1] ?? 0);
      found.push({
        kernel,
        arch,
        registers: number(/Used (\d+) registers/),
        spills: number(/(\d+) bytes spill stores/) + number(/(\d+) bytes spill loads/),
        stack: number(/(\d+) bytes (?:cumulative )?stack/),
        shared: number(/(\d+) bytes smem/),
      });
    }
  }
  const names = shortNames(found.map(({ kernel }) => kernel));
  return found.map((use, i) => ({ ...use, kernel: names[i]! }))
    .sort((a, b) => a.kernel.localeCompare(b.kernel) || parseInt(a.arch.slice(3)) - parseInt(b.arch.slice(3)));
}

/** The table. */
export function ptxasTable(uses: readonly KernelUse[]): string {
  const rows = [
    ["kernel", "arch", "registers", "spills", "stack", "smem"],
    ...uses.map(({ kernel, arch, ...rest }) =>
      [kernel, arch, rest.registers, rest.spills, rest.stack, rest.shared].map(String)
    ),
  ];
  const widths = rows[0]!.map((_, column) => Math.max(...rows.map((row) => row[column]!.length)));
  return rows.map((row) =>
    row.map((cell, column) => column < 2 ? cell.padEnd(widths[column]!) : cell.padStart(widths[column]!)).join("  ")
  ).join("\n");
}
