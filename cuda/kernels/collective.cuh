// How the blocks of a call act as one, and how the call talks to its peers: the device side of common/protocol.hpp.
//
// In: CallParams. Out: a call in which every block does the same: either it goes, or it stops with a Finding. Block 0 leads:
// its first warp alone waits for peers, so that all blocks follow one decision, and a peer that comes in the last moment cannot
// be there for one block and missing for another. Callers: every kernel of an operation.
//
// Words between blocks. state->arrivals[m] only grows: each block adds one at meeting m, so a meeting is complete at (blocks of
// earlier kernels + blocks of this one); at the end, when no block touches them any more, the leader puts the counters of
// meetings that were left out to the same. state->verdict names kernel, step and outcome; it is only compared, never cleaned.
//
// Bounds. The leader's waits have deadlines. The other blocks wait for nothing but the leader and for each other's work, which
// does not wait; a block that has not started yet does so when the device has room, which the end of the kernel needs anyway.
#pragma once

#include "../common/routing.hpp"
#include "../host/params.hpp"
#include "primitives.cuh"

namespace deepep {

// Meetings of a kernel.
enum Meeting : uint32_t { kMeetCounted = 0, kMeetPlaced = 1, kMeetCopied = 2, kMeetEnd = 3 };

// Counters of what warps of all blocks claim.
enum Claim : uint32_t { kClaimPush = 0, kClaimPull = 1 };

// Steps that the leader releases the other blocks to.
enum Step : uint32_t { kStepCounted = 1, kStepGo = 2 };

// What the threads of a block know about the call. Filled by call_begin().
struct CallShared {
  uint64_t epoch;  // of this call; 0 = not collective
  uint64_t base_epoch;
  uint64_t launch;       // number of this kernel
  uint64_t meeting;      // arrivals that complete a meeting
  uint64_t masked;       // leader: ranks left out, as of now
  uint64_t view;         // ranks that take part, once the call goes
  uint64_t lost;         // leader: ranks that have ended; their memory may be gone, and is not touched
  uint64_t deadline_ns;  // leader: of the waits of this phase
  int32_t code;          // leader: DEEPEP_ERROR_* once the call has failed
  int32_t phase;         // leader
  uint32_t skipped;      // the buffer needs a recovery
  uint32_t extended;     // leader: the deadline was drawn out
  uint32_t go;
};

__device__ inline bool is_leader() { return blockIdx.x == 0; }

__device__ inline uint64_t warp_or(uint64_t value) {
  const uint32_t low = __reduce_or_sync(kAllLanes, static_cast<uint32_t>(value));
  const uint32_t high = __reduce_or_sync(kAllLanes, static_cast<uint32_t>(value >> 32));
  return static_cast<uint64_t>(high) << 32 | low;
}

__device__ inline uint64_t all_ranks(const CallParams& p) {
  return p.options.num_ranks == 64 ? ~uint64_t{0} : (uint64_t{1} << p.options.num_ranks) - 1;
}
__device__ inline uint64_t rank_bit(uint32_t rank) { return uint64_t{1} << rank; }
__device__ inline uint8_t* own_memory(const CallParams& p) { return p.symmetric[p.rank]; }

// The first thing in a kernel, by all threads. `needs_peers` calls do nothing while the buffer needs a recovery.
__device__ inline void call_begin(const CallParams& p, CallShared& s, bool collective, bool needs_peers) {
  if (threadIdx.x == 0) {
    const DeviceState& state = *p.state;
    s.epoch = collective ? state.epoch + 1 : 0;
    s.base_epoch = state.base_epoch;
    s.launch = state.launches + 1;
    s.meeting = state.num_blocks + gridDim.x;
    s.masked = state.masked;
    s.view = 0;
    s.lost = p.seq != 0 || !is_leader() || !needs_peers ? p.lost : load_relaxed_sys(&p.host->lost);
    s.code = 0;
    s.phase = DEEPEP_PHASE_NONE;
    s.skipped = needs_peers && state.failed != 0;
    s.extended = 0;
    s.go = 0;
    if (is_leader()) p.state->finding = Finding{};
  }
  __syncthreads();
}

// This block's part of what comes before the meeting is done. By all threads.
__device__ inline void arrive(const CallParams& p, Meeting meeting) {
  __syncthreads();
  // Releases what the block has written; pairs with wait_for_blocks().
  if (threadIdx.x == 0) add_acq_rel_gpu(&p.state->arrivals[meeting], 1);
}

// Leader, one thread: releases the other blocks to a step, or stops them. Pairs with await_leader().
__device__ inline void release_blocks(const CallParams& p, const CallShared& s, Step step, bool go) {
  store_release_gpu(&p.state->verdict, s.launch << 4 | static_cast<uint64_t>(step) << 1 | (go ? 0 : 1));
}

// Waits for the leader's release to `step`, or its stop. By all threads of any block, the leader's too, which must have
// released it before. True = the call goes on.
__device__ inline bool await_leader(const CallParams& p, CallShared& s, Step step) {
  if (threadIdx.x == 0) {
    for (;;) {
      const uint64_t verdict = load_acquire_gpu(&p.state->verdict);  // Pairs with release_blocks().
      if (verdict >> 4 != s.launch) continue;
      s.go = (verdict & 1) == 0;
      if (s.go == 0 || (verdict >> 1 & 7) >= step) break;
    }
  }
  __syncthreads();
  return s.go != 0;
}

// ---- the leader's first warp -----------------------------------------------------------------------------------------------
// All functions below are called by the whole converged warp; they return the same on every lane.

struct Leader {
  const CallParams& p;
  CallShared& s;
  uint32_t lane;

  __device__ Leader(const CallParams& params, CallShared& shared) : p(params), s(shared), lane(threadIdx.x % kWarpLanes) {}

  __device__ bool failed() const { return s.code != 0; }

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
      // Pairs with the acquire of abort words in look() and is_left_out().
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
    if (lane == 0) {
      s.masked |= rank_bit(peer);
      p.state->masked = s.masked;
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
  __device__ bool is_left_out() {
    const uint64_t by = ranks_where([&](uint32_t from) {
      const Abort abort = abort_from(from);  // Pairs with announce() of that rank.
      return abort.culprit == p.rank && concerns(abort, from);
    });
    if (by == 0) return false;
    fail_left_out(static_cast<uint32_t>(__ffsll(static_cast<long long>(by)) - 1));
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
  __device__ void begin_waits() {
    if (lane == 0) {
      s.deadline_ns = global_time_ns() + p.timeout_ns;
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

  // Waits until word(peer), which only `peer` raises, is at least awaited.at_least for every peer of the set. Returns those
  // that came; the others were left out, unless failed().
  template <class Word>
  __device__ uint64_t wait_for(uint64_t peers, const Awaited& awaited, Word word) {
    uint64_t pending = peers & ~s.masked & ~rank_bit(p.rank);
    uint64_t came = 0;
    const uint64_t begin_ns = __shfl_sync(kAllLanes, global_time_ns(), 0);  // one for all: it steers the loop
    uint64_t looked_ns = (pending & s.lost) != 0 ? 0 : begin_ns;            // For those that are gone nobody waits.
    uint64_t asked_ns = begin_ns;
    for (;;) {
      const uint64_t arrived = ranks_where([&](uint32_t peer) {
        // Pairs with the release of the peer that raises the word.
        return in_view(pending, peer) && load_acquire_sys(word(peer)) >= awaited.at_least;
      });
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
      heed_aborts(awaited, now - begin_ns);
      if (failed()) break;
      pending &= ~s.masked;
      if (now - asked_ns >= kAskNs) {
        asked_ns = now;
        // Written by the host's watchdog.
        const uint64_t lost = __shfl_sync(kAllLanes, load_relaxed_sys(&p.host->lost), 0);
        if (lane == 0) s.lost |= lost;
        __syncwarp();
      }
      // The words once more: a peer may finish its part and go.
      const uint64_t ended = ranks_where(
          [&](uint32_t peer) { return in_view(pending & s.lost, peer) && load_acquire_sys(word(peer)) < awaited.at_least; });
      if (ended != 0) give_up(ended, DEEPEP_ERROR_PEER_LOST, awaited, now - begin_ns, word);
      if (!failed() && now >= s.deadline_ns) time_out(pending, awaited, now - begin_ns, word);
      if (failed()) break;
      pending &= ~s.masked;
      if (pending == 0) break;
    }
    if (lane == 0 && looked_ns != begin_ns) store_relaxed_sys(&doorbell_at(own_memory(p), p.regions)->waiting_for, 0);
    __syncwarp();
    return came;
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
    // Who has come and ended since would have rows pushed to memory that may be gone.
    if (pushes && !failed() && (came & s.lost) != 0) give_up(came & s.lost, DEEPEP_ERROR_PEER_LOST, awaited, 0, word);
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

 private:
  static constexpr uint64_t kLookNs = 20'000;    // between two looks at aborts and the deadline
  static constexpr uint64_t kAskNs = 1'000'000;  // between two looks at host memory

  __device__ void account(uint64_t peers, int32_t kind, uint64_t begin_ns) {
    if (kind < 0 || peers == 0) return;
    const auto waited = static_cast<int64_t>(global_time_ns() - begin_ns);
    for (uint32_t peer = lane; peer < p.options.num_ranks; peer += kWarpLanes) {
      if (in_view(peers, peer)) p.state->wait_ns[kind][peer] += waited;
    }
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

  // Leaves the ranks out, or ends the call and blames the first of them.
  template <class Word>
  __device__ void give_up(uint64_t ranks, int32_t code, const Awaited& awaited, uint64_t waited_ns, Word word) {
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
    finding.seen = static_cast<int64_t>(load_acquire_sys(word(first)));
    finding.waited_ns = static_cast<int64_t>(waited_ns);
    fail(finding);
    announce_failure();
  }

  // The deadline has passed. A rank that itself waits for a third is not to blame: it will soon say who is, so the deadline is
  // drawn out once, by half, when all the missing ranks wait.
  template <class Word>
  __device__ void time_out(uint64_t pending, const Awaited& awaited, uint64_t waited_ns, Word word) {
    const uint64_t waiting = ranks_where([&](uint32_t peer) {
      if (!in_view(pending & ~s.lost, peer)) return false;
      return (load_relaxed_sys(&doorbell_at(p.symmetric[peer], p.regions)->waiting_for) & ~rank_bit(p.rank)) != 0;
    });
    const uint64_t to_blame = pending & ~waiting;
    if (to_blame == 0 && s.extended == 0) {
      if (lane == 0) {
        s.deadline_ns += p.timeout_ns / 2;
        s.extended = 1;
      }
      __syncwarp();
      return;
    }
    give_up(to_blame != 0 ? to_blame : pending, DEEPEP_ERROR_TIMEOUT, awaited, waited_ns, word);
  }

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
    for (uint64_t rest = view & ~common & ~s.masked; rest != 0; rest &= rest - 1) {
      mask_now(static_cast<uint32_t>(__ffsll(static_cast<long long>(rest)) - 1));
    }
    view = common & ~s.masked;
    return true;
  }
};

// Leader's block, by all threads: waits for all blocks at a meeting. With a deadline, when the device has no room for all of
// them the call is refused: nothing has been said to the peers yet.
__device__ inline void wait_for_blocks(const CallParams& p, CallShared& s, Meeting meeting, bool bounded) {
  if (threadIdx.x < kWarpLanes) {
    Leader leader(p, s);
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
      leader.refuse(DEEPEP_ERROR_TIMEOUT, Reason::no_room, finding);
      break;
    }
  }
  __syncthreads();
}

// The last thing in a kernel, leader's first warp, after wait_for_blocks(kMeetEnd): moves the state on and tells the
// host.
__device__ inline void call_end(const CallParams& p, CallShared& s, bool collective, bool needs_peers) {
  const uint32_t kind = p.op == DEEPEP_OP_DISPATCH ? 0 : 1;
  for (uint32_t rank = threadIdx.x; needs_peers && rank < p.options.num_ranks; rank += kWarpLanes) {
    p.host->wait_ns[kind * p.options.num_ranks + rank] = p.state->wait_ns[kind][rank];
  }
  __syncwarp();
  if (threadIdx.x != 0) return;
  DeviceState& state = *p.state;
  HostState& host = *p.host;
  if (s.skipped) {
    Finding& finding = state.finding;
    finding.seq = p.seq;
    finding.epoch = s.epoch;
    finding.op = p.op;
    finding.code = s.code = DEEPEP_ERROR_NEEDS_RECOVERY;
    finding.reason = Reason::needs_recovery;
  }
  const Finding& finding = state.finding;
  const bool half_way = s.code == DEEPEP_ERROR_TIMEOUT || s.code == DEEPEP_ERROR_PEER_LOST || s.code == DEEPEP_ERROR_ABORTED;
  if (s.code != 0 && needs_peers && half_way && finding.agreed == 0) state.failed = 1;
  if (s.code == 0 && p.op == DEEPEP_OP_DISPATCH) state.num_dispatches += 1;
  if (s.code == 0 && p.op == DEEPEP_OP_COMBINE) state.num_combines += 1;
  state.bad_entry = 0;
  state.claims[kClaimPush] = state.claims[kClaimPull] = 0;
  state.launches = s.launch;
  state.num_blocks = s.meeting;
  for (uint64_t& arrivals : state.arrivals) arrivals = s.meeting;
  if (collective) state.epoch = s.epoch;
  host.epoch = state.epoch;
  host.masked = state.masked;
  host.num_dispatches = state.num_dispatches;
  host.num_combines = state.num_combines;
  host.rows_sent = state.rows_sent;
  host.bytes_sent = state.bytes_sent;
  host.rows_pulled = state.rows_pulled;
  if (s.code != 0) {
    host.findings[state.num_failures % kNumFailuresKept] = finding;
    state.num_failures += 1;
    store_release_sys(&host.num_failures, state.num_failures);  // Pairs with the host's poll.
  }
  if (p.seq != 0) store_release_sys(&host.ended_seq, p.seq);  // The same.
}

}  // namespace deepep
