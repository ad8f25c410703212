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
    const Injection& injection = p.inject[phase];
    if (injection.wanted == 0) return true;
    const uint64_t begin_ns = __shfl_sync(kAllLanes, global_time_ns(), 0);
    while (__shfl_sync(kAllLanes, global_time_ns(), 0) - begin_ns < injection.ns) __nanosleep(1000);
    if (injection.wanted == 1 + DEEPEP_INJECT_DELAY) return true;
    if (injection.wanted == 1 + DEEPEP_INJECT_EXIT && lane == 0) store_release_sys(&p.host->exit_requested, 1u);
    Finding finding;
    finding.code = DEEPEP_ERROR_TIMEOUT;
    finding.reason = Reason::stalled;
    finding.peer = static_cast<int32_t>(p.rank);
    finding.waited_ns = static_cast<int64_t>(injection.ns);
    fail(finding);
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

  // Publishes this rank's message to `peer`; by one lane. The counts, if the call has some, are there already.
  __device__ void publish(uint32_t peer, const uint32_t (&agreed)[kNumAgreed], uint32_t num_tokens) {
    MessageHeader* message = message_at(p.symmetric[peer], p.regions, p.rank, s.epoch);
    for (uint32_t i = 0; i < kNumAgreed; ++i) message->agreed[i] = agreed[i];
    message->slot = p.slot;
    message->num_tokens = num_tokens;
    message->code = s.code;
    store_release_sys(&message->epoch, s.epoch);  // Pairs with the wait of `peer` in gather().
  }

  // Publishes to every unmasked rank, a refusal of this rank too. Counts in the messages must have been stored by this block
  // before a __syncthreads().
  __device__ void publish_all(const uint32_t (&agreed)[kNumAgreed], uint32_t num_tokens) {
    for (uint32_t peer = lane; peer < p.options.num_ranks; peer += kWarpLanes) {
      if (!in_view(s.masked | s.lost, peer)) publish(peer, agreed, num_tokens);
    }
    __syncwarp();
  }

  // Gathers the messages of all unmasked ranks. Afterwards s.view and state->peer_slots say who takes part; false when the call
  // fails. A rank that has refused gathers nevertheless, so that it never runs ahead of a reader. `pushes`: all must count in
  // the same ranks.
  __device__ bool gather(const uint32_t (&agreed)[kNumAgreed], int32_t kind, bool pushes) {
    const bool refused = failed();
    Finding own;
    if (refused) own = p.state->finding;
    __syncwarp();
    if (lane == 0) s.code = 0;
    __syncwarp();
    begin_waits();
    const Awaited awaited = {Reason::late_message, s.epoch, kind, false};
    const auto word = [&](uint32_t peer) { return &message_of(peer)->epoch; };
    const uint64_t came = wait_for(all_ranks(p), awaited, word);
    const auto seen = [&](uint32_t peer) { return load_acquire_sys(word(peer)); };
    // Who has come and ended since would have rows pushed to memory that may be gone.
    if (pushes && !failed() && (came & s.lost) != 0) give_up(came & s.lost, DEEPEP_ERROR_PEER_LOST, awaited, 0, seen);
    if (failed()) return false;
    uint64_t view = (came | rank_bit(p.rank)) & ~s.masked;
    if (refused) {
      fail(own);
      return false;
    }
    if (!check_messages(view, agreed)) return false;
    if (pushes && p.mask_on_timeout != 0 && !agree_on_view(view)) return false;
    if (lane == 0) {
      s.view = view;
      p.state->view = view;
    }
    __syncwarp();
    return true;
  }

  __device__ MessageHeader* message_of(uint32_t rank) const { return message_at(own_memory(p), p.regions, rank, s.epoch); }

  // A peer's message, without its counts. The fields are loaded side by side: one after another they would cost as many trips
  // to memory.
  struct Heard {
    uint64_t epoch;
    uint32_t agreed[kNumAgreed];
    uint32_t slot;
    int32_t code;

    // The first value in which it differs from this rank's, kNumAgreed when there is none.
    __device__ uint32_t difference(const uint32_t (&ours)[kNumAgreed]) const {
      uint32_t first = kNumAgreed;
#pragma unroll
      for (uint32_t i = kNumAgreed; i-- > 0;) {
        const bool no_opinion = i == kAgreedTopkWeights && (ours[i] == kNoOpinion || agreed[i] == kNoOpinion);
        if (ours[i] != agreed[i] && !no_opinion) first = i;
      }
      return first;
    }
  };

  __device__ Heard hear(uint32_t rank) const {
    const MessageHeader* message = message_of(rank);
    Heard heard;
    heard.epoch = message->epoch;
#pragma unroll
    for (uint32_t i = 0; i < kNumAgreed; ++i) heard.agreed[i] = message->agreed[i];
    heard.slot = message->slot;
    heard.code = message->code;
    return heard;
  }

  // What every rank finds alike in the messages: a refusal, or a disagreement. Keeps the slots of the ranks in the view.
  __device__ bool check_messages(uint64_t view, const uint32_t (&agreed)[kNumAgreed]) {
    uint64_t refusing = 0, differing = 0;
    for (uint32_t rank = lane; rank < p.options.num_ranks; rank += kWarpLanes) {
      const Heard heard = hear(rank);
      const bool counts = in_view(view, rank);
      p.state->peer_slots[rank] = counts ? heard.slot : 0;
      if (!counts || rank == p.rank) continue;
      if (heard.code != 0) refusing |= rank_bit(rank);
      if (heard.epoch != s.epoch || heard.difference(agreed) != kNumAgreed) differing |= rank_bit(rank);
    }
    refusing = warp_or(refusing);
    differing = warp_or(differing);
    if (refusing == 0 && differing == 0) return true;
    Finding finding;
    const auto peer = static_cast<uint32_t>(__ffsll(static_cast<long long>(refusing != 0 ? refusing : differing)) - 1);
    const Heard heard = hear(peer);
    finding.peer = static_cast<int32_t>(peer);
    if (refusing != 0) {
      finding.a = heard.code;
      refuse(DEEPEP_ERROR_ABORTED, Reason::refused, finding);
      return false;
    }
    const uint32_t i = heard.difference(agreed);
    if (heard.epoch != s.epoch) {
      finding.expected = static_cast<int64_t>(s.epoch);
      finding.seen = static_cast<int64_t>(heard.epoch);
      refuse(DEEPEP_ERROR_MISMATCH, Reason::other_call, finding);
      return false;
    }
    for (uint32_t at = 0; at < kNumAgreed; ++at) {
      if (at != i) continue;
      finding.a = static_cast<int32_t>(at);
      finding.expected = at == kAgreedOp ? static_cast<uint32_t>(p.op) : agreed[at];
      finding.seen = heard.agreed[at];
    }
    refuse(DEEPEP_ERROR_MISMATCH, i == kAgreedOp ? Reason::elsewhere : Reason::disagreement, finding);
    return false;
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
