// What the leader of a call says to its peers and hears from them: the messages of common/protocol.hpp.
//
// In: what this rank wants to do. Out: a call that every rank makes alike, or a Finding; who takes part, and with which slot.
// Callers: every kernel of an operation.
#pragma once

#include "waits.cuh"

namespace deepep {

// Called like Waits.
struct Leader : Waits {
  using Waits::Waits;

  // ---- injections

  // At the start of a phase: does what deepep_inject asked for. False when the call has failed thereby.
  __device__ bool enter(int32_t phase) {
    if (lane == 0) s.phase = phase;
    __syncwarp();
    return p.inject[phase].wanted == 0 || inject(*this, p.inject[phase]);
  }
  DEEPEP_COLD __device__ static bool inject(Leader self, const Injection& injection) {
    const CallParams& p = self.p;
    const uint64_t begin_ns = __shfl_sync(kAllLanes, global_time_ns(), 0);
    while (__shfl_sync(kAllLanes, global_time_ns(), 0) - begin_ns < injection.ns) __nanosleep(1000);
    if (injection.wanted == 1 + DEEPEP_INJECT_DELAY) return true;
    if (injection.wanted == 1 + DEEPEP_INJECT_EXIT && self.lane == 0) store_release_sys(&p.host->exit_requested, 1u);
    Finding finding;
    finding.code = DEEPEP_ERROR_TIMEOUT;
    finding.reason = Reason::stalled;
    finding.peer = static_cast<int32_t>(p.rank);
    finding.waited_ns = static_cast<int64_t>(injection.ns);
    self.fail(finding);
    return false;
  }

  // ---- this rank's own blocks

  // Waits for all of them at a meeting. With a deadline, when the device has no room for all of them the call is refused:
  // nothing has been said to the peers yet.
  __device__ void await_blocks(Meeting meeting, bool bounded) {
    const uint64_t begin_ns = global_time_ns();
    for (;;) {
      const uint64_t seen = __shfl_sync(kAllLanes, load_acquire_gpu(&p.state->arrivals[meeting]), 0);  // Pairs with arrive().
      if (seen >= s.meeting) break;
      const uint64_t waited_ns = __shfl_sync(kAllLanes, global_time_ns() - begin_ns, 0);
      if (!bounded || waited_ns < p.timeout_ns) continue;
      Finding finding;
      finding.expected = gridDim.x;
      finding.seen = static_cast<int64_t>(gridDim.x - (s.meeting - seen));
      finding.waited_ns = static_cast<int64_t>(waited_ns);
      refuse(DEEPEP_ERROR_TIMEOUT, Reason::no_room, finding);
      break;
    }
    __syncwarp();  // What the first lane has acquired, all have; others may have looked before.
  }

  // ---- synchronisation one: messages

  __device__ MessageHeader* message_of(uint32_t rank) const { return message_at(own_memory(p), p.regions, rank, s.epoch); }

  // By one warp, which need not be the leader's: publishes this rank's message to every unmasked rank, also when it refuses the
  // call. With it the peers see what this warp knows of, and may overwrite what it has read.
  __device__ void publish_all() { publish_to(all_ranks(p) & ~(s.masked | s.lost), s.code, true); }
  // The same while the leader may find out more. Without `releases` the peers see what the warp knew of at its latest fence, or
  // what needs none.
  __device__ void publish_to(uint64_t to, int32_t code, bool releases) {
    const uint64_t hash = count_word(s.epoch, s.said_hash);
    const uint64_t sender = count_word(s.epoch, sender_word({p.slot, p.op, s.said_topk_weights, code}));
    for (uint32_t peer = lane; peer < p.options.num_ranks; peer += kWarpLanes) {
      if (!in_view(to, peer)) continue;
      uint64_t* words = message_at(p.symmetric[peer], p.regions, p.rank, s.epoch)->words;
      // Pairs with hear() of that peer. A fence costs the multiprocessor's other warps what they have in L1, a release not.
      releases ? release_to_peers(p, words, hash, sender) : store_relaxed_sys(words, hash, sender);
    }
    __syncwarp();
  }

  // The nth value that all ranks must say alike, as this rank says it; and all of them, for those who find a difference.
  __device__ uint32_t own_value(uint32_t nth) const {
    return nth == kAgreedTopkWeights ? s.said_topk_weights : nth == kAgreedRouting ? s.said_routing : p.agreed[nth];
  }
  __device__ void publish_values() const {
    for (uint32_t peer = 0; peer < p.options.num_ranks; ++peer) {
      if (in_view(s.masked | s.lost, peer) || lane >= kNumAgreed) continue;
      MessageHeader* message = message_at(p.symmetric[peer], p.regions, p.rank, s.epoch);
      store_relaxed_sys(message->words + kMessageAgreed + lane, count_word(s.epoch, own_value(lane)));
    }
    __syncwarp();
  }

  // What a peer says in this call.
  struct Heard {
    uint64_t hash;
    uint64_t sender;
  };
  // False when it has not said it yet. Pairs with publish_to() of the peer, where that releases something.
  __device__ bool hear(uint32_t peer, Heard& heard) const {
    load_acquire_sys(message_of(peer)->words, heard.hash, heard.sender);
    return is_count_of(heard.hash, s.epoch) && is_count_of(heard.sender, s.epoch);
  }

  // Peers that say something else than they should, of those that this lane has heard, and what opinions of topk_weights there
  // are: bit v is set for value v.
  struct Odd {
    uint64_t refusing = 0;
    uint64_t differing = 0;
    uint32_t opinions = 0;
  };
  // Keeps a peer's slot, for the other blocks too.
  __device__ void take(uint32_t peer, const Heard& heard, Odd& odd) const {
    const Sender sender = sender_from_word(static_cast<uint32_t>(heard.sender));
    p.state->peer_slots[peer] = s.peer_slots[peer] = sender.slot;
    if (sender.code != 0) odd.refusing |= rank_bit(peer);
    odd.opinions |= 1u << sender.topk_weights;
    if (static_cast<uint32_t>(heard.hash) != s.said_hash || sender.op != p.op) odd.differing |= rank_bit(peer);
  }

  // Gathers the messages of all unmasked ranks. Afterwards s.view and state->peer_slots say who takes part; false when the call
  // fails. A rank that has refused gathers nevertheless, so that it never runs ahead of a reader. `pushes`: all must count in
  // the same ranks.
  __device__ bool gather(int32_t kind, bool pushes) {
    const uint64_t others = all_ranks(p) & ~s.masked & ~rank_bit(p.rank), begin_ns = begin_wait();
    Odd odd;
    const uint64_t late = come_soon(others, kind, begin_ns, [&](uint32_t peer) {
      Heard heard;
      if (!hear(peer, heard)) return false;
      take(peer, heard, odd);
      return true;
    });
    if (late != 0 || failed() || p.mask_on_timeout != 0) return gather_long(*this, kind, pushes, others, late, begin_ns);
    return accept(others | rank_bit(p.rank), odd);
  }

  // The messages of these ranks are there: every rank finds alike whether one refuses the call, or makes another one.
  __device__ bool accept(uint64_t view, const Odd& odd) {
    constexpr uint32_t kBoth = 3;  // opinions that exclude each other
    const uint32_t opinions = __reduce_or_sync(kAllLanes, odd.opinions | 1u << s.said_topk_weights);
    if (__any_sync(kAllLanes, (odd.refusing | odd.differing) != 0) || (opinions & kBoth) == kBoth) {
      blame(*this, view, warp_or(odd.refusing), warp_or(odd.differing));
      return false;
    }
    keep_view(view);
    return true;
  }
  __device__ void keep_view(uint64_t view) {
    if (lane == 0) {
      s.view = view;
      p.state->view = view;
      p.state->peer_slots[p.rank] = s.peer_slots[p.rank] = p.slot;
    }
    __syncwarp();
  }

  // Of `others`, all but `late` have come since `begin_ns`.
  DEEPEP_COLD __device__ static bool gather_long(Leader self, int32_t kind, bool pushes, uint64_t others, uint64_t late,
                                                 uint64_t begin_ns) {
    const CallParams& p = self.p;
    CallShared& s = self.s;
    self.begin_waits(begin_ns);
    const bool refused = self.failed();
    Finding own;
    if (refused) own = p.state->finding;
    __syncwarp();
    if (self.lane == 0) s.code = 0;
    __syncwarp();
    const Awaited awaited = {Reason::late_message, s.epoch, kind, false};
    Heard heard;
    // Who is at a later call will not say any more what it says in this one.
    const auto is_later = [&](uint32_t peer) { return self.calls_later(self.message_of(peer)) != 0; };
    const auto come = [&](uint64_t pending) {
      return self.ranks_where([&](uint32_t peer) {
        return in_view(pending, peer) && (self.hear(peer, heard) || is_later(peer));
      });
    };
    const auto seen = [&](uint32_t peer) { return load_relaxed_sys(self.message_of(peer)->words) >> 32; };
    const uint64_t came = (others & ~late) | (late != 0 ? self.wait_until(late, awaited, come, seen, begin_ns) : 0);
    // Who has come and ended since would have rows pushed to memory that may be gone.
    if (pushes && !self.failed() && (came & s.lost) != 0) {
      self.give_up(came & s.lost, DEEPEP_ERROR_PEER_LOST, awaited, 0, seen);
    }
    if (self.failed()) return false;
    uint64_t view = (came | rank_bit(p.rank)) & ~s.masked;
    if (refused) {
      self.fail(own);
      return false;
    }
    Odd odd;
    uint64_t later = 0;
    for (uint32_t peer = self.lane; peer < p.options.num_ranks; peer += kWarpLanes) {
      if (peer == p.rank || !in_view(view, peer)) continue;
      if (self.hear(peer, heard))
        self.take(peer, heard, odd);
      else
        later |= rank_bit(peer);
    }
    __syncwarp();
    later = warp_or(later);
    if (later != 0) {
      Finding finding;
      const auto peer = static_cast<uint32_t>(__ffsll(static_cast<long long>(later)) - 1);
      finding.peer = static_cast<int32_t>(peer);
      finding.expected = static_cast<int64_t>(s.epoch);
      finding.seen = static_cast<int64_t>(s.epoch + self.calls_later(self.message_of(peer)));
      self.publish_values();  // Others may wait for them.
      self.refuse(DEEPEP_ERROR_MISMATCH, Reason::other_call, finding);
      return false;
    }
    if (!self.accept(view, odd)) return false;
    if (!pushes || p.mask_on_timeout == 0) return true;
    if (!self.agree_on_view(view)) return false;
    self.keep_view(view);
    return true;
  }

  // How many calls a peer is ahead of this rank, as its message tells. 0 when it is not, or by more than kMaxLead.
  __device__ uint32_t calls_later(const MessageHeader* message) const {
    const uint64_t word = load_relaxed_sys(message->words + kMessageHash);
    const uint32_t calls = static_cast<uint32_t>(word >> 32) - static_cast<uint32_t>(s.epoch);
    return word != 0 && calls <= kMaxLead ? calls : 0;
  }

  // Ends the call: of the ranks in the view these refuse it, or differ in what all must say alike; if none does, those who have
  // rows differ in whether weights travel with them.
  DEEPEP_COLD __device__ static void blame(Leader self, uint64_t view, uint64_t refusing, uint64_t differing) {
    // Others may wait for this rank's values, whomever it blames itself.
    static_assert(kNumAgreed <= kWarpLanes);
    if (differing != 0) self.publish_values();
    const uint64_t blamed = refusing != 0 ? refusing : differing;
    if (blamed == 0) return self.blame_opinions(view);
    Finding finding;
    const auto peer = static_cast<uint32_t>(__ffsll(static_cast<long long>(blamed)) - 1);
    const MessageHeader& message = *self.message_of(peer);
    const Sender sender = sender_of(message);
    finding.peer = static_cast<int32_t>(peer);
    if (refusing != 0) {
      finding.a = sender.code;
      self.refuse(DEEPEP_ERROR_ABORTED, Reason::refused, finding);
    } else if (sender.op != self.p.op) {
      finding.a = kAgreedOp;
      finding.expected = self.p.op;
      finding.seen = sender.op;
      self.refuse(DEEPEP_ERROR_MISMATCH, Reason::elsewhere, finding);
    } else {
      finding.a = kNumAgreed;  // without the values all that is known is that something differs
      if (self.await_values(peer, message)) {
        uint32_t first = 0;
        while (first + 1 < kNumAgreed && agree_on(first, self.own_value(first), agreed_value(message, first))) ++first;
        finding.a = static_cast<int32_t>(first);
        finding.expected = self.own_value(first);
        finding.seen = agreed_value(message, first);
      }
      self.refuse(DEEPEP_ERROR_MISMATCH, Reason::disagreement, finding);
    }
  }

  // Waits for the values of a peer that differs: when it has found that, it sends them. False when they will not come: the peer
  // has given the call up or has gone, or has left this rank out.
  __device__ bool await_values(uint32_t peer, const MessageHeader& message) {
    uint64_t* const waiting_for = &doorbell_at(own_memory(p), p.regions)->waiting_for;
    const uint64_t begin_ns = begin_wait();
    uint64_t looked_ns = begin_ns;
    bool came = false;
    if (lane == 0) store_relaxed_sys(waiting_for, rank_bit(peer));
    for (;;) {
      const uint64_t word = lane < kNumAgreed ? load_acquire_sys(message.words + kMessageAgreed + lane) : 0;
      came = __all_sync(kAllLanes, lane >= kNumAgreed || is_count_of(word, s.epoch));
      const uint64_t now = __shfl_sync(kAllLanes, global_time_ns(), 0);
      if (came || now - begin_ns >= p.timeout_ns) break;
      if (now - looked_ns < kLookNs) continue;
      looked_ns = now;
      const Abort abort = abort_from(peer);  // Pairs with announce() of the peer.
      const bool gave_up = abort.epoch >= s.epoch && abort.epoch > s.base_epoch && (!abort.goes_on || abort.culprit == p.rank);
      if (__any_sync(kAllLanes, gave_up || in_view(load_relaxed_sys(&p.host->lost), peer))) break;
    }
    if (lane == 0) store_relaxed_sys(waiting_for, 0);
    __syncwarp();
    return came;
  }

  // A rank without rows goes with the first that has some, so that it finds a disagreement of the others, too.
  __device__ void blame_opinions(uint64_t view) {
    uint32_t opinion = s.said_topk_weights, of = p.rank;
    for (uint32_t peer = 0; peer < p.options.num_ranks; ++peer) {
      if (peer == p.rank || !in_view(view, peer)) continue;
      const uint32_t theirs = sender_of(*message_of(peer)).topk_weights;
      if (opinion == kNoOpinion) opinion = theirs, of = peer;
      if (agree_on(kAgreedTopkWeights, opinion, theirs)) continue;
      Finding finding;
      finding.peer = static_cast<int32_t>(peer);
      finding.a = kAgreedTopkWeights;
      finding.b = static_cast<int32_t>(of) + 1;
      finding.expected = opinion;
      finding.seen = theirs;
      return refuse(DEEPEP_ERROR_MISMATCH, Reason::disagreement, finding);
    }
  }

  // MASK_ON_TIMEOUT: those take part whose messages everyone has.
  __device__ bool agree_on_view(uint64_t& view) {
    for (uint32_t peer = lane; peer < p.options.num_ranks; peer += kWarpLanes) {
      if (peer == p.rank || !in_view(view & ~s.lost, peer)) continue;
      View* theirs = view_at(p.symmetric[peer], p.regions, p.rank);
      theirs->ranks = view;
      store_release_sys(&theirs->epoch, s.epoch);  // Pairs with the wait below, at the peer.
    }
    __syncwarp();
    begin_waits();
    const uint64_t came = wait_for(view, {Reason::late_view, s.epoch, -1, false},
                                   [&](uint32_t peer) { return &view_at(own_memory(p), p.regions, peer)->epoch; });
    if (failed()) return false;
    uint64_t common = came | rank_bit(p.rank);
    const uint64_t leaving = ranks_where(
        [&](uint32_t peer) { return in_view(came, peer) && !in_view(view_at(own_memory(p), p.regions, peer)->ranks, p.rank); });
    if (leaving != 0) {
      fail_left_out(static_cast<uint32_t>(__ffsll(static_cast<long long>(leaving)) - 1));
      return false;
    }
    uint64_t without = 0;  // ranks that some peer lacks
    for (uint32_t peer = lane; peer < p.options.num_ranks; peer += kWarpLanes) {
      if (peer != p.rank && in_view(came, peer)) without |= ~view_at(own_memory(p), p.regions, peer)->ranks;
    }
    common &= ~warp_or(without);
    uint64_t rest = view & ~common & ~s.masked;
    __syncwarp();  // All lanes have looked.
    for (; rest != 0; rest &= rest - 1) {
      mask_now(static_cast<uint32_t>(__ffsll(static_cast<long long>(rest)) - 1));
    }
    view = common & ~s.masked;
    return true;
  }
};

// Leader's block, by all threads: waits for all blocks at a meeting.
__device__ inline void wait_for_blocks(const CallParams& p, CallShared& s, Meeting meeting, bool bounded) {
  if (threadIdx.x < kWarpLanes) Leader(p, s).await_blocks(meeting, bounded);
  __syncthreads();
}

}  // namespace deepep
