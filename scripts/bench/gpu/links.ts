/**
 * What the links between devices carry: copies from one device to another, and of all pairs at once, both ways.
 *
 * In: a stage with ranks on several devices. Out: figures, and the two ceilings that calls are held against: gigabytes a second that
 * leave a device, and as many that reach it, while all devices send to all others; by the driver's memcpy, by kernels that store to
 * the other side, and by kernels that load from it. Called by bench.ts. With more than two devices the pairs of a device take turns.
 */
import { DeviceClock } from "./clock.ts";
import type { NaiveLibrary } from "./naive_library.ts";
import { LinkCopies } from "./plain_kernels.ts";
import type { Links, Report } from "./report.ts";
import type { Stage } from "./stage.ts";

/** Bytes of one copy. */
const BYTES = 2 ** 28;
/** Multiprocessors of the kernels, and all of them. */
const SMS = [4, 8, 16, 24] as const;

/** The first rank of each device. */
function oneOfEach(stage: Stage): number[] {
  const deviceOf = stage.ranks.buffers.map(({ deviceIndex }) => deviceIndex);
  return [...deviceOf.keys()].filter((rank) => deviceOf.indexOf(deviceOf[rank]!) === rank);
}

/** Measures them; undefined where all ranks are on one device. */
export async function measureLinks(
  stage: Stage,
  { report, library, repetitions }: { report: Report; library: NaiveLibrary; repetitions: number },
): Promise<Links | undefined> {
  const ranks = oneOfEach(stage), clock = new DeviceClock(stage.ranks, repetitions);
  if (ranks.length < 2) return undefined;
  const all = stage.ranks.buffers[0]!.capabilities.numSms;
  const everyPair = ranks.flatMap((_, i) =>
    ranks.slice(1).map((_, k) => [ranks[i]!, ranks[(i + 1 + k) % ranks.length]!] as const)
  );
  const best = { memcpy: 0, kernel: 0 };
  for (const [ways, pairs] of [["one way", [[ranks[0]!, ranks[1]!]]], ["all pairs", everyPair]] as const) {
    for (const by of ["memcpy", "push", "pull"] as const) {
      for (const blocks of by === "memcpy" ? [0] : [...SMS, all]) {
        using copies = new LinkCopies({ library, stage }, { pairs, by, bytes: BYTES, blocks });
        const { us } = await clock.measure(copies.chain);
        const bytes = BYTES * (ways === "one way" ? 1 : ranks.length - 1), gbs = bytes / us.median / 1000;
        report.add({
          phase: "links",
          op: `link_${by}`,
          form: "copy",
          ranks: ranks.length,
          numSms: blocks,
          tokens: 0,
          dtype: "none",
          layout: "none",
          us,
          more: { ways, linkGBs: gbs, linkBytes: bytes },
        });
        if (ways === "one way") continue;
        const kind = by === "memcpy" ? by : "kernel";
        best[kind] = Math.max(best[kind], gbs);
      }
    }
  }
  return best;
}
