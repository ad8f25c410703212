// How the blocks of a call act as one, and how the call talks to its peers: the device side of common/protocol.hpp.
//
// In: CallParams. Out: a call in which every block does the same: either it goes, or it stops with a Finding. Block 0 leads:
// one warp of it alone decides who takes part and who is late, so that a peer that comes in the last moment cannot be there for
// one block and missing for another; others may look for peers, and give up when it says so. Callers: every kernel of an
// operation.
//
// Words between blocks. state->arrivals[m] only grows: each block adds one at meeting m, so a meeting is complete at (blocks of
// earlier kernels + blocks of this one); at the end, when no block touches them any more, the leader puts the counters of
// meetings that were left out to the same. state->verdict names kernel, step and outcome; it is only compared, never cleaned.
//
// Bounds. The leader's waits have deadlines. The other blocks wait for the leader, for each other's work, which does not wait,
// and in low latency for words of peers until is_stopped(); a block that has not started yet does so when the device has room,
// which the end of the kernel needs anyway.
#pragma once

#include "../common/protocol.hpp"
#include "../common/routing.hpp"
#include "../host/params.hpp"
#include "primitives.cuh"

namespace deepep {

// Meetings of a kernel.
enum Meeting : uint32_t { kMeetCounted = 0, kMeetPlaced = 1, kMeetCopied = 2, kMeetEnd = 3, kMeetPushed = 4 };

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
  uint64_t lost;         // ranks that have ended, as far as the leader knows: their memory may be gone, and is not touched
  uint64_t deadline_ns;  // leader: of the waits of this phase
  int32_t code;          // leader: DEEPEP_ERROR_* once the call has failed
  int32_t phase;         // leader
  uint32_t skipped;      // the buffer needs a recovery
  uint32_t extended;     // leader: the deadline was drawn out
  uint32_t go;
  uint32_t peer_slots[DEEPEP_MAX_RANKS];  // leader: as in the state; of ranks that take no part, nothing
  // Leader: what this rank says of what all must say alike, where the host does not know it, with agreed_hash() of all.
  uint32_t said_topk_weights;
  uint32_t said_routing;
  uint32_t said_hash;
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

// Releases to the peers what this thread has written, or acquired; a store, or the stores that follow the fence, tell of it. On
// one H200 it takes 1 us less to reach the GPU than all of the system.
template <class... Words>
__device__ __forceinline__ void release_to_peers(const CallParams& p, uint64_t* address, Words... words) {
  p.one_gpu != 0 ? store_release_gpu(address, words...) : store_release_sys(address, words...);
}
__device__ __forceinline__ void fence_to_peers(const CallParams& p) {
  p.one_gpu != 0 ? fence_acq_rel_gpu() : fence_acq_rel_sys();
}

// A thread: counts of up to kCountsAtOnce ranks, each in a word that says by itself that it is of this call. Bit i of `asked`:
// the i-th is waited for; of others there is none. False when `goes_on(looks)` has enough before they are there.
constexpr uint32_t kCountsAtOnce = 8;  // under way
template <class GoesOn>
__device__ __forceinline__ bool take_counts(const uint64_t* words, uint64_t stride, uint32_t asked, uint64_t epoch,
                                            uint32_t (&counts)[kCountsAtOnce], GoesOn goes_on) {
  for (uint32_t looks = 1;; ++looks) {
    uint64_t word[kCountsAtOnce];
#pragma unroll
    for (uint32_t i = 0; i < kCountsAtOnce; ++i) {
      word[i] = count_word(epoch, 0);
      if ((asked >> i & 1) != 0) word[i] = load_relaxed_sys(words + i * stride);
    }
    bool all_came = true;
#pragma unroll
    for (uint32_t i = 0; i < kCountsAtOnce; ++i) {
      all_came = all_came && is_count_of(word[i], epoch);
      counts[i] = static_cast<uint32_t>(word[i]);
    }
    if (all_came) return true;
    if (!goes_on(looks)) return false;
  }
}

// What a call finds in the state. Loads that are under way until something is used.
struct CallFound {
  uint64_t epoch, base_epoch, launches, num_blocks, masked, lost;
  uint32_t failed;
};
__device__ __forceinline__ CallFound find_call(const CallParams& p) {
  const DeviceState& state = *p.state;
  return {state.epoch, state.base_epoch, state.launches, state.num_blocks, state.masked, state.lost, state.failed};
}

// What a call begins with, by one thread; the block must meet before others look. `needs_peers` calls do nothing while the
// buffer needs a recovery.
__device__ inline void read_call(const CallParams& p, CallShared& s, bool collective, bool needs_peers,
                                 const CallFound& found) {
  s.epoch = collective ? found.epoch + 1 : 0;
  s.base_epoch = found.base_epoch;
  s.launch = found.launches + 1;
  s.meeting = found.num_blocks + gridDim.x;
  s.masked = found.masked;
  s.view = 0;
  s.lost = p.lost | found.lost;
  s.code = 0;
  s.phase = DEEPEP_PHASE_NONE;
  s.skipped = needs_peers && found.failed != 0;
  s.extended = 0;
  s.go = 0;
  s.said_topk_weights = p.agreed[kAgreedTopkWeights];
  s.said_routing = 0;
  s.said_hash = p.agreed_hash;
}
__device__ inline void read_call(const CallParams& p, CallShared& s, bool collective, bool needs_peers) {
  read_call(p, s, collective, needs_peers, find_call(p));
}

// One thread of the leader's block, before the message is published: the epoch of the dispatch that made the handle.
__device__ inline void say_routing(CallShared& s, uint64_t epoch) {
  s.said_routing = static_cast<uint32_t>(epoch);
  s.said_hash += agreed_term(kAgreedRouting, s.said_routing);
}

// The first thing in a kernel after await_kernel_before(), by all threads.
__device__ inline void call_begin(const CallParams& p, CallShared& s, bool collective, bool needs_peers) {
  if (threadIdx.x == 0) read_call(p, s, collective, needs_peers);
  __syncthreads();
}

// This block's part of what comes before the meeting is done. By all threads.
__device__ inline void arrive(const CallParams& p, Meeting meeting) {
  __syncthreads();
  // Releases what the block has written; pairs with wait_for_blocks().
  if (threadIdx.x == 0) reduce_add_release_gpu(&p.state->arrivals[meeting], 1);
}

// Leader, one thread: releases the other blocks to a step, or stops them. Pairs with await_leader().
__device__ inline void release_blocks(const CallParams& p, const CallShared& s, Step step, bool go) {
  store_release_gpu(&p.state->verdict, s.launch << 4 | static_cast<uint64_t>(step) << 1 | (go ? 0 : 1));
}

// One thread: waits for the leader's release to `step`, or its stop. True = the call goes on.
__device__ inline bool hear_leader(const CallParams& p, const CallShared& s, Step step) {
  for (;;) {
    const uint64_t verdict = load_acquire_gpu(&p.state->verdict);  // Pairs with release_blocks().
    if (verdict >> 4 != s.launch) continue;
    if ((verdict & 1) != 0) return false;
    if ((verdict >> 1 & 7) >= step) return true;
  }
}

// The same by all threads of a block that is not the leader's.
__device__ inline bool await_leader(const CallParams& p, CallShared& s, Step step) {
  if (threadIdx.x == 0) s.go = hear_leader(p, s, step);
  __syncthreads();
  return s.go != 0;
}

// Whether the leader has stopped the call, without waiting for a word of it.
__device__ inline bool is_stopped(const CallParams& p, const CallShared& s) {
  const uint64_t verdict = load_relaxed_gpu(&p.state->verdict);  // Nothing is read that the leader has written before it.
  return verdict >> 4 == s.launch && (verdict & 1) != 0;
}

// How a kernel ends.
struct CallEnd {
  bool collective;   // it has taken an epoch
  bool needs_peers;  // else it changes nothing that peers depend on
  bool counts;       // as a dispatch or a combine that has ended, should it have gone well
};

// One warp of the leader's block, when all blocks have met at kMeetEnd: moves on what only the blocks of a kernel know of,
// however the call ends. Where the leader has yet to wait for peers, it is done by then.
__device__ inline void end_blocks(const CallParams& p, const CallShared& s) {
  if (lane_id() != 0) return;
  DeviceState& state = *p.state;
  state.bad_entry = 0;
  state.claims[kClaimPush] = state.claims[kClaimPull] = 0;
  state.launches = s.launch;
  state.num_blocks = s.meeting;
  for (uint64_t& arrivals : state.arrivals) arrivals = s.meeting;
}

// One thread. `count`: how many there are.
template <uint32_t kSize>
__device__ inline void tell_finding(Findings<kSize>& findings, uint64_t& count, const Finding& finding) {
  findings.kept[count % kSize] = finding;
  count += 1;
  store_release_sys(&findings.count, count);  // Pairs with the host's poll.
}

// The last thing in a kernel, by the same warp after end_blocks(): moves the state on and tells the host. A store to the
// host's memory holds up the next kernel, and so does a trip to the L2 cache for what would be stored: what went well in a
// graph is not told, else no more than that the call has ended. Whoever asks for more looks at the state itself.
__device__ inline void tell_end(const CallParams& p, CallShared& s, const CallEnd& end) {
  const bool tells = p.seq != 0 || s.code != 0 || s.skipped;
  if (tells) __syncwarp();  // What the other lanes have counted is told too, and what they have looked at changes now.
  if (lane_id() != 0) return;
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
  const bool is_dispatch = p.op == DEEPEP_OP_DISPATCH || p.op == DEEPEP_OP_LOW_LATENCY_DISPATCH;
  const bool half_way = s.code == DEEPEP_ERROR_TIMEOUT || s.code == DEEPEP_ERROR_PEER_LOST || s.code == DEEPEP_ERROR_ABORTED;
  if (s.code != 0 && end.needs_peers && half_way && finding.agreed == 0) {
    host.failed_epoch = end.collective ? s.epoch : state.epoch;  // Told with the finding below.
    state.failed = 1;
  }
  if (s.code == 0 && end.counts) reduce_add_relaxed_gpu(is_dispatch ? &state.num_dispatches : &state.num_combines, 1);
  if (end.collective) state.epoch = s.epoch;
  if (!tells) return;
  if (end.collective) host.epoch = s.epoch;
  if (s.code != 0) {
    state.num_failures += 1;
    if (p.seq != 0)
      tell_finding(host.failures, state.num_told, finding);
    else if (!s.skipped)
      tell_finding(host.captured_failures, state.num_told_captured, finding);
    state.finding = Finding{};
  }
  if (p.seq != 0) store_release_sys(&host.ended_seq, p.seq);  // The same.
}

// Both.
__device__ inline void call_end(const CallParams& p, CallShared& s, const CallEnd& end) {
  end_blocks(p, s);
  tell_end(p, s, end);
}

}  // namespace deepep
