/**
 * Which rank this process is, by the variables of the launcher that started it.
 *
 * In: an environment. Out: rank, size, localRank and where rank 0 is met. `Group.fromEnv` calls. The launcher is the
 * first of the table below whose rank variable is set; the order matters, because launchers run inside one another
 * (torchrun or mpirun inside a Slurm job) and the inner one comes first.
 *
 * Address: 127.0.0.1 if the launcher says that all ranks are on one machine, else MASTER_ADDR, else Slurm's first node.
 * Port: DEEPEP_PORT; else MASTER_PORT, plus 1000 under torchrun, because there the agent's own store listens on
 * MASTER_PORT for as long as the job runs; else a port from 20000 to 29999 that follows from the id of the Slurm job and
 * step or of the MPI job; else 29500. The secret is DEEPEP_SECRET.
 */
import process from "node:process";
import { createHash } from "node:crypto";
import { EpError } from "../error.ts";

/** Gives a variable's value; empty counts as not set. */
export type Environment = (name: string) => string | undefined;

/** What a launcher says. */
export interface LauncherFacts {
  /** Which launcher it is. */
  launcher: string;
  rank: number;
  size: number;
  localRank: number;
  host: string;
  port: number;
  secret: string | undefined;
}

interface Launcher {
  name: string;
  rank: string;
  /** The first that is set counts, here and below. */
  size: readonly string[];
  localRank: readonly string[];
  localSize: readonly string[];
}

const PMI = "MPICH or Intel MPI";
const LAUNCHERS: readonly Launcher[] = [
  {
    name: "torchrun",
    rank: "RANK",
    size: ["WORLD_SIZE"],
    localRank: ["LOCAL_RANK"],
    localSize: ["LOCAL_WORLD_SIZE"],
  },
  {
    name: "Open MPI",
    rank: "OMPI_COMM_WORLD_RANK",
    size: ["OMPI_COMM_WORLD_SIZE"],
    localRank: ["OMPI_COMM_WORLD_LOCAL_RANK", "LOCAL_RANK"],
    localSize: ["OMPI_COMM_WORLD_LOCAL_SIZE"],
  },
  {
    name: PMI,
    rank: "PMI_RANK",
    size: ["PMI_SIZE"],
    localRank: ["MPI_LOCALRANKID", "PMI_LOCAL_RANK", "SLURM_LOCALID", "LOCAL_RANK"],
    localSize: ["MPI_LOCALNRANKS", "PMI_LOCAL_SIZE"],
  },
  {
    name: "Slurm",
    rank: "SLURM_PROCID",
    size: ["SLURM_STEP_NUM_TASKS", "SLURM_NTASKS", "SLURM_NPROCS"],
    localRank: ["SLURM_LOCALID", "LOCAL_RANK"],
    localSize: [],
  },
  { name: "PMIx", rank: "PMIX_RANK", size: ["WORLD_SIZE"], localRank: ["LOCAL_RANK"], localSize: [] },
];
const MAX_SIZE = 4096;
const DEFAULT_PORT = 29500;
/** From torchrun's store to our port: far enough from 29501, which people give to their second job. */
const TORCHRUN_OFFSET = 1000;
const WHAT = "Cannot join from the environment";

/** A variable that must be a whole number in a range. */
const wholeNumber = (env: Environment, name: string, from: number, to: number): number => {
  const text = env(name);
  const value = text !== undefined && /^\s*\d+\s*$/.test(text) ? Number(text) : NaN;
  if (value >= from && value <= to) return value;
  const found = text === undefined ? "is not set" : `is "${text}"`;
  throw new RangeError(`${WHAT}: ${name} ${found}, expected a whole number from ${from} to ${to}`);
};

const firstSet = (env: Environment, names: readonly string[]): string | undefined =>
  names.find((name) => env(name) !== undefined);

/** Reads the launcher's variables. @throws {RangeError} @throws {EpError} See `Group.fromEnv`. */
export function readLauncher(env: Environment): LauncherFacts {
  const launcher = LAUNCHERS.find(({ name, rank }) => env(rank) !== undefined && !(name === PMI && isSrun(env)));
  if (!launcher) throw noLauncher(env);
  const sizeName = firstSet(env, launcher.size) ?? launcher.size[0]!;
  const size = wholeNumber(env, sizeName, 1, MAX_SIZE);
  if (env("WORLD_SIZE") !== undefined && wholeNumber(env, "WORLD_SIZE", 1, MAX_SIZE) !== size) {
    throw new RangeError(
      `${WHAT}: WORLD_SIZE is ${env("WORLD_SIZE")} and ${sizeName} is ${size}, expected the same; unset RANK's or ` +
        `${launcher.name}'s variables`,
    );
  }
  const rank = wholeNumber(env, launcher.rank, 0, size - 1);
  const localSizeName = firstSet(env, launcher.localSize);
  const localSize = localSizeName && wholeNumber(env, localSizeName, 1, size);
  const localRankName = firstSet(env, launcher.localRank) ?? launcher.localRank[0]!;
  const localRank = wholeNumber(env, localRankName, 0, (localSize || size) - 1);
  const host = hostOf(env, launcher, localSize === size || size === 1 || oneSlurmNode(env, launcher));
  return {
    launcher: launcher.name,
    rank,
    size,
    localRank,
    host,
    port: portOf(env, launcher),
    secret: env("DEEPEP_SECRET"),
  };
}

/** Whether the PMI variables are srun's: then Slurm's own say more. */
const isSrun = (env: Environment): boolean =>
  env("SLURM_PROCID") === env("PMI_RANK") && (env("SLURM_STEP_NUM_TASKS") ?? env("SLURM_NTASKS")) === env("PMI_SIZE");

const oneSlurmNode = (env: Environment, { name }: Launcher): boolean =>
  name === "Slurm" && (env("SLURM_STEP_NUM_NODES") ?? env("SLURM_NNODES"))?.trim() === "1";

function hostOf(env: Environment, { name }: Launcher, oneMachine: boolean): string {
  if (oneMachine) return "127.0.0.1";
  const given = env("MASTER_ADDR")?.trim();
  if (given) return given;
  if (name !== "torchrun") {
    const list = env("SLURM_STEP_NODELIST") ?? env("SLURM_JOB_NODELIST") ?? env("SLURM_NODELIST");
    const node = list ? firstNode(list) : env("SLURM_LAUNCH_NODE_IPADDR");
    if (node) return node;
  }
  const how = name === "Open MPI" ? "; pass it on with `mpirun -x MASTER_ADDR`" : "";
  throw new RangeError(`${WHAT}: MASTER_ADDR is not set, expected the name or address of rank 0's machine${how}`);
}

/** `gpu01` of `gpu[01-04,07],cpu1`. */
export function firstNode(list: string): string {
  const first = /^(?:[^,[]|\[[^\]]*\])+/.exec(list.trim())?.[0] ?? "";
  return first.replace(/\[([^\],-]*)[^\]]*\]/g, "$1");
}

function portOf(env: Environment, { name }: Launcher): number {
  if (env("DEEPEP_PORT") !== undefined) return wholeNumber(env, "DEEPEP_PORT", 1, 65535);
  const underAgent = name === "torchrun" && env("TORCHELASTIC_RUN_ID") !== undefined;
  if (env("MASTER_PORT") !== undefined || name === "torchrun" && wholeNumber(env, "WORLD_SIZE", 1, MAX_SIZE) > 1) {
    const port = wholeNumber(env, "MASTER_PORT", 1, 65535);
    if (!underAgent) return port;
    return port + TORCHRUN_OFFSET <= 65535 ? port + TORCHRUN_OFFSET : port - TORCHRUN_OFFSET;
  }
  const job = name === "Slurm"
    ? [env("SLURM_JOB_ID") ?? env("SLURM_JOBID"), env("SLURM_STEP_ID")]
    : [env("PMIX_NAMESPACE") ?? env("OMPI_MCA_ess_base_jobid")];
  if (job[0] === undefined) return DEFAULT_PORT;
  return 20000 + createHash("sha256").update(job.join(".")).digest().readUInt32BE(0) % 10000;
}

function noLauncher(env: Environment): Error {
  const others = ["WORLD_SIZE", "LOCAL_RANK", ...LAUNCHERS.flatMap(({ size }) => size)];
  const set = firstSet(env, others.filter((name) => !name.startsWith("SLURM_")));
  if (set) {
    const rank = LAUNCHERS.find(({ size }) => size.includes(set))?.rank ?? "RANK";
    return new RangeError(`${WHAT}: ${rank} is not set although ${set} is, expected this process's rank, from 0`);
  }
  const message = `${WHAT}: no launcher has set a rank (${LAUNCHERS.map(({ rank }) => rank).join(", ")}). Either
- start the ranks of this machine together: bun scripts/launch.ts --ranks 8 script.ts (or: deno run -A scripts/launch.ts ...),
- use a launcher: torchrun --no-python --nproc-per-node 8 bun script.ts, srun -n 8 bun script.ts, mpirun -n 8 bun script.ts,
- or do without: Group.connect({ rank, size, host, port }) in each process, or Group.local(8) for all ranks in this thread`;
  return new EpError(message, { code: "invalidArgument", op: "fromEnv" });
}

/** Reads this process's environment. Under Deno each variable that may not be read counts as not set. */
export function launcherFromProcess(): LauncherFacts {
  const denied: string[] = [];
  const read: Environment = (name) => {
    try {
      return process.env[name] || undefined;
    } catch {
      if (!denied.includes(name)) denied.push(name);
      return undefined;
    }
  };
  try {
    return readLauncher(read);
  } catch (error) {
    if (denied.length === 0) throw error;
    const needed = "RANK,WORLD_SIZE,LOCAL_RANK,MASTER_ADDR,MASTER_PORT,DEEPEP_SECRET";
    const message = `${WHAT}: Deno does not allow to read ${denied.join(", ")}: run with --allow-env, or with ` +
      `--allow-env=${needed} and whatever else your launcher sets`;
    throw new EpError(message, { code: "system", op: "fromEnv", cause: error });
  }
}
