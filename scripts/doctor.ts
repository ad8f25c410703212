/**
 * Says what works on this machine, and what to do about what does not: runtime, libraries, driver, GPUs, links, MPS,
 * NVSHMEM, and each backend by trying it.
 *
 *   bun scripts/doctor.ts [--json]      deno run -A scripts/doctor.ts [--json]
 *
 * In: the machine. Out: a report for people, or with `--json` the facts and findings as one JSON object. Exit status 1 when
 * no backend works, 2 when it was called wrongly.
 */
import process from "node:process";
import { parseArgs } from "node:util";
import { diagnose, format } from "./doctor/diagnose.ts";
import { look } from "./doctor/facts.ts";

const usage = `Usage: doctor.ts [--json]

Says what works on this machine, with a tick or a cross, and what to do about what does not. Exits with 1 when no backend works.

  --json                    the facts and findings as one JSON object
  --help                    this text
`;

/** Reads the command line; undefined when it asks for help. @throws {TypeError} of what it does not know */
function parse(): { readonly json: boolean } | undefined {
  const flag = { type: "boolean", default: false } as const;
  const { values } = parseArgs({ options: { json: flag, help: flag } });
  return values.help ? undefined : values;
}

async function main(): Promise<number> {
  let values: ReturnType<typeof parse>;
  try {
    values = parse();
  } catch (error) {
    console.error(`${(error as Error).message}\n\n${usage}`);
    return 2;
  }
  if (!values) {
    console.log(usage);
    return 0;
  }
  const facts = await look();
  const diagnosis = diagnose(facts);
  console.log(values.json ? JSON.stringify({ ...diagnosis, facts }, null, 2) : format(diagnosis));
  return diagnosis.ok ? 0 : 1;
}

if (import.meta.main) process.exitCode = await main();
