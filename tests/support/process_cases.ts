/**
 * Ranks in processes that are killed: what the others hear, and how they go on. In: a backend. Out: tests.
 *
 * World: 3 ranks, 6 experts, every token of each goes to two ranks; rank 1 is the one that dies. It is killed from outside
 * while it is late in a phase, or at rest; or it ends by itself, as kill -9 would make it, on entering a phase.
 */
import { existsSync, readdirSync } from "node:fs";
import { test } from "node:test";
import { assert, assertEquals } from "@std/assert";
import { EpError } from "@deepep/deepep";
import type { RankOutput } from "../../lib/reference/mod.ts";
import { freePort } from "./drivers.ts";
import { type BackendSubject, suite } from "./suite.ts";
import { processRank } from "./transport.ts";

const numTopk = 2, hidden = 16, numTokens = 2;
const survivors = [0, 2];
const input = (rank: number) => ({
  numTokens,
  rowBytes: 2 * hidden,
  x: new Uint8Array(2 * hidden * numTokens).fill(rank),
  topkIdx: Int32Array.of(0, 2, 4, 1),
});

type Rank = Awaited<ReturnType<typeof processRank>>;

async function start(backend: BackendSubject["backend"]): Promise<Rank[]> {
  const port = await freePort(), secret = crypto.randomUUID();
  const options = { numRanks: 3, hidden, numExperts: 6, numTopk, maxTokensPerRank: numTokens, backend };
  return await Promise.all([0, 1, 2].map((rank) => processRank({ rank, size: 3, port, secret, options })));
}

/** Results of dispatches are numbered; -1: no cached routing. */
const dispatch = (ranks: readonly Rank[], rank: number, id: number): Promise<{ output: RankOutput }> =>
  ranks[rank]!.call("dispatch", [id, input(rank), { numTopk }, -1]) as Promise<{ output: RankOutput }>;

function combine(ranks: readonly Rank[], rank: number, id: number, { output }: { output: RankOutput }) {
  const x = new Uint16Array(output.x.slice().buffer);
  return ranks[rank]!.call("combine", [id, { x }, { hidden }, { numTokens, numTopk, expertLayout: false }]);
}

const reason = (call: Promise<unknown>): Promise<unknown> => call.then(() => null, (error) => error);

/** Survivors whose call needed nothing more of rank 1 hear of its death in the next one. */
async function hear(ranks: readonly Rank[], calls: readonly Promise<unknown>[], id: number): Promise<void> {
  const began = performance.now();
  const heard = await Promise.all(calls.map(reason));
  const reasons = await Promise.all(
    survivors.map((rank) => heard[rank] ?? reason(dispatch(ranks, rank, id))),
  );
  // The deadline of the waits is 20 s; a dead process is seen long before it.
  assert(performance.now() - began < 10_000, `${performance.now() - began} ms`);
  for (const [i, why] of reasons.entries()) {
    assert(why instanceof EpError, `rank ${survivors[i]}: ${why}`);
    assert(["peerLost", "aborted", "needsRecovery"].includes(why.code), why.message);
    assertEquals(why.peer, 1, why.message);
  }
}

/** The survivors go on without rank 1. */
async function goOn(ranks: readonly Rank[]): Promise<void> {
  await Promise.all(survivors.map((rank) => ranks[rank]!.call("releaseAll", [])));
  await Promise.all(survivors.map((rank) => ranks[rank]!.call("recover", [[1]])));
  for (const id of [100, 101, 102]) {
    const got = await Promise.all(survivors.map((rank) => dispatch(ranks, rank, id)));
    // Both tokens of a rank go to rank 0, one of them to rank 2.
    assertEquals(got.map(({ output }) => [...output.numTokensPerRank]), [[2, 0, 2], [1, 0, 1]]);
    await Promise.all(survivors.map((rank, i) => combine(ranks, rank, id, got[i]!)));
    await Promise.all(survivors.map((rank) => ranks[rank]!.call("release", [id])));
  }
  await Promise.all(survivors.map((rank) => ranks[rank]!.close()));
}

/** Registers the cases. */
export function runProcessCases({ name, backend, skip, mps = false }: BackendSubject & { mps?: boolean }): void {
  suite(`${name}: a process that is killed`, skip, () => {
    const files = () => backend === "cpu" && existsSync("/dev/shm") ? readdirSync("/dev/shm").length : 0;
    const killed = (when: string, kill: (ranks: Rank[]) => Promise<Promise<unknown>[]>, skip: string | false = false) =>
      test(`${when}: the others are told who, at once, and go on; nothing is left behind`, { skip }, async () => {
        const before = files(), ranks = await start(backend);
        await Promise.all([0, 1, 2].map((rank) => dispatch(ranks, rank, 0)));
        await Promise.all(ranks.map((rank) => rank.call("release", [0])));
        await hear(ranks, await kill(ranks), 2);
        await goOn(ranks);
        assertEquals(files(), before);
      });

    const inKernel = mps && "under MPS a client that is killed in a kernel ends the others' kernels too";
    for (const phase of ["notify", "send", "arrive"] as const) {
      killed(`from outside, late in ${phase} of a dispatch`, async (ranks) => {
        // Late enough in the phase for the others to be waiting, then gone.
        await ranks[1]!.call("inject", [{ op: "dispatch", phase, delayUs: 2_000_000 }]);
        const calls = [0, 1, 2].map((rank) => dispatch(ranks, rank, 1));
        setTimeout(() => ranks[1]!.process.kill("SIGKILL"), 300);
        return calls;
      }, inKernel);
      killed(`by itself, in ${phase} of a dispatch`, async (ranks) => {
        await ranks[1]!.call("inject", [{ op: "dispatch", phase, action: "exit" }]);
        return [0, 1, 2].map((rank) => dispatch(ranks, rank, 1));
      });
    }
    for (const phase of ["publish", "reduce"] as const) {
      killed(`by itself, in ${phase} of a combine`, async (ranks) => {
        const got = await Promise.all([0, 1, 2].map((rank) => dispatch(ranks, rank, 1)));
        await ranks[1]!.call("inject", [{ op: "combine", phase, action: "exit" }]);
        return [0, 1, 2].map((rank) => combine(ranks, rank, 1, got[rank]!));
      });
    }
    killed("from outside, at rest", async (ranks) => {
      const gone = new Promise((resolve) => ranks[1]!.process.once("exit", resolve));
      ranks[1]!.process.kill("SIGKILL");
      await gone;
      return [0, 1, 2].map((rank) => rank === 1 ? Promise.resolve() : dispatch(ranks, rank, 1));
    });
  });
}
