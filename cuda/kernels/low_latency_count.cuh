// How the blocks of a low-latency dispatch find the places of their rows by themselves: each counts the whole routing, which is
// small, and takes the other ranks' counts straight from their words.
//
// In: a rank's routing; the count words of protocol.hpp. Out: tables in shared memory: where this rank's rows begin in every
// expert's region, how full the regions get, and for a round of this block's tokens the place of every entry. No block waits
// for another. All blocks find the same, because a word once stored is not changed. Callers: low_latency_dispatch.cuh.
#pragma once

#include "count.cuh"

namespace deepep {

constexpr uint32_t kLooksBetween = 16;  // at a peer's word, between two at the leader's

// The warps that work, which are all but the last, meet here; that one waits for peers meanwhile.
__device__ inline uint32_t num_workers() { return blockDim.x - kWarpLanes; }
__device__ inline void workers_meet() { named_barrier(1, num_workers()); }
__device__ inline bool is_worker() { return threadIdx.x < num_workers(); }

// The workers' part of what comes before a meeting of the blocks is done.
__device__ inline void workers_arrive(const CallParams& p, Meeting meeting) {
  workers_meet();
  // Releases what the workers have written; pairs with Leader::await_blocks().
  if (threadIdx.x == 0) reduce_add_release_gpu(&p.state->arrivals[meeting], 1);
}

// The workers wait for the leader's release to `step`, or its stop.
__device__ inline bool workers_await_leader(const CallParams& p, CallShared& s, Step step) {
  if (threadIdx.x == 0) s.go = hear_leader(p, s, step);
  workers_meet();
  return s.go != 0;
}

// ---- what the leader's warp hears of the workers of its block

// Waits a little for a word that they raise. False when it is time to look elsewhere.
__device__ inline bool comes_soon(const uint32_t* word, uint32_t at_least) {
  const uint64_t begin_ns = __shfl_sync(kAllLanes, global_time_ns(), 0);
  while (__shfl_sync(kAllLanes, load_acquire_block(word), 0) < at_least) {
    if (__shfl_sync(kAllLanes, global_time_ns(), 0) - begin_ns > Waits::kLookNs) return false;
  }
  __syncwarp();  // What the first lane has acquired, all have; others may have looked before.
  return true;
}

// Adds what they have waited for each rank to the statistics.
__device__ inline void keep_waits(const CallParams& p, uint32_t kind, const uint64_t* waited_ns, int64_t* wait_stats) {
  for (uint32_t src = lane_id(); src < p.options.num_ranks; src += kWarpLanes) {
    keep_wait(p, kind, src, waited_ns[src], wait_stats);
  }
}

// What the workers of a block find in the counts. Zeroed before the first meeting.
struct CountFindings {
  uint32_t bad;       // ~position of the first wrong entry; 0 = none
  uint32_t stop;      // 1 = a peer refuses the call, or means another
  uint32_t overfull;  // ~the first expert whose region cannot hold its rows; 0 = none
  uint32_t counted;   // nothing of this changes any more; for the leader
};

// Where the row of an entry goes.
struct alignas(16) RowPlace {
  uint64_t x_word;  // its address, a multiple of 16, and in the lowest bit whether its scales go as a row; 0 = nowhere
  uint8_t* scales;

  __device__ static RowPlace at(uint8_t* x, uint8_t* scales, bool in_row) {
    return {reinterpret_cast<uint64_t>(x) | (in_row ? 1 : 0), scales};
  }
  __device__ bool in_row() const { return (x_word & 1) != 0; }
  __device__ uint8_t* x() const { return reinterpret_cast<uint8_t*>(x_word & ~uint64_t{1}); }
};
static_assert(sizeof(RowPlace) + 12 == kEntryTableBytes);

// Who has an expert, and where among its own.
struct ExpertOwner {
  uint32_t rank, local;

  __device__ static ExpertOwner of(const CallParams& p, uint32_t expert) {
    const uint32_t rank = p.partition.rank(expert);
    return {rank, expert - p.partition.experts(rank).first};
  }
  __device__ static ExpertOwner from_word(uint32_t word) { return {word >> 16, word & 0xffff}; }
  __device__ uint32_t word() const { return rank << 16 | local; }
};

// Tables in shared memory.
struct LowLatencyTables {
  uint32_t* own;     // [num_experts]: entries of this rank
  uint32_t* cursor;  // [num_experts]: entries before those that have no place yet
  uint32_t* base;    // [num_experts]: entries of lower ranks
  uint32_t* sum;     // [num_experts]: entries of all ranks
  RowPlace* places;  // [kRoundTokens, num_topk]: of the round
  int32_t* experts;  // [kRoundTokens, num_topk]: likewise
  uint32_t* nth;     // [kRoundTokens, num_topk]: place among this rank's entries of the expert; with base: in its region
  uint32_t* owners;  // [kRoundTokens, num_topk]: words of ExpertOwner

  __device__ LowLatencyTables(uint8_t* shared, uint32_t num_experts, uint32_t num_topk) {
    places = reinterpret_cast<RowPlace*>(shared);
    experts = reinterpret_cast<int32_t*>(places + kRoundTokens * num_topk);
    nth = reinterpret_cast<uint32_t*>(experts) + kRoundTokens * num_topk;
    owners = nth + kRoundTokens * num_topk;
    own = owners + kRoundTokens * num_topk;
    cursor = own + num_experts;
    base = cursor + num_experts;
    sum = base + num_experts;
  }
};

struct LowLatencyCount {
  const CallParams& p;
  const RoutingInput& input;
  const LowLatencyTables& tables;
  CountFindings& found;

  __device__ uint32_t num_experts() const { return p.options.num_experts; }

  // Workers: counts the entries of all tokens, and those before `own`, this block's tokens. `begun()` is called when the first
  // of them are on their way.
  template <class Begun>
  __device__ void count(TokenRange own, Begun begun) const {
    const uint32_t entries = input.num_tokens * input.num_topk;
    // Under way while the tables are zeroed.
    const auto entry = [&](uint32_t i) { return i < entries ? input.raw(i) : -1; };
    int64_t value = entry(threadIdx.x), next = entry(threadIdx.x + num_workers());
    begun();
    for (uint32_t i = threadIdx.x; i < 2 * num_experts(); i += num_workers()) tables.own[i] = 0;  // and tables.cursor
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
      value = next;
      next = entry(i + num_workers());
    }
  }

  // Workers, when all have counted: this rank's counts to the peers, and what it says of itself: that its slot is free. That
  // needs no fence, as in a dispatch of normal mode: earlier kernels have used it, and have ended. The warps of all blocks
  // share the words: each has a part of one peer's, or more. Pairs with take() of the peers.
  __device__ void publish(uint64_t epoch, uint64_t to, uint32_t hash, CountSender sender) const {
    const uint32_t block_warps = num_workers() / kWarpLanes;
    sender.refuses = found.bad != 0;
    publish_counts(
        p, to & ~rank_bit(p.rank), epoch, threadIdx.x / kWarpLanes * gridDim.x + blockIdx.x, gridDim.x * block_warps,
        num_experts() + kNumCountInfos,
        [&](uint32_t peer) { return count_words_at(p.symmetric[peer], p.regions, num_experts(), p.rank, epoch); },
        [&](uint32_t i) {
          if (i < num_experts()) return sender.refuses ? 0 : tables.own[i];
          return i - num_experts() == kInfoSender ? count_sender_word(sender) : hash;
        });
  }

  // The first `threads` workers: the words of the ranks in the view, each of which says by itself that it is of this call. One
  // thread takes an expert's counts, one what a rank says of itself, which `heard(rank, sender, waited_ns)` is told: of another
  // warp, where there are as many, so that all are under way at once. False when the leader has stopped the call meanwhile. The
  // workers must meet afterwards.
  template <class Heard>
  __device__ bool take(const CallShared& s, uint64_t view, uint32_t hash, uint32_t threads, Heard heard) const {
    const auto senders = static_cast<uint32_t>(align_up(num_experts(), kWarpLanes)), items = senders + p.options.num_ranks;
    const uint64_t begin_ns = global_time_ns();
    for (uint32_t item = threadIdx.x; item < items; item += threads) {
      if (item >= num_experts() && item < senders) continue;
      const bool came =
          item < senders ? take_expert(s, view, item) : take_sender(s, view, item - senders, hash, begin_ns, heard);
      if (!came) return false;
    }
    return true;
  }

  // The leader's warp, when the workers have taken the counts: what the user is told of them.
  __device__ void fill_counts(const CallShared& s, uint64_t view, int32_t* counts, int64_t* ranges) const {
    const uint32_t ranks = p.options.num_ranks;
    const uint64_t stride = src_stride();
    for (uint32_t local = lane_id(); local < p.num_local_experts; local += kWarpLanes) {
      const uint64_t* words = words_of(s, 0) + p.first_expert + local;
      uint32_t begin = 0;
      for (uint32_t first = 0; first < ranks; first += kCountsAtOnce, words += kCountsAtOnce * stride) {
        uint32_t some[kCountsAtOnce];
#pragma unroll
        for (uint32_t nth = 0; nth < kCountsAtOnce; ++nth) {
          some[nth] = 0;
          if (first + nth >= ranks || !in_view(view, first + nth)) continue;
          some[nth] = first + nth == p.rank ? tables.own[p.first_expert + local]
                                            : static_cast<uint32_t>(load_relaxed_sys(words + nth * stride));
        }
#pragma unroll
        for (uint32_t nth = 0; nth < kCountsAtOnce; ++nth) {
          if (first + nth < ranks)
            ranges[local * ranks + first + nth] = static_cast<int64_t>(uint64_t{begin} << 32 | some[nth]);
          begin += some[nth];
        }
      }
      counts[local] = static_cast<int32_t>(begin);
    }
    __syncwarp();
  }

  // One warp, when the counts have been taken: how many rows of a local expert a rank has, and where they begin in its region.
  struct Range {
    uint32_t begin, count;
  };
  __device__ Range range(const CallShared& s, uint64_t view, uint32_t local, uint32_t src) const {
    const uint32_t expert = p.first_expert + local;
    uint32_t before = 0, mine = 0;
    for (uint32_t rank = lane_id(); rank <= src; rank += kWarpLanes) {
      if (!in_view(view, rank)) continue;
      const uint32_t count =
          rank == p.rank ? tables.own[expert] : static_cast<uint32_t>(load_relaxed_sys(words_of(s, rank) + expert));
      if (rank == src)
        mine = count;
      else
        before += count;
    }
    __syncwarp();
    return {__reduce_add_sync(kAllLanes, before), __reduce_add_sync(kAllLanes, mine)};
  }

  // The leader's warp: entries of this rank whose rows are sent.
  __device__ uint32_t num_sent(uint64_t view) const {
    uint32_t sent = 0;
    for (uint32_t e = lane_id(); e < num_experts(); e += kWarpLanes) {
      if (view == all_ranks(p) || in_view(view, ExpertOwner::of(p, e).rank)) sent += tables.own[e];
    }
    return __reduce_add_sync(kAllLanes, sent);
  }

  // One warp: the entries of a round of tokens, and the place of each among this rank's entries of its expert, in (token, k)
  // order.
  __device__ void find_places(TokenRange round) const {
    const uint32_t lane = lane_id(), first_entry = round.begin * input.num_topk;
    const uint32_t count = (round.end - round.begin) * input.num_topk;
    for (uint32_t first = 0; first < count; first += kWarpLanes) {
      const uint32_t i = first + lane;
      const int32_t expert = i < count ? expert_of_entry(p, input, first_entry + i) : -1;
      const uint32_t same = __match_any_sync(kAllLanes, expert);
      uint32_t place = 0;
      if (expert >= 0) place = tables.cursor[expert] + static_cast<uint32_t>(__popc(same & ((1u << lane) - 1)));
      __syncwarp();
      // The last of those with the same expert moves its cursor on.
      if (expert >= 0 && same >> lane == 1) tables.cursor[expert] = place + 1;
      if (i < count) {
        tables.experts[i] = expert;
        tables.nth[i] = place;
        tables.owners[i] = expert >= 0 ? ExpertOwner::of(p, static_cast<uint32_t>(expert)).word() : 0;
      }
      __syncwarp();
    }
  }

 private:
  __device__ const uint64_t* words_of(const CallShared& s, uint32_t src) const {
    return count_words_at(own_memory(p), p.regions, num_experts(), src, s.epoch);
  }

  __device__ uint64_t src_stride() const { return uint64_t{p.regions.message_ring} * (num_experts() + kNumCountInfos); }

  // An expert's counts; and what every rank finds alike: whether its region can hold the rows.
  __device__ bool take_expert(const CallShared& s, uint64_t view, uint32_t expert) const {
    const uint64_t peers = view & all_ranks(p) & ~rank_bit(p.rank), stride = src_stride();
    const uint64_t* words = words_of(s, 0) + expert;
    uint32_t lower = 0, all = tables.own[expert];
    for (uint32_t first = 0; first < p.options.num_ranks; first += kCountsAtOnce, words += kCountsAtOnce * stride) {
      const auto asked = static_cast<uint32_t>(peers >> first);
      const auto below = static_cast<uint32_t>((rank_bit(p.rank) - 1) >> first);
      uint32_t counts[kCountsAtOnce];
      const auto goes_on = [&](uint32_t looks) { return looks % kLooksBetween != 0 || !is_stopped(p, s); };
      if (!take_counts(words, stride, asked, s.epoch, counts, goes_on)) return false;
#pragma unroll
      for (uint32_t nth = 0; nth < kCountsAtOnce; ++nth) {
        all += counts[nth];
        if ((below >> nth & 1) != 0) lower += counts[nth];
      }
    }
    tables.base[expert] = lower;
    tables.sum[expert] = all;
    // Nobody keeps the rows of an owner that takes no part.
    if (all > p.regions.low_latency_rows && in_view(view, ExpertOwner::of(p, expert).rank)) atomicMax(&found.overfull, ~expert);
    return true;
  }

  template <class Heard>
  __device__ bool take_sender(const CallShared& s, uint64_t view, uint32_t src, uint32_t hash, uint64_t begin_ns,
                              Heard heard) const {
    if (src == p.rank || !in_view(view, src)) return true;
    const uint64_t* infos = words_of(s, src) + num_experts();
    for (uint32_t looks = 1;; ++looks) {
      const uint64_t agreed = load_relaxed_sys(infos + kInfoAgreed);
      const uint64_t word = load_acquire_sys(infos + kInfoSender);  // Pairs with publish() of src.
      if (is_count_of(word, s.epoch) && is_count_of(agreed, s.epoch)) {
        const CountSender sender = count_sender_from_word(static_cast<uint32_t>(word));
        if (sender.refuses || static_cast<uint32_t>(agreed) != hash) atomicOr(&found.stop, 1u);
        heard(src, sender, looks == 1 ? 0 : global_time_ns() - begin_ns);
        return true;
      }
      if (looks % kLooksBetween == 0 && is_stopped(p, s)) return false;
    }
  }
};

}  // namespace deepep
