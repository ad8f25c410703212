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
import type { CombineOutput, RankOutput } from "../../lib/reference/mod.ts";
import type { Delay } from "./driver.ts";
import { freePort } from "./drivers.ts";
import type { HostLowLatency } from "./rank_host.ts";
import { type BackendSubject, suite } from "./suite.ts";
import { processRank } from "./transport.ts";

const numTopk = 2, hidden = 16, numTokens = 2;
const everybody = [0, 1, 2], survivors = [0, 2];
const input = (rank: number) => ({
  numTokens,
  rowBytes: 2 * hidden,
  x: new Uint8Array(2 * hidden * numTokens).fill(rank),
  topkIdx: Int32Array.of(0, 2, 4, 1),
});

type Rank = Awaited<ReturnType<typeof processRank>>;

async function start(backend: BackendSubject["backend"]): Promise<Rank[]> {
  const port = await freePort(), secret = crypto.randomUUID();
  const most = { maxTokensPerRank: numTokens, maxLowLatencyTokensPerRank: numTokens };
  const options = { numRanks: 3, hidden, numExperts: 6, numTopk, ...most, backend };
  return await Promise.all(everybody.map((rank) => processRank({ rank, size: 3, port, secret, options })));
}

/** A way to send tokens there and back through identity experts. Results are numbered. */
interface Mode {
  readonly dispatch: Delay["op"];
  readonly combine: Delay["op"];
  /** What is added to the name of an operation. */
  readonly how: string;
  send(rank: Rank, place: number, id: number): Promise<unknown>;
  /** `received`: what `send` gave. Answers the combined tokens. */
  back(rank: Rank, place: number, id: number, received: unknown): Promise<Uint16Array>;
  /** What survivors receive when rank 1 is left out, in short. */
  short(received: unknown): number[];
  readonly survivorsReceive: readonly (readonly number[])[];
}

const normal: Mode = {
  dispatch: "dispatch",
  combine: "combine",
  how: "",
  // -1: no cached routing.
  send: (rank, place, id) => rank.call("dispatch", [id, input(place), { numTopk }, -1]),
  async back(rank, _, id, received) {
    const { output } = received as { output: RankOutput }, x = new Uint16Array(output.x.slice().buffer);
    const tokens = { numTokens, numTopk, expertLayout: false };
    return (await rank.call("combine", [id, { x }, { hidden }, tokens]) as CombineOutput).x;
  },
  short: (received) => [...(received as { output: RankOutput }).output.numTokensPerRank],
  // Both tokens of a rank go to rank 0, one of them to rank 2.
  survivorsReceive: [[2, 0, 2], [1, 0, 1]],
};

const lowLatency = (recvHook: boolean): Mode => ({
  dispatch: "lowLatencyDispatch",
  combine: "lowLatencyCombine",
  how: recvHook ? ", in two halves" : "",
  async send(rank, place, id) {
    await rank.call("lowLatencySend", [id, input(place), { numTopk, recvHook }]);
    return await rank.call("lowLatencyReceive", [id]);
  },
  async back(rank, place, id, received) {
    const x = (received as HostLowLatency).output.experts.map((rows) => new Uint16Array(rows.x.slice().buffer));
    const { topkIdx } = input(place);
    await rank.call("lowLatencyCombineSend", [id, { x, numTokens, topkIdx }, { hidden, recvHook }]);
    return await rank.call("lowLatencyCombineReceive", [id]) as Uint16Array;
  },
  short: (received) => [...(received as HostLowLatency).output.numTokensPerExpert],
  survivorsReceive: [[2, 2], [2, 0]],
});

const reason = (call: Promise<unknown>): Promise<unknown> => call.then(() => null, (error) => error);

/** Survivors whose call needed nothing more of rank 1 hear of its death in the next one. */
async function hear(ranks: readonly Rank[], calls: readonly Promise<unknown>[], mode: Mode): Promise<void> {
  const began = performance.now();
  const heard = await Promise.all(calls.map(reason));
  const reasons = await Promise.all(
    survivors.map((rank) => heard[rank] ?? reason(mode.send(ranks[rank]!, rank, 2))),
  );
  // The deadline of the waits is 20 s; a dead process is seen long before it.
  assert(performance.now() - began < 10_000, `${performance.now() - began} ms`);
  for (const [i, why] of reasons.entries()) {
    assert(why instanceof EpError, `rank ${survivors[i]}: ${why}`);
    assert(["peerLost", "aborted", "needsRecovery"].includes(why.code), why.message);
    assertEquals(why.peer, 1, why.message);
  }
}

/** The survivors go on without rank 1, in every mode. */
async function goOn(ranks: readonly Rank[], modes: readonly Mode[]): Promise<void> {
  await Promise.all(survivors.map((rank) => ranks[rank]!.call("releaseAll", [])));
  await Promise.all(survivors.map((rank) => ranks[rank]!.call("recover", [[1]])));
  for (const [i, mode] of [...modes, ...modes, ...modes].entries()) {
    const id = 100 + i, got = await Promise.all(survivors.map((rank) => mode.send(ranks[rank]!, rank, id)));
    assertEquals(got.map((received) => mode.short(received)), mode.survivorsReceive);
    const back = await Promise.all(survivors.map((rank, j) => mode.back(ranks[rank]!, rank, id, got[j])));
    // A token comes back once for each expert's rank that is left: token 0 from rank 0, token 1 from ranks 0 and 2.
    const [once, twice] = [0x0202, 0x0282]; // the bytes of rank 2, as bf16, and their double
    assertEquals(back.map((x) => [x[0], x[hidden]]), [[0, 0], [once, twice]]);
    await Promise.all(survivors.map((rank) => ranks[rank]!.call("release", [id])));
  }
  await Promise.all(survivors.map((rank) => ranks[rank]!.close()));
}

/** Enters all calls and answers them; rank 1's is the one that ends with its process. */
type Kill = (ranks: readonly Rank[], mode: Mode) => Promise<Promise<unknown>[]>;

const phases = {
  dispatch: ["notify", "send", "arrive"],
  combine: ["publish", "reduce"],
} as const;

/** Rank 1 does something in a phase of a dispatch or combine that all make. */
const during =
  (part: "dispatch" | "combine", phase: Delay["phase"], how: Partial<Delay>): Kill => async (ranks, mode) => {
    const calls = (make: (rank: Rank, place: number) => Promise<unknown>) => ranks.map(make);
    const inject = () => ranks[1]!.call("inject", [{ op: mode[part], phase, ...how }]);
    if (part === "dispatch") {
      await inject();
      return calls((rank, place) => mode.send(rank, place, 1));
    }
    const got = await Promise.all(calls((rank, place) => mode.send(rank, place, 1)));
    await inject();
    return calls((rank, place) => mode.back(rank, place, 1, got[place]));
  };

/** Late enough in the phase for the others to be waiting, then gone. */
const fromOutside = (part: "dispatch" | "combine", phase: Delay["phase"]): Kill => async (ranks, mode) => {
  const calls = await during(part, phase, { delayUs: 2_000_000 })(ranks, mode);
  setTimeout(() => ranks[1]!.process.kill("SIGKILL"), 300);
  return calls;
};

const atRest: Kill = async (ranks, mode) => {
  const gone = new Promise((resolve) => ranks[1]!.process.once("exit", resolve));
  ranks[1]!.process.kill("SIGKILL");
  await gone;
  return everybody.map((rank) => rank === 1 ? Promise.resolve() : mode.send(ranks[rank]!, rank, 1));
};

/** Registers the cases. */
export function runProcessCases(
  { name, backend, skip, skipLowLatency, mps = false }: BackendSubject & { mps?: boolean },
): void {
  const folder = "/dev/shm"; // other programs have files there too
  const files = () => existsSync(folder) ? readdirSync(folder).filter((name) => name.includes("deepep")) : [];
  const modes = skipLowLatency ? [normal] : [normal, lowLatency(false)];
  const killed = (when: string, mode: Mode, kill: Kill, skip: string | false = false) => {
    // Bun tells of a skipped test nothing but its name.
    const why = skip ? ` (skipped: ${skip})` : "";
    test(`${when}: the others are told who, at once, and go on; nothing is left behind${why}`, { skip }, async () => {
      const ranks = await start(backend);
      await Promise.all(ranks.map((rank, place) => mode.send(rank, place, 0)));
      await Promise.all(ranks.map((rank) => rank.call("release", [0])));
      await hear(ranks, await kill(ranks, mode), mode);
      await goOn(ranks, modes);
      assertEquals(files(), []);
    });
  };

  const inKernel = mps && "under MPS a client that is killed in a kernel ends the others' kernels too";
  const everyPhase = (mode: Mode) => {
    const words = { dispatch: `a ${mode.dispatch}${mode.how}`, combine: `a ${mode.combine}${mode.how}` };
    for (const part of ["dispatch", "combine"] as const) {
      for (const phase of phases[part]) {
        killed(`from outside, late in ${phase} of ${words[part]}`, mode, fromOutside(part, phase), inKernel);
        killed(`by itself, in ${phase} of ${words[part]}`, mode, during(part, phase, { action: "exit" }));
      }
    }
  };
  suite(`${name}: a process that is killed`, skip, () => {
    everyPhase(normal);
    killed("from outside, at rest", normal, atRest);
  });
  suite(`${name}: a process that is killed, low latency`, skip || skipLowLatency, () => {
    everyPhase(lowLatency(false));
    everyPhase(lowLatency(true));
    killed("from outside, at rest", lowLatency(false), atRest);
  });
}
