/** The launchers' variables: what each gives, and what is said when they are missing, malformed or at odds. */
import { test } from "node:test";
import { spawnSync } from "node:child_process";
import process from "node:process";
import { assert, assertEquals, assertThrows } from "@std/assert";
import { EpError } from "../lib/error.ts";
import { firstNode, type LauncherFacts, readLauncher } from "../lib/group/env.ts";

type Variables = Record<string, string>;
const read = (variables: Variables): LauncherFacts => readLauncher((name) => variables[name] || undefined);
const without = (variables: Variables, name: string): Variables => ({ ...variables, [name]: "" });

const torch: Variables = { RANK: "9", WORLD_SIZE: "16", LOCAL_RANK: "1", MASTER_ADDR: "node1", MASTER_PORT: "29500" };
const slurm: Variables = {
  SLURM_PROCID: "5",
  SLURM_NTASKS: "8",
  SLURM_LOCALID: "1",
  SLURM_JOB_ID: "4242",
  SLURM_STEP_ID: "0",
  SLURM_STEP_NODELIST: "gpu[07-08,11]",
};
const ompi: Variables = {
  OMPI_COMM_WORLD_RANK: "3",
  OMPI_COMM_WORLD_SIZE: "4",
  OMPI_COMM_WORLD_LOCAL_RANK: "1",
  OMPI_COMM_WORLD_LOCAL_SIZE: "2",
  MASTER_ADDR: "node2",
};
const pmi: Variables = { PMI_RANK: "2", PMI_SIZE: "4", MPI_LOCALRANKID: "2", MPI_LOCALNRANKS: "4" };

test("env: torchrun, and what sets its variables", () => {
  assertEquals(read({ ...torch, DEEPEP_SECRET: "s" }), {
    launcher: "torchrun",
    rank: 9,
    size: 16,
    localRank: 1,
    host: "node1",
    port: 29500,
    secret: "s",
  });
  assertEquals(read({ ...torch, DEEPEP_PORT: "4000" }).port, 4000);
  assertEquals(read({ RANK: "0", WORLD_SIZE: "1", LOCAL_RANK: "0" }).host, "127.0.0.1");
});

test("env: torchrun's agent keeps MASTER_PORT, all ranks of one machine meet on loopback", () => {
  const agent = { ...torch, TORCHELASTIC_RUN_ID: "none", LOCAL_WORLD_SIZE: "8" };
  assertEquals([read(agent).host, read(agent).port], ["node1", 30500]);
  assertEquals(read({ ...agent, MASTER_PORT: "65000" }).port, 64000);
  assertEquals(read({ ...agent, DEEPEP_PORT: "4000" }).port, 4000);
  assertEquals(read({ ...agent, LOCAL_RANK: "9", LOCAL_WORLD_SIZE: "16" }).host, "127.0.0.1");
});

test("env: Slurm", () => {
  const { port, ...rest } = read(slurm);
  assertEquals(rest, { launcher: "Slurm", rank: 5, size: 8, localRank: 1, host: "gpu07", secret: undefined });
  assert(port >= 20000 && port < 30000);
  assertEquals(read({ ...slurm, SLURM_PROCID: "0", SLURM_LOCALID: "0" }).port, port);
  assert(read({ ...slurm, SLURM_STEP_ID: "1" }).port !== port);
  assert(read({ ...slurm, SLURM_JOB_ID: "4243" }).port !== port);
  assertEquals(read({ ...slurm, SLURM_NTASKS: "64", SLURM_STEP_NUM_TASKS: "8" }).size, 8);
  assertEquals(read({ ...slurm, SLURM_STEP_NUM_NODES: "1" }).host, "127.0.0.1");
  assertEquals(read({ ...slurm, SLURM_NNODES: "2", MASTER_ADDR: "gpu11", MASTER_PORT: "1234" }).host, "gpu11");
  assertEquals(read({ ...slurm, MASTER_PORT: "1234", WORLD_SIZE: "8" }).port, 1234);
  const launchNode = { ...without(slurm, "SLURM_STEP_NODELIST"), SLURM_LAUNCH_NODE_IPADDR: "10.0.0.7" };
  assertEquals(read(launchNode).host, "10.0.0.7");
});

test("env: the first node of a list", () => {
  const lists: Variables = {
    "gpu[07-08,11],cpu1": "gpu07",
    "gpu3": "gpu3",
    "a,b": "a",
    "rack[2-4]-node[009,012]-ib,x": "rack2-node009-ib",
    "n[1,3-5]": "n1",
  };
  for (const [list, node] of Object.entries(lists)) assertEquals(firstNode(list), node);
});

test("env: Open MPI, MPICH and PMIx", () => {
  assertEquals(read(ompi), {
    launcher: "Open MPI",
    rank: 3,
    size: 4,
    localRank: 1,
    host: "node2",
    port: 29500,
    secret: undefined,
  });
  const named = { ...ompi, PMIX_NAMESPACE: "prterun-node2-77@1" };
  assert(read(named).port >= 20000 && read(named).port < 30000);
  assertEquals(read({ ...ompi, OMPI_COMM_WORLD_LOCAL_SIZE: "4" }).host, "127.0.0.1");
  const { launcher, rank, size, localRank, host } = read(pmi);
  assertEquals([launcher, rank, size, localRank, host], ["MPICH or Intel MPI", 2, 4, 2, "127.0.0.1"]);
  const pmix = { PMIX_RANK: "1", WORLD_SIZE: "2", LOCAL_RANK: "0", MASTER_ADDR: "n0", PMIX_NAMESPACE: "x" };
  assertEquals([read(pmix).launcher, read(pmix).rank, read(pmix).size], ["PMIx", 1, 2]);
});

test("env: the inner launcher counts: torchrun or mpirun inside a Slurm job", () => {
  assertEquals(read({ ...slurm, ...torch }).launcher, "torchrun");
  assertEquals(read({ ...slurm, ...ompi }).launcher, "Open MPI");
  const noMaster = read({ ...slurm, ...without(ompi, "MASTER_ADDR") });
  assertEquals([noMaster.rank, noMaster.host], [3, "gpu07"]);
  assertEquals(read({ ...slurm, PMI_RANK: "5", PMI_SIZE: "8" }).launcher, "Slurm"); // srun --mpi=pmi2
  assertEquals(read({ ...slurm, ...pmi }).launcher, "MPICH or Intel MPI"); // mpiexec
});

test("env: what is missing, malformed or at odds is named with its value", () => {
  const wrong: [Variables, string][] = [
    [without(torch, "WORLD_SIZE"), "WORLD_SIZE is not set, expected a whole number from 1 to 4096"],
    [without(torch, "RANK"), "RANK is not set although WORLD_SIZE is"],
    [without(torch, "LOCAL_RANK"), "LOCAL_RANK is not set, expected a whole number from 0 to 15"],
    [without(torch, "MASTER_ADDR"), "MASTER_ADDR is not set, expected the name or address of rank 0's machine"],
    [without(torch, "MASTER_PORT"), "MASTER_PORT is not set, expected a whole number from 1 to 65535"],
    [{ ...torch, RANK: "16" }, 'RANK is "16", expected a whole number from 0 to 15'],
    [{ ...torch, RANK: "-1" }, 'RANK is "-1"'],
    [{ ...torch, WORLD_SIZE: "four" }, 'WORLD_SIZE is "four"'],
    [{ ...torch, MASTER_PORT: "0" }, 'MASTER_PORT is "0"'],
    [{ ...torch, DEEPEP_PORT: "1e3" }, 'DEEPEP_PORT is "1e3"'],
    [{ ...torch, LOCAL_RANK: "4", LOCAL_WORLD_SIZE: "4" }, 'LOCAL_RANK is "4", expected a whole number from 0 to 3'],
    [{ ...torch, LOCAL_WORLD_SIZE: "17" }, 'LOCAL_WORLD_SIZE is "17", expected a whole number from 1 to 16'],
    [{ ...slurm, WORLD_SIZE: "4" }, "WORLD_SIZE is 4 and SLURM_NTASKS is 8, expected the same"],
    [without(slurm, "SLURM_NTASKS"), "SLURM_STEP_NUM_TASKS is not set"],
    [without(slurm, "SLURM_LOCALID"), "SLURM_LOCALID is not set"],
    [without(slurm, "SLURM_STEP_NODELIST"), "MASTER_ADDR is not set"],
    [without(ompi, "MASTER_ADDR"), "pass it on with `mpirun -x MASTER_ADDR`"],
    [without(ompi, "OMPI_COMM_WORLD_RANK"), "OMPI_COMM_WORLD_RANK is not set although OMPI_COMM_WORLD_SIZE is"],
    [without(pmi, "PMI_SIZE"), "PMI_SIZE is not set"],
    [{ PMIX_RANK: "1" }, "WORLD_SIZE is not set"],
  ];
  for (const [variables, text] of wrong) {
    assertThrows(
      () => read(variables),
      RangeError,
      `Cannot join from the environment: ${text.startsWith("pass") ? "" : text}`,
    );
    assertThrows(() => read(variables), RangeError, text);
  }
});

test("env: without a launcher the three ways are shown", () => {
  const error = assertThrows(() => read({ SLURM_NTASKS: "8" }), EpError);
  assertEquals(error.code, "invalidArgument");
  for (
    const way of [
      "scripts/launch.ts --ranks",
      "torchrun --no-python",
      "srun",
      "mpirun",
      "Group.connect(",
      "Group.local(",
    ]
  ) {
    assert(error.message.includes(way), way);
  }
});

test(
  "env: an environment that Deno may not read is an error that says what to allow",
  { skip: "Bun" in globalThis },
  () => {
    const url = new URL("../lib/group/env.ts", import.meta.url).href;
    const program = `import { launcherFromProcess } from "${url}";
    try { console.log(launcherFromProcess().rank); } catch (error) { console.log(error.code, error.message); }`;
    const run = (flags: string[]): string => {
      const env = { ...process.env, RANK: "1", WORLD_SIZE: "2", LOCAL_RANK: "1", MASTER_ADDR: "::1", MASTER_PORT: "5" };
      const args = ["run", "--no-prompt", "--allow-read", ...flags, "-"];
      return String(spawnSync(process.execPath, args, { input: program, env, timeout: 30_000 }).stdout);
    };
    const text = run([]);
    assert(text.startsWith("system Cannot join from the environment: Deno does not allow to read RANK, "), text);
    assert(text.includes("--allow-env=RANK,WORLD_SIZE"), text);
    // The rest may stay forbidden.
    assertEquals(run(["--allow-env=RANK,WORLD_SIZE,LOCAL_RANK,MASTER_ADDR,MASTER_PORT"]).trim(), "1");
  },
);
