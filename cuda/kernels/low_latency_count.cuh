// How the blocks of a low-latency dispatch find the places of their rows by themselves: each counts the whole routing, which is
// small, and takes the other ranks' counts straight from their words.
//
// In: a rank's routing; the count words of protocol.hpp. Out: tables in shared memory: where this rank's rows begin in every
// expert's region, how full the regions get, and for a round of this block's tokens the place of every entry. No block waits
// for another. All blocks find the same, because a word once stored is not changed. Callers: low_latency_dispatch.cuh.
#pragma once

#include "count.cuh"

namespace deepep {

// The warps that work, which are all but the last, meet here; that one waits for peers meanwhile.
__device__ inline uint32_t num_workers() { return blockDim.x - kWarpLanes; }
__device__ inline void workers_meet() { named_barrier(1, num_workers()); }
__device__ inline bool is_worker() { return threadIdx.x < num_workers(); }

// The workers' part of what comes before a meeting of the blocks is done.
__device__ inline void workers_arrive(const CallParams& p, Meeting meeting) {
  workers_meet();
  // Releases what the workers have written; pairs with Leader::await_blocks().
  if (threadIdx.x == 0) add_acq_rel_gpu(&p.state->arrivals[meeting], 1);
}

// The workers wait for the leader's release to `step`, or its stop.
__device__ inline bool workers_await_leader(const CallParams& p, CallShared& s, Step step) {
  if (threadIdx.x == 0) s.go = hear_leader(p, s, step);
  workers_meet();
  return s.go != 0;
}

// What the workers of a block find in the counts. Zeroed before the first meeting.
struct CountFindings {
  uint32_t bad;       // ~position of the first wrong entry; 0 = none
  uint32_t stop;      // 1 = a peer refuses the call, or means another
  uint32_t overfull;  // ~the first expert whose region cannot hold its rows; 0 = none
  uint32_t counted;   // all of this is known; for the leader
};

// Tables in shared memory.
struct LowLatencyTables {
  uint32_t* own;     // [num_experts]: entries of this rank
  uint32_t* cursor;  // [num_experts]: entries before those that have no place yet
  uint32_t* base;    // [num_experts]: entries of lower ranks
  uint32_t* sum;     // [num_experts]: entries of all ranks
  int32_t* experts;  // [kRoundTokens, num_topk]: of the round
  uint32_t* places;  // [kRoundTokens, num_topk]: among this rank's entries of the expert; with base: in its region

  __device__ LowLatencyTables(uint8_t* shared, uint32_t num_experts, uint32_t num_topk) {
    own = reinterpret_cast<uint32_t*>(shared);
    cursor = own + num_experts;
    base = cursor + num_experts;
    sum = base + num_experts;
    experts = reinterpret_cast<int32_t*>(sum + num_experts);
    places = reinterpret_cast<uint32_t*>(experts) + kRoundTokens * num_topk;
  }
};

struct LowLatencyCount {
  const CallParams& p;
  const RoutingInput& input;
  const LowLatencyTables& tables;
  CountFindings& found;

  __device__ uint32_t num_experts() const { return p.options.num_experts; }

  // Workers: counts the entries of all tokens, and those before `own`, this block's tokens.
  __device__ void count(TokenRange own) const {
    const uint32_t entries = input.num_tokens * input.num_topk;
    // Under way while the tables are zeroed.
    int64_t value = threadIdx.x < entries ? input.raw(threadIdx.x) : -1;
    for (uint32_t i = threadIdx.x; i < 4 * num_experts(); i += num_workers()) tables.own[i] = 0;
    if (threadIdx.x == 0) found = {};
    workers_meet();
    const uint32_t before = own.begin * input.num_topk;
    for (uint32_t i = threadIdx.x; i < entries;) {
      if (value < -1 || value >= static_cast<int64_t>(num_experts())) {
        atomicMax(&found.bad, ~i);
      } else if (value >= 0) {
        atomicAdd(&tables.own[value], 1u);
        if (i < before) atomicAdd(&tables.cursor[value], 1u);
      }
      i += num_workers();
      if (i < entries) value = input.raw(i);
    }
  }

  // Workers: this rank's counts to the peers. The blocks share the peers.
  __device__ void publish(uint64_t epoch, uint64_t to, uint32_t hash, const CountSender& sender) const {
    for (uint32_t peer = blockIdx.x; peer < p.options.num_ranks; peer += gridDim.x) {
      if (peer == p.rank || !in_view(to, peer)) continue;
      uint64_t* words = count_words_at(p.symmetric[peer], p.regions, num_experts(), p.rank, epoch);
      // Its release says that the slot is free; pairs with take_sender() of the peer.
      if (threadIdx.x == 0)
        store_release_sys(words + num_experts() + kInfoSender, count_word(epoch, count_sender_word(sender)));
      if (threadIdx.x == 1) store_relaxed_sys(words + num_experts() + kInfoAgreed, count_word(epoch, hash));
      for (uint32_t e = threadIdx.x; e < num_experts(); e += num_workers()) {
        store_relaxed_sys(words + e, count_word(epoch, sender.refuses ? 0 : tables.own[e]));
      }
    }
  }

  // Workers: the words of the ranks in the view, each of which says by itself that it is of this call. One thread takes an
  // expert's counts, one a rank's slot, which `slot_of(rank, slot)` is told: so that all are under way at once. False when the
  // leader has stopped the call meanwhile. The workers must meet afterwards.
  template <class SlotOf>
  __device__ bool take(const CallShared& s, uint64_t view, uint32_t hash, SlotOf slot_of) const {
    const uint32_t experts = num_experts(), ranks = p.options.num_ranks;
    for (uint32_t item = threadIdx.x; item < experts + ranks + 1; item += num_workers()) {
      const bool came = item < experts           ? take_counts(s, view, item)
                        : item < experts + ranks ? take_sender(s, view, item - experts, slot_of)
                                                 : take_agreed(s, view, hash);
      if (!came) return false;
    }
    return true;
  }

  // Workers, with the tables complete: what every rank finds alike.
  __device__ void check_regions(uint64_t view) const {
    for (uint32_t e = threadIdx.x; e < num_experts(); e += num_workers()) {
      if (tables.sum[e] <= p.regions.low_latency_rows) continue;
      if (in_view(view, expert_rank(e, num_experts(), p.options.num_ranks))) atomicMax(&found.overfull, ~e);
    }
  }

  // Workers: the experts of a round of tokens. They must meet before the places are found.
  __device__ void load_round(TokenRange round) const {
    const uint32_t first = round.begin * input.num_topk, count = (round.end - round.begin) * input.num_topk;
    for (uint32_t i = threadIdx.x; i < count; i += num_workers()) tables.experts[i] = expert_of_entry(p, input, first + i);
  }

  // One warp: the place of every entry of the round among this rank's entries of its expert, in (token, k) order.
  __device__ void find_places(TokenRange round) const {
    const uint32_t lane = threadIdx.x % kWarpLanes;
    const uint32_t count = (round.end - round.begin) * input.num_topk;
    for (uint32_t first = 0; first < count; first += kWarpLanes) {
      const uint32_t i = first + lane;
      const int32_t expert = i < count ? tables.experts[i] : -1;
      const uint32_t same = __match_any_sync(kAllLanes, expert);
      uint32_t place = 0;
      if (expert >= 0) place = tables.cursor[expert] + static_cast<uint32_t>(__popc(same & ((1u << lane) - 1)));
      __syncwarp();
      // The last of those with the same expert moves its cursor on.
      if (expert >= 0 && same >> lane == 1) tables.cursor[expert] = place + 1;
      if (i < count) tables.places[i] = place;
      __syncwarp();
    }
  }

 private:
  static constexpr uint32_t kLoads = 8;  // words that a thread has under way
  static constexpr uint32_t kLooksBetween = 16;

  __device__ const uint64_t* word_of(const CallShared& s, uint32_t src, uint32_t i) const {
    return count_words_at(own_memory(p), p.regions, num_experts(), src, s.epoch) + i;
  }

  __device__ bool take_counts(const CallShared& s, uint64_t view, uint32_t expert) const {
    uint32_t lower = 0, all = in_view(view, p.rank) ? tables.own[expert] : 0;
    for (uint32_t first = 0; first < p.options.num_ranks; first += kLoads) {
      uint32_t counts[kLoads];
      if (!take_some(s, view, first, expert, counts)) return false;
#pragma unroll
      for (uint32_t i = 0; i < kLoads; ++i) {
        all += counts[i];
        if (first + i < p.rank) lower += counts[i];
      }
    }
    tables.base[expert] = lower;
    tables.sum[expert] = all;
    return true;
  }

  template <class SlotOf>
  __device__ bool take_sender(const CallShared& s, uint64_t view, uint32_t src, SlotOf slot_of) const {
    if (src == p.rank) slot_of(src, p.slot);
    if (src == p.rank || !in_view(view, src)) return true;
    for (uint32_t looks = 1;; ++looks) {
      const uint64_t word = load_acquire_sys(word_of(s, src, num_experts() + kInfoSender));  // Pairs with publish() of src.
      if (is_count_of(word, s.epoch)) {
        const CountSender sender = count_sender_from_word(static_cast<uint32_t>(word));
        if (sender.refuses) atomicOr(&found.stop, 1u);
        slot_of(src, sender.slot);
        return true;
      }
      if (looks % kLooksBetween == 0 && is_stopped(p, s)) return false;
    }
  }

  __device__ bool take_agreed(const CallShared& s, uint64_t view, uint32_t hash) const {
    for (uint32_t first = 0; first < p.options.num_ranks; first += kLoads) {
      uint32_t hashes[kLoads];
      if (!take_some(s, view, first, num_experts() + kInfoAgreed, hashes)) return false;
      for (uint32_t i = 0; i < kLoads; ++i) {
        if (is_asked(view, first + i) && hashes[i] != hash) atomicOr(&found.stop, 1u);
      }
    }
    return true;
  }

  __device__ bool is_asked(uint64_t view, uint32_t src) const {
    return src < p.options.num_ranks && src != p.rank && in_view(view, src);
  }

  // The i-th words of ranks `first`, first + 1, …; 0 for those that are not asked.
  __device__ bool take_some(const CallShared& s, uint64_t view, uint32_t first, uint32_t i, uint32_t (&values)[kLoads]) const {
    for (uint32_t looks = 1;; ++looks) {
      bool all_came = true;
#pragma unroll
      for (uint32_t nth = 0; nth < kLoads; ++nth) {
        values[nth] = 0;
        if (!is_asked(view, first + nth)) continue;
        const uint64_t word = load_relaxed_sys(word_of(s, first + nth, i));
        values[nth] = static_cast<uint32_t>(word);
        all_came = all_came && is_count_of(word, s.epoch);
      }
      if (all_came) return true;
      if (looks % kLooksBetween == 0 && is_stopped(p, s)) return false;
    }
  }
};

}  // namespace deepep
