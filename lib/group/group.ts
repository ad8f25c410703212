/**
 * The control plane: who takes part, small exchanges of bytes, barriers. Never the data plane.
 *
 * In: options or a launcher's environment. Out: a {@linkcode Group}, which `EpBuffer.create` takes. All ranks of one
 * thread (`local.ts`) and ranks in workers or processes (`tcp.ts`) keep to the same rules, written down here.
 */
import { launcherFromProcess } from "./env.ts";
import { localGroups } from "./local.ts";
import { connectTcp } from "./tcp.ts";

/** Options of a collective. */
export interface CollectiveOptions {
  /** Deadline in milliseconds, 1 to 2^31 - 1. The first one that passes ends the collective for all. Default: the group's. */
  timeoutMs?: number;
  /** The ranks that take part, the caller among them, in any order; all of them pass the same. Default: all ranks. */
  ranks?: readonly number[];
}

/**
 * Ranks that know each other. Get one from {@linkcode Group.local}, {@linkcode Group.fromEnv} or
 * {@linkcode Group.connect}; release it with `await using` or `await group[Symbol.asyncDispose]()`.
 *
 * Collectives are matched by their set of ranks and their order: every rank of a set makes the same calls with it in the
 * same order, and ranks of overlapping sets make their common calls in the same order. Calls need not be awaited one by
 * one. A collective ends alike on every rank in it: all resolve, or all reject with the same error, also a rank that
 * comes after the failure. The next collective is not affected.
 *
 * They reject with an `EpError` whose `code` is
 * - `timeout`: ranks did not come within the deadline; the message names them all, `peer` is the first;
 * - `peerLost`: `peer` has ended or has left. Collectives without it go on, as long as rank 0 lives, which hosts a TCP group;
 * - `mismatch`: ranks wait for each other in different collectives;
 * - `closed`: this rank has disposed its group.
 */
export interface Group extends AsyncDisposable {
  /** This rank, from 0. */
  readonly rank: number;
  /** The number of ranks. */
  readonly size: number;
  /** This rank's position among those of its machine, from 0: which GPU to take. */
  readonly localRank: number;

  /**
   * Collective. Gives every rank the bytes of every rank: entry `r` is rank `r`'s, copied to the start of its own memory.
   * Ranks may give different lengths. Entries of ranks that do not take part are empty.
   *
   * @param data At most 1 MiB; copied before the call returns.
   * @throws {RangeError} If `data` is longer, or `ranks` or `timeoutMs` is out of range.
   */
  allGather(data: Uint8Array, options?: CollectiveOptions): Promise<Uint8Array[]>;

  /** Collective. Resolves when every rank has called it. */
  barrier(options?: CollectiveOptions): Promise<void>;

  /**
   * Leaves the group; not collective. Calls of this rank that are pending reject with `closed`, collectives that wait for
   * it elsewhere with `peerLost`. Never rejects, takes at most about two seconds, may be called again. When rank 0 leaves
   * a TCP group, collectives end on all ranks: make a barrier first.
   */
  [Symbol.asyncDispose](): Promise<void>;
}

/** Options of {@linkcode Group.local}. */
export interface LocalOptions {
  /** Default deadline of collectives, milliseconds. Default: 30000. */
  timeoutMs?: number;
}

/** Options that {@linkcode Group.connect} and {@linkcode Group.fromEnv} share. */
export interface JoinOptions {
  /** The job's secret, the same text on every rank; needed unless the host is loopback. {@linkcode Group.fromEnv}: DEEPEP_SECRET. */
  secret?: string;
  /** How long to wait for all ranks, and the default deadline of collectives, milliseconds. Default: 30000. */
  timeoutMs?: number;
  /** How long a connection may take to prove itself to rank 0, milliseconds. Default: 5000. */
  handshakeTimeoutMs?: number;
  /** Told of refused connections (each reason and address once, 20 in all) and of ranks that end without leaving. Default: `console.warn`. */
  log?: (message: string) => void;
}

/** Options of {@linkcode Group.connect}. */
export interface ConnectOptions extends JoinOptions {
  /** This rank, from 0. Rank 0 hosts the group. */
  rank: number;
  /** The number of ranks, 1 to 4096. */
  size: number;
  /** Name or address of rank 0's machine, as the other ranks reach it. */
  host: string;
  /** The port that rank 0 listens on until all ranks have joined. */
  port: number;
  /** This rank's position on its machine. Default: `rank` if the host is loopback, else 0. */
  localRank?: number;
}

/** The ways to get a {@linkcode Group}. */
export interface GroupStatic {
  /**
   * `size` ranks driven by this thread, element `r` being rank `r`. The same rules and errors as over TCP; nothing is
   * sent anywhere and nothing needs a permission.
   *
   * ```ts
   * import { Group } from "@deepep/deepep";
   * const groups = Group.local(4);
   * const all = await Promise.all(groups.map((group) => group.allGather(new Uint8Array([group.rank]))));
   * if (all[1]![3]![0] !== 3) throw new Error("rank 1 did not get rank 3's byte");
   * ```
   *
   * @throws {RangeError} If `size` is not 1 to 4096.
   */
  local(size: number, options?: LocalOptions): Group[];

  /**
   * Joins the group that a launcher's variables describe: torchrun's (also set by `scripts/launch.ts`), Open MPI's,
   * MPICH's and Intel MPI's, Slurm's; `env.ts` tells which, and how address and port follow. Collective: all ranks join.
   *
   * @throws {RangeError} If a variable is missing, malformed or contradicts another; the message names it.
   * @throws {EpError} `invalidArgument` without any such variable, `system` if the environment may not be read, and as
   * {@linkcode GroupStatic.connect}.
   */
  fromEnv(options?: JoinOptions): Promise<Group>;

  /**
   * Joins a group over TCP. Collective: resolves when all ranks have joined, whichever starts first. Deno needs
   * `--allow-net=host:port`, or all of `--allow-net` on rank 0 if the host is not loopback. Rank 0 listens on the loopback interface if `host` is loopback (127.x.x.x, ::1,
   * localhost), else on all interfaces, and stops listening when the group is complete.
   *
   * Every connection proves that it knows the secret, by a challenge from both sides, and every message is signed, numbered
   * and at most about 1 MiB. Nothing is encrypted. On loopback the secret may be left out; it then follows from the port,
   * which keeps out jobs that meet by mistake but not other users of the machine.
   *
   * @throws {RangeError} If an option is out of range, or a host other than loopback comes without a secret of at least
   * 16 characters.
   * @throws {EpError} `timeout` if ranks are missing at the deadline: every rank that waits gets the message that names
   * them; `mismatch` if rank 0 refuses this one (other secret, other size, rank taken), at once; `system` if rank 0 cannot
   * listen or the network is forbidden.
   */
  connect(options: ConnectOptions): Promise<Group>;
}

/** The ways to get a {@linkcode Group}. */
export const Group: GroupStatic = {
  local(size: number, options: LocalOptions = {}): Group[] {
    return localGroups(size, options);
  },
  async fromEnv(options: JoinOptions = {}): Promise<Group> {
    const { rank, size, localRank, host, port, secret } = launcherFromProcess();
    return await connectTcp({ ...options, rank, size, localRank, host, port, secret: options.secret ?? secret });
  },
  connect(options: ConnectOptions): Promise<Group> {
    return connectTcp(options);
  },
};
