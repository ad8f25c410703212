/**
 * `Group.local`: all ranks of a group in one thread, which drives them in turn. Legal because nothing here blocks, and
 * the same exchange, checks and errors as over TCP. `group.ts` calls.
 */
import { Exchange } from "./exchange.ts";
import type { Group, LocalOptions } from "./group.ts";
import { type Channel, checkTimeout, Member } from "./member.ts";
import { MAX_RANKS } from "./wire.ts";

/** Makes `size` ranks around one exchange. See `Group.local`. */
export function localGroups(size: number, { timeoutMs = 30_000 }: LocalOptions): Group[] {
  if (!Number.isInteger(size) || size < 1 || size > MAX_RANKS) {
    throw new RangeError(`Cannot make local ranks: size is ${size}, expected 1 to ${MAX_RANKS}`);
  }
  checkTimeout("make local ranks", timeoutMs);
  const exchange = new Exchange(size);
  return Array.from({ length: size }, (_, rank) => {
    const channel: Channel = {
      contribute: (contribution) => exchange.contribute(contribution),
      leave: () => {
        exchange.remove(rank, "has left the group");
        return Promise.resolve();
      },
    };
    return new Member({ rank, size, localRank: rank, timeoutMs }, channel);
  });
}
