/**
 * Says what works on this machine, and what to do about what does not: runtime, libraries, driver, GPUs, links, MPS,
 * NVSHMEM, and each backend by trying it.
 *
 *   bun scripts/doctor.ts [--json]      deno run -A scripts/doctor.ts [--json]
 *
 * In: the machine. Out: a report for people, or with `--json` the facts and findings as one JSON object. Exit status 1 when
 * no backend works.
 */
import process from "node:process";
import { parseArgs } from "node:util";
import { diagnose, format } from "./doctor/diagnose.ts";
import { look } from "./doctor/facts.ts";

async function main(): Promise<number> {
  const { values } = parseArgs({ options: { json: { type: "boolean", default: false } } });
  const facts = await look();
  const diagnosis = diagnose(facts);
  console.log(values.json ? JSON.stringify({ ...diagnosis, facts }, null, 2) : format(diagnosis));
  return diagnosis.ok ? 0 : 1;
}

if (import.meta.main) process.exitCode = await main();
