/**
 * Starts the ranks of a job on this machine: N processes with torchrun's variables, a fresh secret and a free port.
 *
 * In: the command line below. Out: the ranks' output, line by line, and the exit code of the rank that failed first.
 * Each rank leads a process group of its own, so that a signal reaches what it has started too, and Ctrl-C reaches it
 * once. A shell waits on a pipe of the launcher's: if the launcher is killed, even by SIGKILL, the pipe closes and the
 * shell ends the ranks. Runs under Bun and Deno.
 *
 * @module
 */
import { Buffer } from "node:buffer";
import { type ChildProcess, spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { existsSync } from "node:fs";
import { createServer } from "node:net";
import { constants } from "node:os";
import process from "node:process";
import { Transform } from "node:stream";
import { clearTimeout, setTimeout } from "node:timers";

const USAGE = `Usage: launch.ts --ranks N [options] script.ts [arguments of the script]

Starts N processes of script.ts on this machine, each with RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR
(127.0.0.1), MASTER_PORT and DEEPEP_SECRET, which Group.fromEnv() reads. When a rank fails, the others are ended
(SIGTERM, after 5 s SIGKILL) and the launcher exits with that rank's code, or 128 + the signal's number.
SIGINT, SIGTERM and SIGHUP are passed on to the ranks; those that still run 5 s after the first rank has ended by it, or
failed for it, get SIGTERM, after 5 s more SIGKILL. The ranks have no standard input.

  -n, --ranks N          number of ranks, 1 to 4096
      --runtime bun|deno what runs the ranks (default: what runs the launcher; deno as "deno run -A")
      --runtime-arg ARG  an argument of the runtime, before the script; may be repeated
      --master-port P    port on which rank 0 is met (default: a free one)
      --tag-output       begin each line of output with "[rank] " (default)
      --no-prefix        pass the output on as it is
  -h, --help             this text

Example: bun scripts/launch.ts --ranks 4 scripts/demo.ts --tokens 128
`;
const KILL_AFTER_MS = 5000;
const MAX_LINE_BYTES = 1 << 16;
const FORWARDED = ["SIGINT", "SIGTERM", "SIGHUP"] as const;

interface Options {
  ranks: number;
  runtime: string;
  runtimeArgs: string[];
  port: number | undefined;
  prefix: boolean;
  script: string[];
}

class UsageError extends Error {}

/** Reads the command line up to the script's name; what follows is the script's. */
function parse(args: readonly string[]): Options | undefined {
  const self = "Bun" in globalThis ? "bun" : "deno";
  const options: Options = { ranks: 0, runtime: self, runtimeArgs: [], port: undefined, prefix: true, script: [] };
  for (let i = 0; i < args.length; i++) {
    const [name, inline] = args[i]!.startsWith("--") ? splitOnce(args[i]!, "=") : [args[i]!, undefined];
    const value = (): string => {
      const text = inline ?? args[++i];
      if (text === undefined) throw new UsageError(`${name} needs a value`);
      return text;
    };
    if (name === "--help" || name === "-h") return undefined;
    else if (name === "--ranks" || name === "-n") options.ranks = whole(name, value(), 4096);
    else if (name === "--runtime") options.runtime = value();
    else if (name === "--runtime-arg") options.runtimeArgs.push(value());
    else if (name === "--master-port") options.port = whole(name, value(), 65535);
    else if (name === "--tag-output") options.prefix = true;
    else if (name === "--no-prefix") options.prefix = false;
    else if (name.startsWith("-")) throw new UsageError(`${name} is not an option`);
    else {
      options.script = args.slice(i);
      break;
    }
  }
  if (options.ranks === 0) throw new UsageError("--ranks is missing");
  if (options.runtime !== "bun" && options.runtime !== "deno") {
    throw new UsageError(`--runtime is "${options.runtime}", expected bun or deno`);
  }
  if (options.script.length === 0) throw new UsageError("the script is missing");
  return options;
}

function splitOnce(text: string, by: string): [string, string | undefined] {
  const at = text.indexOf(by);
  return at < 0 ? [text, undefined] : [text.slice(0, at), text.slice(at + 1)];
}

function whole(name: string, text: string, max: number): number {
  const value = /^\d+$/.test(text) ? Number(text) : 0;
  if (value < 1 || value > max) throw new UsageError(`${name} is "${text}", expected a whole number from 1 to ${max}`);
  return value;
}

function freePort(): Promise<number> {
  return new Promise((resolve, reject) => {
    const server = createServer();
    server.once("error", reject);
    server.listen({ host: "127.0.0.1", port: 0 }, () => {
      const { port } = server.address() as { port: number };
      server.close(() => resolve(port));
    });
  });
}

/** The command that runs the script: this very runtime, or the other one from node_modules or the path. */
function commandOf({ runtime, runtimeArgs, script }: Options): [command: string, args: string[]] {
  const own = ("Bun" in globalThis) === (runtime === "bun");
  const near = `node_modules/.bin/${runtime}`;
  const command = own ? process.execPath : existsSync(near) ? near : runtime;
  return [command, [...(runtime === "deno" ? ["run", "-A"] : []), ...runtimeArgs, ...script]];
}

function environmentOf(rank: number, ranks: number, port: number, secret: string): Record<string, string | undefined> {
  const env = { ...process.env };
  // What an outer launcher said about itself would be read as said about this job.
  for (const name of ["TORCHELASTIC_RUN_ID", "DEEPEP_PORT", "GROUP_RANK", "ROLE_RANK"]) delete env[name];
  const [r, n] = [String(rank), String(ranks)];
  const ours = { RANK: r, LOCAL_RANK: r, WORLD_SIZE: n, LOCAL_WORLD_SIZE: n, MASTER_ADDR: "127.0.0.1" };
  return { ...env, ...ours, MASTER_PORT: String(port), DEEPEP_SECRET: secret };
}

/** Whole lines, each after `tag`. What is left at the end, and a line without end, is passed on with a line break. */
function lineTagger(tag: string): Transform {
  const head = Buffer.from(tag), newline = Buffer.from("\n");
  let rest: Buffer = Buffer.alloc(0);
  return new Transform({
    transform(chunk: Buffer, _encoding, done): void {
      const bytes = rest.length > 0 ? Buffer.concat([rest, chunk]) : chunk;
      const out: Buffer[] = [];
      let at = 0;
      for (let end; (end = bytes.indexOf(10, at)) >= 0; at = end + 1) out.push(head, bytes.subarray(at, end + 1));
      for (; bytes.length - at > MAX_LINE_BYTES; at += MAX_LINE_BYTES) {
        out.push(head, bytes.subarray(at, at + MAX_LINE_BYTES), newline);
      }
      rest = Buffer.from(bytes.subarray(at));
      done(null, out.length > 0 ? Buffer.concat(out) : undefined);
    },
    flush(done): void {
      done(null, rest.length > 0 ? Buffer.concat([head, rest, newline]) : undefined);
    },
  });
}

/** The shell that outlives the launcher. It reads "+pid" and "-pid" for groups that begin and end, "." for a good end. */
class Watch {
  readonly #shell: ChildProcess;

  constructor() {
    const script = `trap '' INT TERM HUP; all=
      while read -r line; do case $line in
        .) exit 0;;
        +*) all="$all \${line#+}";;
        -*) kept=; for p in $all; do [ "$p" = "\${line#-}" ] || kept="$kept $p"; done; all=$kept;;
      esac; done
      for p in $all; do kill -TERM -"$p"; done
      for i in 1 2 3 4 5; do sleep 1; left=; for p in $all; do kill -0 -"$p" && left=1; done; [ "$left" ] || exit 0; done
      for p in $all; do kill -KILL -"$p"; done`;
    this.#shell = spawn("sh", ["-c", script], { detached: true, stdio: ["pipe", "ignore", "ignore"] });
    this.#shell.on("error", (error) => console.error(`launch: ranks may outlive a killed launcher: ${error.message}`));
    this.#shell.stdin!.on("error", () => {}); // without its watch the job still runs
    this.#shell.unref();
  }

  tell(line: string): void {
    this.#shell.stdin!.write(`${line}\n`);
  }

  /** The job is over. */
  end(): void {
    this.#shell.stdin!.end(".\n");
  }
}

interface Rank {
  process: ChildProcess;
  alive: boolean;
  timer: ReturnType<typeof setTimeout> | undefined;
}

/** The job: its processes and how it ends. */
class Job {
  readonly #children: Rank[] = [];
  readonly #watch = new Watch();
  readonly #ended = Promise.withResolvers<number>();
  #left: number;
  #code = 0;
  #failed = false;
  #endTimer: ReturnType<typeof setTimeout> | undefined;
  #signalled = false;

  constructor(options: Options, port: number) {
    this.#left = options.ranks;
    const secret = process.env.DEEPEP_SECRET || randomBytes(32).toString("hex");
    for (let rank = 0; rank < options.ranks; rank++) {
      this.#start(rank, options, environmentOf(rank, options.ranks, port, secret));
    }
  }

  /** The exit code, when every rank has ended and all output is passed on. */
  get ended(): Promise<number> {
    return this.#ended.promise;
  }

  /** Passes a signal on to the ranks. */
  forward(signal: NodeJS.Signals): void {
    this.#signalled = true;
    this.#signal(signal);
  }

  /** Ends what is left: SIGTERM, five seconds later SIGKILL; after a signal passed on, which may do it, both later. */
  end(code: number): void {
    if (this.#failed) return;
    this.#failed = true;
    this.#code = code;
    this.#endTimer = setTimeout(() => {
      this.#signal("SIGTERM");
      this.#endTimer = setTimeout(() => this.#signal("SIGKILL"), KILL_AFTER_MS);
    }, this.#signalled ? KILL_AFTER_MS : 0);
  }

  /** Output goes nowhere from now on, so that no rank waits for a reader. */
  mute(): void {
    for (const { process: { stdout, stderr } } of this.#children) {
      for (const stream of [stdout!, stderr!]) stream.unpipe().resume();
    }
  }

  #start(rank: number, options: Options, env: Record<string, string | undefined>): void {
    const [command, args] = commandOf(options);
    const child = spawn(command, args, { env, detached: true, stdio: ["ignore", "pipe", "pipe"] });
    const entry: Rank = { process: child, alive: true, timer: undefined };
    this.#children.push(entry);
    if (child.pid !== undefined) this.#watch.tell(`+${child.pid}`);
    for (const [from, to] of [[child.stdout!, process.stdout], [child.stderr!, process.stderr]] as const) {
      if (options.prefix) from.pipe(lineTagger(`[${rank}] `)).pipe(to, { end: false });
      else from.pipe(to, { end: false });
    }
    child.on("error", (error) => {
      if (child.pid !== undefined) return;
      console.error(`launch: cannot start rank ${rank}: ${command}: ${error.message}`);
      entry.alive = false;
      this.end(127);
      this.#oneLess();
    });
    child.on("exit", (code, signal) => {
      entry.alive = false;
      if (code !== 0) this.#report(rank, code, signal);
      // What the rank has started and left behind goes with it; while such a process holds the output, `close` waits.
      this.#kill(child, "SIGTERM");
      entry.timer = setTimeout(() => this.#kill(child, "SIGKILL"), KILL_AFTER_MS);
    });
    child.on("close", () => {
      clearTimeout(entry.timer);
      this.#watch.tell(`-${child.pid}`);
      this.#oneLess();
    });
  }

  #report(rank: number, code: number | null, signal: NodeJS.Signals | null): void {
    if (this.#failed) return;
    const how = signal ? `was ended by ${signal}` : `exited with code ${code}`;
    const others = this.#children.filter(({ alive }) => alive).length;
    console.error(`launch: rank ${rank} failed first: it ${how}${others > 0 ? `; ending ${others} others` : ""}`);
    this.end(signal ? 128 + (constants.signals[signal] ?? 0) : code ?? 1);
  }

  #oneLess(): void {
    if (--this.#left > 0) return;
    clearTimeout(this.#endTimer);
    this.#watch.end();
    this.#ended.resolve(this.#code);
  }

  #signal(signal: NodeJS.Signals): void {
    for (const { process, alive } of this.#children) if (alive) this.#kill(process, signal);
  }

  #kill({ pid }: ChildProcess, signal: NodeJS.Signals): void {
    try {
      if (pid !== undefined) process.kill(-pid, signal);
    } catch { /* the group is gone */ }
  }
}

async function main(): Promise<number> {
  let options: Options | undefined;
  try {
    options = parse(process.argv.slice(2));
  } catch (error) {
    if (!(error instanceof UsageError)) throw error;
    console.error(`launch: ${error.message}\n\n${USAGE}`);
    return 2;
  }
  if (!options) {
    console.log(USAGE);
    return 0;
  }
  for (const stream of [process.stdout, process.stderr]) stream.setMaxListeners(0);
  const job = new Job(options, options.port ?? await freePort());
  for (const signal of FORWARDED) process.on(signal, () => job.forward(signal));
  // Nobody reads any more, as under `| head`: the ranks would only learn it one by one.
  process.stdout.on("error", () => {
    job.mute();
    job.end(128 + constants.signals.SIGPIPE);
  });
  return await job.ended;
}

process.exitCode = await main();
for (const signal of FORWARDED) process.removeAllListeners(signal);
