/**
 * What the gate says of a step, from its exit status and output.
 *
 * In: the output of a test runner or of any other program. Out: counts for the last line, and a digest: the names of the tests
 * that failed, then what each of them said, in few enough lines to be seen whole wherever the output is cut. Called by check.ts.
 */

/** Whose tests are counted. */
export type Runner = "bun" | "deno";

/** Tests, or steps without tests. */
export interface Counts {
  passed: number;
  failed: number;
  skipped: number;
}

/** A test that failed, and its error. */
interface Failure {
  readonly name: string;
  readonly text: readonly string[];
}

const MOST_LINES = 30, MOST_NAMES = 10, MOST_FRAMES = 3, LAST_WORDS = 6;

/** The counts in a runner's summary, or undefined when there is none. */
function summaryOf(runner: Runner, output: string): Counts | undefined {
  if (runner === "deno") {
    const line = /^(?:ok|FAILED) \| \d+ passed.*$/m.exec(output)?.[0];
    if (line === undefined) return undefined;
    const count = (word: string): number => { // subtests are called steps, and counted beside the tests
      const found = new RegExp(`(\\d+) ${word}(?: \\((\\d+) steps?\\))?`).exec(line);
      return Number(found?.[1] ?? 0) + Number(found?.[2] ?? 0);
    };
    return { passed: count("passed"), failed: count("failed"), skipped: count("ignored") };
  }
  const count = (word: string): number => Number(new RegExp(`^ *(\\d+) ${word}$`, "m").exec(output)?.[1] ?? 0);
  if (!/^ *\d+ (pass|fail)$/m.test(output)) return undefined;
  return { passed: count("pass"), failed: count("fail"), skipped: count("skip") + count("todo") };
}

/** What a step adds to the total. A runner that fails without a failing test, or says nothing, counts as one failure. */
export function countsOf(runner: Runner | undefined, status: number, output: string): Counts {
  if (!runner) return { passed: status === 0 ? 1 : 0, failed: status === 0 ? 0 : 1, skipped: 0 };
  const counts = summaryOf(runner, output) ?? { passed: 0, failed: 1, skipped: 0 };
  if (status !== 0 && counts.failed === 0) counts.failed = 1;
  return counts;
}

/** Deno repeats errors under a heading: `name => place`, then the error. When it is ended, only the names were said. */
function denoFailures(lines: readonly string[]): Failure[] {
  const begin = lines.indexOf(" ERRORS "), end = lines.indexOf(" FAILURES ");
  const failures: { name: string; text: string[] }[] = [];
  if (begin < 0) {
    const names = lines.map((line) => /^ *(.*) \.\.\. FAILED \((?!due to)/.exec(line)?.[1]);
    return names.filter((name) => name !== undefined).map((name) => ({ name, text: [] }));
  }
  for (const line of lines.slice(begin + 1, end < 0 ? undefined : end)) {
    const name = /^(\S.*) => \S+:\d+:\d+$/.exec(line)?.[1];
    if (name !== undefined) failures.push({ name, text: [] });
    else failures.at(-1)?.text.push(line);
  }
  return failures;
}

/** Bun writes a piece of the source and the error before the line of the test that failed. */
function bunFailures(lines: readonly string[]): Failure[] {
  const failures: Failure[] = [];
  let file = "", text: string[] = [];
  const again = lines.findIndex((line) => /^\d+ tests? (failed|skipped|todo):$/.test(line)); // lists what it said before
  for (const line of again < 0 ? lines : lines.slice(0, again)) {
    const name = /^\(fail\) (.*?)(?: \[[\d.]+m?s\])?$/.exec(line)?.[1];
    const ended = name ??
      (/^-{20,}$/.test(line) && text.some((t) => t !== "") ? `${file}, outside of tests` : undefined);
    if (ended !== undefined) failures.push({ name: ended, text });
    if (ended !== undefined || /^\((pass|skip|todo)\)|^\S+\.ts:$|^# Unhandled|^-{20,}$/.test(line)) text = [];
    else if (/^ *\d+ \| /.test(line)) text = []; // what was printed before belongs to no error
    else text.push(line);
    file = /^(\S+\.ts):$/.exec(line)?.[1] ?? file;
  }
  return failures;
}

/** An error without blank lines, the mark under a piece of source and most of its stack. */
function shortened({ text }: Failure, most: number): string[] {
  let frames = 0;
  const kept = text.filter((line) => !/^\s*\^?\s*$/.test(line) && (!/^ +at /.test(line) || ++frames <= MOST_FRAMES));
  return kept.slice(0, most).map((line) => `  ${line}`);
}

/** The beginning and the end of what is too long. */
function ends(lines: readonly string[], most: number): string[] {
  if (lines.length <= most) return [...lines];
  const first = Math.floor(most / 3);
  return [...lines.slice(0, first), "…", ...lines.slice(lines.length - (most - first - 1))];
}

/** What to read first of a step that failed: at most 30 lines. */
export function digestOf(runner: Runner | undefined, output: string): string[] {
  const lines = output.trimEnd().split("\n").filter((line) => !/^Check \S+\.ts$/.test(line)); // Deno's progress
  const found = runner === "deno" ? denoFailures(lines) : runner === "bun" ? bunFailures(lines) : [];
  if (found.length === 0) return ends(lines.filter((line) => line.trim() !== ""), MOST_LINES);
  const names = found.slice(0, MOST_NAMES).map(({ name }) => `failed: ${name}`);
  if (found.length > MOST_NAMES) names.push(`and ${found.length - MOST_NAMES} more`);
  const last = summaryOf(runner!, output) ? [] : ends(lines, LAST_WORDS); // it was ended, or crashed
  const room = MOST_LINES - names.length - last.length;
  if (found.length === 1) return [...names, ...shortened(found[0]!, room), ...last];
  const each = Math.max(2, Math.floor(room / found.length) - 1);
  const errors = found.flatMap((failure) =>
    failure.text.length > 0 ? [`${failure.name}:`, ...shortened(failure, each)] : []
  );
  return [...names, ...errors.slice(0, room), ...last];
}
