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

  // What all ranks must say alike of a call that has no more to it.
  __device__ void say_only_op() {
    for (uint32_t word = lane; word < kNumAgreed; word += kWarpLanes) {
      s.said[word] = word == kAgreedOp ? static_cast<uint32_t>(p.op) : word == kAgreedMaskOnTimeout ? p.mask_on_timeout : 0;
    }
    __syncwarp();
  }

  // Publishes this rank's message to every unmasked rank, a refusal of this rank too. What all ranks must say alike stands in
  // s.said. Counts in the messages must have been stored by this block before a __syncthreads().
  __device__ void publish_all(uint32_t num_tokens) {
    if (lane == 0) {
      s.said[kMessageSlot] = p.slot;
      s.said[kMessageNumTokens] = num_tokens;
      s.said[kMessageCode] = static_cast<uint32_t>(s.code);
    }
    __syncwarp();
    const uint64_t to = all_ranks(p) & ~(s.masked | s.lost);
    const uint4 said = *part_of(s.said);
    for (uint32_t first = 0; first < p.options.num_ranks; first += kWarpLanes) {
      // Each lane looks one peer up: lanes that ask the parameters for different ones are answered one after another.
      const bool is_told = first + lane < p.options.num_ranks && in_view(to, first + lane);
      MessageHeader* own = is_told ? message_at(p.symmetric[first + lane], p.regions, p.rank, s.epoch) : nullptr;
      for (uint32_t turn = 0; turn < min(kWarpLanes, p.options.num_ranks - first); turn += kWarpLanes / kParts) {
        const uint64_t of_peer = __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(own), turn + lane / kParts);
        if (of_peer != 0) *part_of(reinterpret_cast<MessageHeader*>(of_peer)->agreed) = said;
      }
      __syncwarp();
      if (is_told) store_release_sys(&own->epoch, s.epoch);  // Pairs with the wait of that peer in gather().
    }
    __syncwarp();
  }

  // A message is written and read in parts, a lane each, for all of few peers at once: a lane that did a whole one would have as
  // many instructions to fetch, a lane a word as many turns to take.
  static constexpr uint32_t kPartWords = 4, kParts = kNumMessageWords / kPartWords;
  static_assert(kNumMessageWords % kPartWords == 0 && offsetof(MessageHeader, agreed) % sizeof(uint4) == 0);
  __device__ uint32_t first_word() const { return lane % kParts * kPartWords; }
  __device__ uint4* part_of(uint32_t* words) const { return reinterpret_cast<uint4*>(words + first_word()); }

  __device__ Awaited late_message(int32_t kind) const { return {Reason::late_message, s.epoch, kind, false}; }
  __device__ auto message_epoch() const {
    return [*this](uint32_t peer) { return &message_of(peer)->epoch; };
  }

  // Gathers the messages of all unmasked ranks. Afterwards s.view and state->peer_slots say who takes part; false when the call
  // fails. A rank that has refused gathers nevertheless, so that it never runs ahead of a reader. `pushes`: all must count in
  // the same ranks.
  __device__ bool gather(int32_t kind, bool pushes) {
    begin_waits();
    const uint64_t others = all_ranks(p) & ~s.masked & ~rank_bit(p.rank), begin_ns = begin_wait();
    const uint64_t late = come_soon(others, late_message(kind), message_epoch(), begin_ns);
    if (late != 0 || failed() || p.mask_on_timeout != 0) return gather_long(*this, kind, pushes, others, late, begin_ns);
    return accept(others | rank_bit(p.rank));
  }

  // The messages of these ranks are there.
  __device__ bool accept(uint64_t view) {
    return check_messages(view) && keep_view(view);
  }
  __device__ bool keep_view(uint64_t view) {
    if (lane == 0) {
      s.view = view;
      p.state->view = view;
    }
    __syncwarp();
    return true;
  }

  // Of `others`, all but `late` have come since `begin_ns`.
  DEEPEP_COLD __device__ static bool gather_long(Leader self, int32_t kind, bool pushes, uint64_t others, uint64_t late,
                                                 uint64_t begin_ns) {
    const CallParams& p = self.p;
    CallShared& s = self.s;
    const bool refused = self.failed();
    Finding own;
    if (refused) own = p.state->finding;
    __syncwarp();
    if (self.lane == 0) s.code = 0;
    __syncwarp();
    const Awaited awaited = self.late_message(kind);
    const auto word = self.message_epoch();
    const uint64_t came = (others & ~late) | (late != 0 ? wait_long(self, late, awaited, word, begin_ns) : 0);
    const auto seen = [&](uint32_t peer) { return load_acquire_sys(word(peer)); };
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
    if (!pushes || p.mask_on_timeout == 0) return self.accept(view);
    return self.check_messages(view) && self.agree_on_view(view) && self.keep_view(view);
  }

  __device__ MessageHeader* message_of(uint32_t rank) const { return message_at(own_memory(p), p.regions, rank, s.epoch); }

  // Whether a peer says otherwise than this rank what all must say alike. `word` is one of these.
  __device__ bool differs(uint32_t word, uint32_t theirs) const {
    if (theirs == s.said[word]) return false;
    return word != kAgreedTopkWeights || (theirs != kNoOpinion && s.said[word] != kNoOpinion);
  }

  // What every rank finds alike in the messages: a refusal, or a disagreement. Keeps the slots of the ranks in the view.
  __device__ bool check_messages(uint64_t view) {
    uint64_t refusing = 0, differing = 0;
    for (uint32_t rank = lane / kParts; rank < p.options.num_ranks; rank += kWarpLanes / kParts) {
      const bool counts = in_view(view, rank), is_other = counts && rank != p.rank;
      MessageHeader* message = message_of(rank);
      const uint4 part = *part_of(message->agreed);
      const uint32_t said[kPartWords] = {part.x, part.y, part.z, part.w};
      bool differs_here = message->epoch != s.epoch;
#pragma unroll
      for (uint32_t i = 0; i < kPartWords; ++i) {
        const uint32_t word = first_word() + i, theirs = said[i];
        if (word < kNumAgreed) differs_here = differs_here || differs(word, theirs);
        if (word == kMessageSlot) p.state->peer_slots[rank] = counts ? theirs : 0;
        if (word == kMessageCode && theirs != 0 && is_other) refusing |= rank_bit(rank);
      }
      if (differs_here && is_other) differing |= rank_bit(rank);
    }
    if (__all_sync(kAllLanes, (refusing | differing) == 0)) return true;
    blame(*this, warp_or(refusing), warp_or(differing));
    return false;
  }

  DEEPEP_COLD __device__ static void blame(Leader leader, uint64_t refusing, uint64_t differing) {
    const CallShared& s = leader.s;
    Finding finding;
    const auto peer = static_cast<uint32_t>(__ffsll(static_cast<long long>(refusing != 0 ? refusing : differing)) - 1);
    const MessageHeader& message = *leader.message_of(peer);
    finding.peer = static_cast<int32_t>(peer);
    if (refusing != 0) {
      finding.a = message.code;
      leader.refuse(DEEPEP_ERROR_ABORTED, Reason::refused, finding);
      return;
    }
    if (message.epoch != s.epoch) {
      finding.expected = static_cast<int64_t>(s.epoch);
      finding.seen = static_cast<int64_t>(message.epoch);
      leader.refuse(DEEPEP_ERROR_MISMATCH, Reason::other_call, finding);
      return;
    }
    uint32_t first = 0;
    while (first + 1 < kNumAgreed && !leader.differs(first, message.agreed[first])) ++first;
    finding.a = static_cast<int32_t>(first);
    finding.expected = s.said[first];
    finding.seen = message.agreed[first];
    leader.refuse(DEEPEP_ERROR_MISMATCH, first == kAgreedOp ? Reason::elsewhere : Reason::disagreement, finding);
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
