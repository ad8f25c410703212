// The second synchronisation of a dispatch: every rank has put its rows where they belong.
//
// In: the ranks that take part and their slots. Out: flags raised in the peers, and later the peers' flags seen here. Callers:
// dispatch, in both modes, between the last row and the end.
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

// Leader's warp: this rank's rows are in place, which the ranks in the view are told. `slots`: by rank.
__device__ inline void announce_pushed(const Leader& leader, uint64_t view, const uint32_t* slots) {
  const CallParams& p = leader.p;
  for (uint32_t dst = leader.lane; dst < p.options.num_ranks; dst += kWarpLanes) {
    if (dst == p.rank || !in_view(view & ~leader.s.lost, dst)) continue;
    store_relaxed_sys(slot_word_at(p.symmetric[dst], p.regions.pushed_view, p.rank, slots[dst]), view);
    // Pairs with the wait in wait_pushed() of `dst`.
    store_release_sys(slot_word_at(p.symmetric[dst], p.regions.pushed, p.rank, slots[dst]), leader.s.epoch);
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

// Leader's warp: waits for everyone's rows. Returns the ranks whose rows will not come. When a rank disappears between two
// looks, one rank may count it in and another not; their rows then have other places, so the call fails.
__device__ inline uint64_t wait_pushed(Leader& leader, uint64_t view) {
  const CallParams& p = leader.p;
  if (!leader.enter(DEEPEP_PHASE_ARRIVE)) return 0;
  leader.begin_waits();
  const auto word = [&](uint64_t part, uint32_t src) { return slot_word_at(own_memory(p), part, src, p.slot); };
  const uint64_t came = leader.wait_for(view, {Reason::late_rows, leader.s.epoch, 0, false},
                                        [&](uint32_t src) { return word(p.regions.pushed, src); });
  if (leader.failed()) return 0;
  const uint64_t torn = leader.ranks_where(
      [&](uint32_t src) { return in_view(came, src) && load_relaxed_sys(word(p.regions.pushed_view, src)) != view; });
  if (torn == 0) return view & ~came & ~rank_bit(p.rank);
  const auto src = static_cast<uint32_t>(__ffsll(static_cast<long long>(torn)) - 1);
  fail_torn(leader, view, src, load_relaxed_sys(word(p.regions.pushed_view, src)));
  return 0;
}

}  // namespace deepep
