// The second synchronisation of a dispatch: every rank has put its rows where they belong.
//
// In: the ranks that take part and their slots. Out: flags raised in the peers, and later the peers' flags seen here: of every
// block of theirs that sends, or where ranks may be left out of their leader. Callers: dispatch, in both modes, between the
// last row and the end.
#pragma once

#include "leader.cuh"

namespace deepep {

// Whether a peer has left this rank out, as one lane for each rank sees it; the leader makes the failure of it at the end.
__device__ inline bool must_stop(const CallParams& p, const CallShared& s, uint64_t view) {
  bool stop = false;
  for (uint32_t from = threadIdx.x % kWarpLanes; from < p.options.num_ranks; from += kWarpLanes) {
    if (from == p.rank) continue;
    // A hint of what announce() of that rank says; the leader acquires it at the end.
    const Abort abort = abort_from_word(load_relaxed_sys(abort_at(own_memory(p), p.regions, from)));
    stop = stop || (abort.culprit == p.rank && abort.epoch != 0 && abort.epoch <= s.epoch && abort.epoch > s.base_epoch &&
                    in_view(view, from));
  }
  return __any_sync(kAllLanes, stop);
}

// One warp, when the block has met: its rows are in place, which the ranks in the view are told, by the first `blocks` blocks.
// With the leader's goes whom this rank counts in; `slots`: by rank, nullptr on the other blocks, and in low latency.
__device__ inline void announce_block(const CallParams& p, uint64_t view, uint64_t epoch, uint32_t blocks,
                                      const uint32_t* slots) {
  for (uint32_t dst = threadIdx.x % kWarpLanes; dst < p.options.num_ranks; dst += kWarpLanes) {
    if (dst == p.rank || !in_view(view, dst)) continue;
    if (slots != nullptr) {
      store_relaxed_sys(slot_word_at(p.symmetric[dst], p.regions.pushed_view, p.rank, slots[dst]), view);
    }
    // Pairs with have_pushed() of `dst`.
    release_to_peers(p, row_flags_at(p.symmetric[dst], p.regions, p.rank) + blockIdx.x, row_flag(epoch, blocks));
  }
  __syncwarp();
}

// One warp: whether all blocks of a rank have told of this call. What one lane has acquired, all have. Pairs with
// announce_block() of `src`.
__device__ inline bool have_pushed(const CallParams& p, uint64_t epoch, uint32_t src) {
  const uint64_t* flags = row_flags_at(own_memory(p), p.regions, src);
  uint64_t word = load_acquire_sys(flags + lane_id());
  const uint64_t first = __shfl_sync(kAllLanes, word, 0);
  // Where a receive half comes late, a later call may be under way, with other blocks: those of this one had ended before.
  if (epoch_of_row_flag(first) > epoch) {
    __syncwarp();
    return true;
  }
  bool has = epoch_of_row_flag(first) == epoch;
  const uint32_t blocks = blocks_of_row_flag(first);
  for (uint32_t block = lane_id(); has && block < blocks; block += kWarpLanes) {
    if (block >= kWarpLanes) word = load_acquire_sys(flags + block);
    has = epoch_of_row_flag(word) >= epoch;
  }
  has = __all_sync(kAllLanes, has);
  __syncwarp();
  return has;
}

// A warp of `warps` looks at its share of the ranks in turn, so that one that is late hides no other. Of those whose blocks
// have told it calls `came(src, at_once)`, and goes on with the others as long as `goes_on(looks)`. A whole converged warp.
template <class Came, class GoesOn>
__device__ inline void look_in_turn(const CallParams& p, uint64_t epoch, uint64_t view, uint32_t warp, uint32_t warps,
                                    Came came, GoesOn goes_on) {
  uint64_t mine = 0;
  for (uint32_t src = warp; src < p.options.num_ranks; src += warps) mine |= rank_bit(src);
  mine &= view & ~rank_bit(p.rank);
  for (uint32_t looks = 1; mine != 0; ++looks) {
    for (uint64_t rest = mine; rest != 0; rest &= rest - 1) {
      const auto src = static_cast<uint32_t>(__ffsll(static_cast<long long>(rest)) - 1);
      if (!have_pushed(p, epoch, src)) continue;
      mine &= ~rank_bit(src);
      if (lane_id() == 0) came(src, looks == 1);
    }
    if (!goes_on(looks)) return;
  }
}

// What the leader's block finds of the peers' blocks while its first warp waits for this rank's. Zeroed before a meeting.
struct PushedShared {
  uint64_t came;                       // ranks whose blocks have told
  uint64_t came_ns[DEEPEP_MAX_RANKS];  // when; 0 = at the first look, or not yet
  uint32_t torn;                       // 1 = some rank of them counts in others than this one: see check_views()

  __device__ void clear() {
    for (uint32_t rank = threadIdx.x; rank < DEEPEP_MAX_RANKS; rank += blockDim.x) came_ns[rank] = 0;
    if (threadIdx.x == 0) came = 0, torn = 0;
  }
};

// Whom a rank counts in that has told of this call. Set before it tells: see announce_block(), announce_pushed().
__device__ inline uint64_t pushed_view_of(const CallParams& p, uint32_t src) {
  return load_relaxed_sys(slot_word_at(own_memory(p), p.regions.pushed_view, src, p.slot));
}

// The other warps: wait some microseconds. The block must meet afterwards.
__device__ inline void look_for_blocks(const CallParams& p, const CallShared& s, PushedShared& pushed, uint64_t view) {
  look_in_turn(
      p, s.epoch, view, threadIdx.x / kWarpLanes - 1, blockDim.x / kWarpLanes - 1,
      [&](uint32_t src, bool at_once) {
        if (!at_once) pushed.came_ns[src] = global_time_ns();
        if (pushed_view_of(p, src) != view) atomicOr(&pushed.torn, 1u);
        atomicOr(reinterpret_cast<unsigned long long*>(&pushed.came), rank_bit(src));
      },
      [](uint32_t looks) { return looks < Waits::kSoonLooks; });
}

// A warp, when the block has met: accounts what was waited for the others since this rank's blocks had ended.
__device__ inline void account_for_blocks(Leader& leader, const PushedShared& pushed, uint64_t ended_ns) {
  for (uint32_t src = leader.lane; src < leader.p.options.num_ranks; src += kWarpLanes) {
    if (pushed.came_ns[src] > ended_ns) leader.account_for(src, 0, pushed.came_ns[src] - ended_ns);
  }
}

// Leader's warp: those that have not told yet, or count in others than this rank.
__device__ inline uint64_t late_blocks(const Leader& leader, const PushedShared& pushed, uint64_t view) {
  const CallParams& p = leader.p;
  uint64_t late = view & ~pushed.came & ~rank_bit(p.rank);
  // Once more: nobody has waited where this block ended long before others.
  for (uint64_t rest = late; rest != 0; rest &= rest - 1) {
    const auto src = static_cast<uint32_t>(__ffsll(static_cast<long long>(rest)) - 1);
    if (have_pushed(p, leader.s.epoch, src) && pushed_view_of(p, src) == view) late &= ~rank_bit(src);
  }
  return late;
}

// One lane, for a finding: the earliest call of which the blocks of a rank have told.
__device__ inline uint64_t least_pushed(const CallParams& p, uint32_t src) {
  const uint64_t* flags = row_flags_at(own_memory(p), p.regions, src);
  const uint64_t first = load_relaxed_sys(flags);
  uint64_t least = epoch_of_row_flag(first);
  for (uint32_t block = 1; block < blocks_of_row_flag(first); ++block) {
    const uint64_t epoch = epoch_of_row_flag(load_relaxed_sys(flags + block));
    least = epoch < least ? epoch : least;
  }
  return least;
}

// Leader's warp: this rank's rows are in place, which the ranks in the view are told. `slots`: by rank.
__device__ inline void announce_pushed(const Leader& leader, uint64_t view, const uint32_t* slots) {
  const CallParams& p = leader.p;
  for (uint32_t dst = leader.lane; dst < p.options.num_ranks; dst += kWarpLanes) {
    if (dst == p.rank || !in_view(view & ~leader.s.lost, dst)) continue;
    store_relaxed_sys(slot_word_at(p.symmetric[dst], p.regions.pushed_view, p.rank, slots[dst]), view);
    // Pairs with the wait in wait_pushed() of `dst`.
    release_to_peers(p, slot_word_at(p.symmetric[dst], p.regions.pushed, p.rank, slots[dst]), leader.s.epoch);
  }
  __syncwarp();
}

// Fails a call in which this rank and `src` push with different views.
DEEPEP_COLD __device__ inline void fail_torn(Leader leader, uint64_t view, uint32_t src, uint64_t theirs) {
  const auto peer = static_cast<uint32_t>(__ffsll(static_cast<long long>(theirs ^ view)) - 1);
  Finding finding;
  finding.code = DEEPEP_ERROR_ABORTED;
  finding.reason = Reason::torn_view;
  finding.peer = static_cast<int32_t>(peer);
  finding.a = static_cast<int32_t>(in_view(view, peer) ? leader.p.rank : src);
  finding.b = static_cast<int32_t>(in_view(view, peer) ? src : leader.p.rank);
  finding.expected = static_cast<int64_t>(view);
  finding.seen = static_cast<int64_t>(theirs);
  leader.fail(finding);
  leader.announce_failure();
}

// Leader's warp: of those that came, whether all count in the same ranks. When a rank disappears between two looks, one rank
// may count it in and another not; their rows then have other places, so the call fails.
__device__ inline void check_views(Leader& leader, uint64_t view, uint64_t came) {
  const CallParams& p = leader.p;
  const uint64_t torn = leader.ranks_where([&](uint32_t src) { return in_view(came, src) && pushed_view_of(p, src) != view; });
  if (torn == 0) return;
  const auto src = static_cast<uint32_t>(__ffsll(static_cast<long long>(torn)) - 1);
  fail_torn(leader, view, src, pushed_view_of(p, src));
}

// Leader's warp, where ranks may be left out: waits for everyone's rows. Returns the ranks whose rows will not come.
__device__ inline uint64_t wait_pushed(Leader& leader, uint64_t view) {
  const CallParams& p = leader.p;
  if (!leader.enter(DEEPEP_PHASE_ARRIVE)) return 0;
  leader.begin_waits();
  const uint64_t came = leader.wait_for(view, {Reason::late_rows, leader.s.epoch, 0, false}, [&](uint32_t src) {
    return slot_word_at(own_memory(p), p.regions.pushed, src, p.slot);
  });
  if (leader.failed()) return 0;
  check_views(leader, view, came);
  return leader.failed() ? 0 : view & ~came & ~rank_bit(p.rank);
}

// The same elsewhere, when the blocks of all but `late` have told.
DEEPEP_COLD __device__ inline void wait_for_late_blocks(Leader leader, uint64_t late, uint64_t begin_ns) {
  const CallParams& p = leader.p;
  const uint64_t epoch = leader.s.epoch;
  leader.begin_waits();
  const auto come = [&](uint64_t pending) {
    uint64_t came = 0;
    for (uint64_t rest = pending; rest != 0; rest &= rest - 1) {
      const auto src = static_cast<uint32_t>(__ffsll(static_cast<long long>(rest)) - 1);
      if (have_pushed(p, epoch, src)) came |= rank_bit(src);
    }
    return came;
  };
  const auto seen = [&](uint32_t src) { return least_pushed(p, src); };
  leader.wait_until(late, {Reason::late_rows, epoch, 0, false}, come, seen, begin_ns);
}

}  // namespace deepep
