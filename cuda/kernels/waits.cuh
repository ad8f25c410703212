// How a call waits for its peers, and how it fails: the device side of common/protocol.hpp.
//
// In: the words that peers raise in this rank's control area. Out: who came, or a Finding. Every wait has a deadline; while it
// lasts, the warp now and then looks at what peers announce, and at what the host knows of dead processes. Callers: leader.cuh.
#pragma once

#include "collective.cuh"

namespace deepep {

// Adds what was waited for a rank to the statistics; `kind` is DeviceState::wait_ns's, `wait_stats` the caller's.
__device__ inline void keep_wait(const CallParams& p, uint32_t kind, uint32_t src, uint64_t waited_ns, int64_t* wait_stats) {
  const auto waited = static_cast<int64_t>(waited_ns);
  if (waited == 0) return;
  reduce_add_relaxed_gpu(&p.state->wait_ns[kind][src], waited);
  if (wait_stats != nullptr) reduce_add_relaxed_gpu(wait_stats + src, waited);
}

// All functions are called by one whole converged warp of the leader's block; they return the same on every lane.
struct Waits {
  const CallParams& p;
  CallShared& s;
  uint32_t lane;
  int64_t* wait_stats = nullptr;  // the caller's, i64 [num_ranks]: nanoseconds waited are added

  __device__ Waits(const CallParams& params, CallShared& shared) : p(params), s(shared), lane(threadIdx.x % kWarpLanes) {}

  // All lanes look before any goes on, which may fail the call.
  __device__ bool failed() const {
    const bool failed = s.code != 0;
    __syncwarp();
    return failed;
  }

  // Keeps the first failure of the call. What the caller leaves out is filled in.
  __device__ void fail(Finding finding) {
    if (lane == 0 && s.code == 0) {
      finding.seq = p.seq;
      finding.epoch = s.epoch;
      finding.op = p.op;
      finding.phase = s.phase;
      p.state->finding = finding;
      s.code = finding.code;
    }
    __syncwarp();
  }

  // A failure that every rank finds alike, or that is this rank's own before anything moved.
  __device__ void refuse(int32_t code, Reason reason, Finding more = {}) {
    more.code = code;
    more.reason = reason;
    more.agreed = 1;
    fail(more);
  }

  // ---- words in the peers' control areas

  // Tells every peer, masked ones too, what became of this call.
  __device__ void announce(const Abort& abort) {
    if (abort.epoch == 0) return;  // not a collective call: no peer waits for it
    const uint64_t word = abort_word(abort);
    for (uint32_t peer = lane; peer < p.options.num_ranks; peer += kWarpLanes) {
      // Pairs with abort_from() of the peer.
      if (peer != p.rank && !in_view(s.lost, peer)) store_release_sys(abort_at(p.symmetric[peer], p.regions, p.rank), word);
    }
    __syncwarp();
  }

  // This rank ends the call half-way. After fail().
  __device__ void announce_failure() {
    const int32_t peer = p.state->finding.peer;
    announce({s.epoch, s.code, peer >= 0 ? static_cast<uint32_t>(peer) : p.rank, false});
  }

  __device__ void mask_now(uint32_t peer) {
    __syncwarp();  // All lanes have read who is masked.
    if (lane == 0) {
      s.masked |= rank_bit(peer);
      p.state->masked = s.masked;
      p.host->masked = s.masked;
    }
    __syncwarp();
  }

  __device__ Abort abort_from(uint32_t from) const {
    return abort_from_word(load_acquire_sys(abort_at(own_memory(p), p.regions, from)));
  }

  // Whether an abort concerns this call: not from before a recovery, not by or about a rank that is left out anyway.
  __device__ bool concerns(const Abort& abort, uint32_t from) const {
    return abort.epoch != 0 && abort.epoch <= s.epoch && abort.epoch > s.base_epoch && !in_view(s.masked, from) &&
           !in_view(s.masked, abort.culprit);
  }

  // Ranks among 0 … num_ranks - 1, this one left out, for which `test` is true.
  template <class Test>
  __device__ uint64_t ranks_where(Test test) const {
    uint64_t mine = 0;
    for (uint32_t rank = lane; rank < p.options.num_ranks; rank += kWarpLanes) {
      if (rank != p.rank && test(rank)) mine |= rank_bit(rank);
    }
    __syncwarp();  // What one lane has acquired in a test, all have: warp_or() orders no memory.
    return warp_or(mine);
  }

  __device__ void fail_left_out(uint32_t by) {
    Finding finding;
    finding.code = DEEPEP_ERROR_ABORTED;
    finding.reason = Reason::left_out;
    finding.peer = static_cast<int32_t>(p.rank);
    finding.a = static_cast<int32_t>(by);
    fail(finding);
    announce_failure();
  }

  // Whether some peer has left this rank out of this call: then it must not write into that peer's memory any more.
  __device__ bool is_left_out() { return looks_left_out(*this); }
  DEEPEP_COLD __device__ static bool looks_left_out(Waits self) {
    const uint64_t by = self.ranks_where([&](uint32_t from) {
      const Abort abort = self.abort_from(from);  // Pairs with announce() of that rank.
      return abort.culprit == self.p.rank && self.concerns(abort, from);
    });
    if (by == 0) return false;
    self.fail_left_out(static_cast<uint32_t>(__ffsll(static_cast<long long>(by)) - 1));
    return true;
  }

  // The same for rows that were pulled: whether a peer has gone on without this rank and may have overwritten them.
  __device__ bool is_overtaken() {
    if (p.mask_on_timeout == 0) return false;
    const uint64_t by = ranks_where([&](uint32_t from) {
      const Abort abort = abort_from(from);  // Pairs with announce(), which comes before that rank writes again.
      return abort.goes_on && abort.culprit == p.rank && abort.epoch > s.base_epoch;
    });
    if (by == 0) return false;
    fail_left_out(static_cast<uint32_t>(__ffsll(static_cast<long long>(by)) - 1));
    return true;
  }

  // ---- waiting for peers

  // The waits that follow share a deadline, so that several missing peers cost one timeout.
  __device__ void begin_waits() { begin_waits(global_time_ns()); }
  __device__ void begin_waits(uint64_t begin_ns) {
    if (lane == 0) {
      s.deadline_ns = begin_ns + p.timeout_ns;
      s.extended = 0;
    }
    __syncwarp();
  }

  // What a wait is for.
  struct Awaited {
    Reason reason;  // late_*
    uint64_t at_least;
    int32_t kind;             // of wait_ns: 0 dispatch, 1 combine, -1 none
    bool satisfied_by_abort;  // over, too, once the peer has given up in that epoch or a later one: it reads no more
  };

  // Waits until all peers of the set have come; come(set) says which of some have, and must not change its mind. Returns those
  // that came; the others were left out, unless failed(). `seen(peer)` is for the finding. `begin_ns`: see begin_wait().
  template <class Come, class Seen>
  __device__ uint64_t wait_until(uint64_t peers, const Awaited& awaited, Come come, Seen seen, uint64_t begin_ns) {
    uint64_t pending = peers & ~s.masked & ~rank_bit(p.rank);
    uint64_t came = 0;
    uint64_t looked_ns = (pending & s.lost) != 0 ? 0 : begin_ns;  // For those that are gone nobody waits.
    uint64_t asked_ns = begin_ns;
    for (;;) {
      const uint64_t arrived = come(pending);
      account(arrived, awaited.kind, begin_ns);
      came |= arrived;
      pending &= ~arrived;
      if (pending == 0) break;
      const uint64_t now = __shfl_sync(kAllLanes, global_time_ns(), 0);
      if (now - looked_ns < kLookNs) continue;
      looked_ns = now;
      if (lane == 0) store_relaxed_sys(&doorbell_at(own_memory(p), p.regions)->waiting_for, pending);
      if (awaited.satisfied_by_abort) {
        const uint64_t gone = ranks_where([&](uint32_t peer) {
          const Abort abort = abort_from(peer);  // Pairs with announce() of a peer that will not read again.
          return in_view(pending, peer) && !abort.goes_on && abort.epoch >= awaited.at_least;
        });
        pending &= ~gone;
        came |= gone;
        if (pending == 0) break;
      }
      if (awaited.reason == Reason::late_output) find_elsewhere(pending);
      if (!failed()) heed_aborts(awaited, now - begin_ns);
      if (failed()) break;
      pending &= ~s.masked;
      if (now - asked_ns >= kAskNs) {
        asked_ns = now;
        // Written by the host's watchdog.
        const uint64_t lost = __shfl_sync(kAllLanes, load_relaxed_sys(&p.host->lost), 0);
        if (lane == 0) p.state->lost = s.lost |= lost;  // Captured calls know it from there.
        __syncwarp();
      }
      // Once more: a peer may finish its part and go.
      const uint64_t gone = pending & s.lost;
      const uint64_t ended = gone != 0 ? gone & ~come(gone) : 0;
      if (ended != 0) give_up(ended, DEEPEP_ERROR_PEER_LOST, awaited, now - begin_ns, seen);
      if (!failed() && now >= s.deadline_ns) time_out(pending, awaited, now - begin_ns, seen);
      if (failed()) break;
      pending &= ~s.masked;
      if (pending == 0) break;
    }
    if (lane == 0 && looked_ns != begin_ns) store_relaxed_sys(&doorbell_at(own_memory(p), p.regions)->waiting_for, 0);
    __syncwarp();
    return came;
  }

  // Waits until word(peer), which only `peer` raises, is at least awaited.at_least for every peer of the set.
  template <class Word>
  __device__ uint64_t wait_for(uint64_t peers, const Awaited& awaited, Word word) {
    const uint64_t others = peers & ~s.masked & ~rank_bit(p.rank), begin_ns = begin_wait();
    // Pairs with the release of `peer`.
    const uint64_t late = come_soon(others, awaited.kind, begin_ns,
                                    [&](uint32_t peer) { return load_acquire_sys(word(peer)) >= awaited.at_least; });
    return late == 0 ? others : (others & ~late) | wait_long(*this, late, awaited, word, begin_ns);
  }

  // When a wait begins: the same on every lane, because it steers loops.
  __device__ uint64_t begin_wait() const { return __shfl_sync(kAllLanes, global_time_ns(), 0); }

  // Waits some microseconds; returns which of the peers have not come. Mostly all have: then nothing more of a wait is needed,
  // nor its code fetched, which takes as long. The others are for wait_until(). `has_come(peer)` is asked of each by one lane,
  // with acquire, until it is true.
  template <class HasCome>
  __device__ uint64_t come_soon(uint64_t peers, int32_t kind, uint64_t begin_ns, HasCome has_come) {
    static_assert(DEEPEP_MAX_RANKS == 2 * kWarpLanes);
    if ((peers & s.lost) != 0) return peers;  // For those that are gone nobody waits.
    uint64_t pending = peers & (rank_bit(lane) | rank_bit(lane + kWarpLanes));  // this lane's
    for (uint32_t looks = 0; looks < kSoonLooks; ++looks) {
      for (uint64_t rest = pending; rest != 0; rest &= rest - 1) {
        const auto peer = static_cast<uint32_t>(__ffsll(static_cast<long long>(rest)) - 1);
        if (!has_come(peer)) continue;
        pending &= ~rank_bit(peer);
        if (looks != 0) account_for(peer, kind, global_time_ns() - begin_ns);
      }
      if (__all_sync(kAllLanes, pending == 0)) break;
    }
    __syncwarp();  // What one lane has acquired, all have.
    return __any_sync(kAllLanes, pending != 0) ? warp_or(pending) : 0;
  }

  template <class Word>
  DEEPEP_COLD __device__ static uint64_t wait_long(Waits self, uint64_t peers, const Awaited& awaited, Word word,
                                                     uint64_t begin_ns) {
    // Pairs with the release of the peer that raises the word.
    const auto seen = [&](uint32_t peer) { return load_acquire_sys(word(peer)); };
    const auto come = [&](uint64_t pending) {
      return self.ranks_where([&](uint32_t peer) { return in_view(pending, peer) && seen(peer) >= awaited.at_least; });
    };
    return self.wait_until(peers, awaited, come, seen, begin_ns);
  }

  // ---- what a wait does now and then

  static constexpr uint32_t kSoonLooks = 32;     // some 20 microseconds
  static constexpr uint64_t kLookNs = 20'000;    // between two looks at aborts and the deadline
  static constexpr uint64_t kAskNs = 1'000'000;  // between two looks at host memory

  __device__ void account(uint64_t peers, int32_t kind, uint64_t begin_ns) {
    if (peers == 0) return;
    const uint64_t waited_ns = global_time_ns() - begin_ns;
    for (uint32_t peer = lane; peer < p.options.num_ranks; peer += kWarpLanes) {
      if (in_view(peers, peer)) account_for(peer, kind, waited_ns);
    }
  }
  // By the lane that the peer is one of.
  __device__ void account_for(uint32_t peer, int32_t kind, uint64_t waited_ns) {
    if (kind < 0) return;
    // Nothing comes back, so that the wait ends without a trip to memory.
    keep_wait(p, static_cast<uint32_t>(kind), peer, waited_ns, wait_stats);
  }

  // Looks at the abort words: leaves ranks out as others have done, or ends the call.
  __device__ void heed_aborts(const Awaited& awaited, uint64_t waited_ns) {
    for (;;) {
      const uint64_t from_ranks = ranks_where([&](uint32_t from) { return concerns(abort_from(from), from); });
      if (from_ranks == 0) return;
      const auto from = static_cast<uint32_t>(__ffsll(static_cast<long long>(from_ranks)) - 1);
      const Abort abort = abort_from_word(__shfl_sync(kAllLanes, abort_word(abort_from(from)), 0));
      const bool gone = abort.code == DEEPEP_ERROR_TIMEOUT || abort.code == DEEPEP_ERROR_PEER_LOST;
      if (p.mask_on_timeout != 0 && abort.culprit != p.rank && (gone || abort.culprit == from)) {
        // What one rank has found out, all do: so they go on with the same ranks.
        mask_now(abort.culprit);
        announce({s.epoch, abort.code, abort.culprit, true});
        continue;
      }
      Finding finding;
      finding.code = DEEPEP_ERROR_ABORTED;
      finding.reason = Reason::gave_up;
      finding.peer = static_cast<int32_t>(abort.culprit);
      finding.a = static_cast<int32_t>(from);
      finding.b = abort.code;
      finding.expected = static_cast<int64_t>(abort.epoch);
      finding.seen = static_cast<int64_t>(awaited.at_least);
      finding.waited_ns = static_cast<int64_t>(waited_ns);
      fail(finding);
      announce_failure();
      return;
    }
  }

  // For announcements that come without a message's being waited for: ends the call when the message of a peer says that it
  // makes another call, or refuses this one. Every rank finds that alike.
  __device__ void find_elsewhere(uint64_t pending) {
    const auto message = [&](uint32_t peer) { return message_at(own_memory(p), p.regions, peer, s.epoch); };
    const uint64_t elsewhere = ranks_where([&](uint32_t peer) {
      // Pairs with publish_all() of the peer.
      const uint64_t word = in_view(pending, peer) ? load_acquire_sys(message(peer)->words + kMessageSender) : 0;
      const Sender sender = sender_from_word(static_cast<uint32_t>(word));
      return is_count_of(word, s.epoch) && (sender.code != 0 || sender.op != p.op);
    });
    if (elsewhere == 0) return;
    const auto peer = static_cast<uint32_t>(__ffsll(static_cast<long long>(elsewhere)) - 1);
    Finding finding;
    finding.peer = static_cast<int32_t>(peer);
    const Sender sender = sender_of(*message(peer));
    if (sender.code != 0) {
      finding.a = sender.code;
      refuse(DEEPEP_ERROR_ABORTED, Reason::refused, finding);
      return;
    }
    finding.a = kAgreedOp;
    finding.expected = p.op;
    finding.seen = sender.op;
    refuse(DEEPEP_ERROR_MISMATCH, Reason::elsewhere, finding);
  }

  // Leaves the ranks out, or ends the call and blames the first of them.
  template <class Seen>
  __device__ void give_up(uint64_t ranks, int32_t code, const Awaited& awaited, uint64_t waited_ns, Seen seen) {
    const auto first = static_cast<uint32_t>(__ffsll(static_cast<long long>(ranks)) - 1);
    if (p.mask_on_timeout != 0) {
      for (uint64_t rest = ranks; rest != 0; rest &= rest - 1) {
        const auto peer = static_cast<uint32_t>(__ffsll(static_cast<long long>(rest)) - 1);
        mask_now(peer);
        announce({s.epoch, code, peer, true});
      }
      return;
    }
    Finding finding;
    finding.code = code;
    finding.reason = awaited.reason;
    finding.peer = static_cast<int32_t>(first);
    finding.expected = static_cast<int64_t>(awaited.at_least);
    finding.seen = static_cast<int64_t>(seen(first));
    finding.waited_ns = static_cast<int64_t>(waited_ns);
    fail(finding);
    announce_failure();
  }

  // The deadline has passed. A rank that itself waits for a third is not to blame: it will soon say who is, so the deadline is
  // drawn out once, by half, when all the missing ranks wait.
  template <class Seen>
  __device__ void time_out(uint64_t pending, const Awaited& awaited, uint64_t waited_ns, Seen seen) {
    const uint64_t waiting = ranks_where([&](uint32_t peer) {
      if (!in_view(pending & ~s.lost, peer)) return false;
      return (load_relaxed_sys(&doorbell_at(p.symmetric[peer], p.regions)->waiting_for) & ~rank_bit(p.rank)) != 0;
    });
    const uint64_t to_blame = pending & ~waiting;
    const bool extends = to_blame == 0 && s.extended == 0;
    __syncwarp();  // All lanes have looked.
    if (extends) {
      if (lane == 0) {
        s.deadline_ns += p.timeout_ns / 2;
        s.extended = 1;
      }
      __syncwarp();
      return;
    }
    give_up(to_blame != 0 ? to_blame : pending, DEEPEP_ERROR_TIMEOUT, awaited, waited_ns, seen);
  }
};

}  // namespace deepep
