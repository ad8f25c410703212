// Low-latency combine: expert outputs are announced to the ranks of the dispatch, then each pulls and reduces its tokens' rows.
// One kernel for either half, or for both.
//
// In: LowLatencyCombineParams. Out: bf16 [num_tokens, hidden]. Phases: PUBLISH (wait until earlier readers of the region are
// gone, copy in what the caller has elsewhere, announce), and in the receive half REDUCE (wait for the peers' announcements,
// pull). The receive half may come many calls later, so announcements have lines of their own, and weights and routing are
// taken over by the send half. Graph-safe. Callers: launch_low_latency_combine(), launch_low_latency_give_up().
//
// As in the dispatch nobody waits for a leader: every block pulls as soon as it has seen all announcements, while the last warp
// of block 0 sees to failures.
#pragma once

#include "combine.cuh"
#include "low_latency_count.cuh"
#include "rows_pull_fp8.cuh"

namespace deepep {

// A row that an entry of topk_idx became.
struct ExpertRow {
  int32_t owner;  // rank; -1 = none
  uint32_t row;   // in the owner's region, all its experts' rows counted
  float weight;
};
// Entries that a block looks up while it waits for the announcements; of more than these each warp looks up its own afterwards.
constexpr uint32_t kLookedUp = 1024;

struct LowLatencyCombineShared {
  CallShared call;
  uint32_t bad;  // ~position of the first entry that is not the dispatch's; 0 = none
  uint32_t num_rows;
  uint32_t stop;
  const uint8_t* regions[DEEPEP_MAX_RANKS];  // expert outputs, by rank
  uint32_t rows[kRoundTokens];               // of this rank's region: those at hand
  uint32_t num_found[2];
  ExpertRow entries[kLookedUp];
};

struct LowLatencyCombine {
  const LowLatencyCombineParams& params;
  LowLatencyCombineShared& s;
  uint8_t* shared;
  uint64_t* barriers;  // of bulk copies

  __device__ const CallParams& p() const { return params.call; }
  __device__ LowLatencyHeader& header() const { return *params.routing.header; }
  __device__ uint64_t row_bytes() const { return uint64_t{p().options.hidden} * 2; }
  __device__ uint32_t num_entries() const { return params.routing.num_tokens * params.routing.num_topk; }
  __device__ const uint8_t* region_of(uint32_t rank, uint32_t slot) const {
    return p().symmetric[rank] + slot_offset(p().regions, slot) + p().regions.expert_output;
  }
  __device__ uint8_t* own_region() const { return const_cast<uint8_t*>(region_of(p().rank, p().slot)); }
  __device__ const uint8_t* x() const { return reinterpret_cast<const uint8_t*>(params.args.x); }
  __device__ bool casts() const { return (params.args.flags & DEEPEP_FLAG_FP8) != 0; }
  // Whether anything is written into this rank's region before it is announced.
  __device__ bool copies() const { return params.sends != 0 && (casts() || (x() != nullptr && x() != own_region())); }
  // Whether this rank reads its own rows where the caller has them.
  __device__ bool reads_x() const { return params.sends != 0 && params.receives != 0 && x() != nullptr && !casts(); }
  // Whether the blocks go by the leader's word. Where rows are cast, this rank's own rows are what other blocks have cast.
  __device__ bool is_led() const {
    return (casts() && params.sends != 0 && params.receives != 0) || p().mask_on_timeout != 0 ||
           p().inject[DEEPEP_PHASE_PUBLISH].wanted != 0 || p().inject[DEEPEP_PHASE_REDUCE].wanted != 0;
  }

  // An entry as the caller gives it to the combine: the dispatch's expert, or -1.
  __device__ int64_t entry(uint32_t i) const {
    const auto* topk_idx = reinterpret_cast<const void*>(params.args.topk_idx);
    return params.args.topk_idx_bytes == 4 ? static_cast<const int32_t*>(topk_idx)[i]
                                           : static_cast<const int64_t*>(topk_idx)[i];
  }
  __device__ const float* weights() const {
    if (params.args.topk_weights == 0) return nullptr;
    return params.sends != 0 ? reinterpret_cast<const float*>(params.args.topk_weights) : params.routing.kept_weights;
  }

  // ---- workers ----

  template <bool kTma, bool kWeighted, bool kFp8>
  __device__ void work() {
    const uint64_t routed = header().valid != 0 ? header().view : 0;
    const uint64_t combine_epoch = header().combine_epoch;
    if (threadIdx.x == 0) s.bad = s.num_rows = s.stop = 0;
    workers_meet();
    if (is_leader() && params.sends != 0) take_entries(routed);
    __syncthreads();  // The leader's warp has read the state.
    if (!s.call.skipped) {
      bool goes = true;
      if (copies()) {
        goes = workers_await_leader(p(), s.call, kStepCounted);
        if (goes && routed != 0) {
          if constexpr (kFp8)
            cast_in();
          else
            copy_in();
        }
        workers_arrive(p(), kMeetCopied);
      }
      if (params.receives != 0 && goes && routed != 0) reduce<kTma, kWeighted, kFp8>(routed, combine_epoch);
    }
    workers_arrive(p(), kMeetEnd);
  }

  // Block 0: checks the entries, counts the rows, and keeps both for a receive half of its own.
  __device__ void take_entries(uint64_t routed) {
    const bool keeps = params.receives == 0;
    const uint64_t view = routed & ~p().state->masked;
    uint32_t num_rows = 0;
    for (uint32_t i = threadIdx.x; routed != 0 && i < num_entries(); i += num_workers()) {
      const int64_t value = entry(i);
      const int32_t expert = params.routing.experts[i];
      if (value != -1 && value != expert) atomicMax(&s.bad, ~i);
      // A wrong one is not looked at: the call fails.
      if (value == expert && expert >= 0 && in_view(view, owner_of(expert))) num_rows += 1;
      if (!keeps) continue;
      params.routing.kept_experts[i] = value == expert ? expert : -1;
      if (params.args.topk_weights != 0) params.routing.kept_weights[i] = weights()[i];
    }
    if (num_rows != 0) atomicAdd(&s.num_rows, num_rows);
  }
  __device__ uint32_t owner_of(int32_t expert) const {
    return expert_rank(static_cast<uint32_t>(expert), p().options.num_experts, p().options.num_ranks);
  }

  // Copies what the peers will pull; this rank's own rows too when x may be gone before the receive half. All warps of all
  // blocks share the rows.
  __device__ void copy_in() const {
    const uint8_t* slot = own_memory(p()) + slot_offset(p().regions, p().slot);
    const auto* counts = reinterpret_cast<const int32_t*>(slot + p().regions.counts);
    const auto* ranges = reinterpret_cast<const int64_t*>(slot + p().regions.layout_range);
    const uint32_t warps = num_workers() / kWarpLanes;
    uint32_t row = blockIdx.x * warps + threadIdx.x / kWarpLanes;
    for (uint32_t local = 0; local < p().num_local_experts; ++local) {
      const auto count = static_cast<uint32_t>(counts[local]);
      const int64_t own = ranges[local * p().options.num_ranks + p().rank];
      const auto own_begin = static_cast<uint32_t>(own >> 32), own_count = static_cast<uint32_t>(own);
      for (; row < count; row += gridDim.x * warps) {
        const bool is_own = row - own_begin < own_count;
        if (!is_own || !reads_x()) copy_row(uint64_t{local} * p().regions.low_latency_rows + row);
      }
      row -= count;
    }
  }
  __device__ void copy_row(uint64_t row) const {
    constexpr uint32_t kVectors = 4;
    const uint8_t* from = x() + row * row_bytes();
    uint8_t* to = own_region() + row * row_bytes();
    for (uint32_t first = lane_id() * 16; first < row_bytes(); first += kVectors * kWarpLanes * 16) {
      uint4 values[kVectors];
#pragma unroll
      for (uint32_t v = 0; v < kVectors; ++v) {
        const uint32_t at = first + v * kWarpLanes * 16;
        if (at < row_bytes()) values[v] = load_stream(from + at);
      }
#pragma unroll
      for (uint32_t v = 0; v < kVectors; ++v) {
        const uint32_t at = first + v * kWarpLanes * 16;
        if (at < row_bytes()) store_stream(to + at, values[v]);
      }
    }
  }

  // Casts all rows to FP8, from where they are, which can be the region itself: a row of it then begins with the e4m3 row, and
  // its scales follow. Blocks share the rows.
  __device__ void cast_in() {
    const CastRows rows = {.channels = p().options.hidden, .round = false, .ue8m0 = false};
    const uint32_t warps = num_workers() / kWarpLanes, at_once = min(params.plan.stages, kRoundTokens);
    const uint8_t* from = x() != nullptr ? x() : own_region();
    for (uint32_t first = blockIdx.x * at_once;; first += gridDim.x * at_once) {
      const uint32_t count = find_rows(first, at_once);
      if (count == 0) return;
      cast_rows(rows, shared, params.plan.chunk_bytes, count, warps,
                [&](uint32_t nth) { return from + s.rows[nth] * row_bytes(); });
      workers_meet();
      const uint32_t bytes =
          CastRows::scales_offset(rows.channels) + static_cast<uint32_t>(align_up(rows.num_blocks() * 4, 16));
      for (uint32_t nth = threadIdx.x / kWarpLanes; nth < count; nth += warps) {
        const uint8_t* stage = shared + nth * params.plan.chunk_bytes;
        uint8_t* to = own_region() + s.rows[nth] * row_bytes();
        for (uint32_t at = lane_id() * 16; at < bytes; at += kWarpLanes * 16) {
          store_stream(to + at, *reinterpret_cast<const uint4*>(stage + at));
        }
      }
      workers_meet();
    }
  }

  // Finds up to `most` rows from the first-th on, all experts' rows one after another. Returns how many there are.
  __device__ uint32_t find_rows(uint32_t first, uint32_t most) {
    const auto* counts =
        reinterpret_cast<const int32_t*>(own_memory(p()) + slot_offset(p().regions, p().slot) + p().regions.counts);
    bool found = false;
    if (threadIdx.x < most) {
      uint32_t row = first + threadIdx.x;
      for (uint32_t local = 0; local < p().num_local_experts && !found; ++local) {
        const auto count = static_cast<uint32_t>(counts[local]);
        found = row < count;
        if (found) s.rows[threadIdx.x] = local * p().regions.low_latency_rows + row;
        row -= count;
      }
    }
    if (threadIdx.x < 2 * kWarpLanes) {
      const uint32_t in_warp = static_cast<uint32_t>(__popc(__ballot_sync(kAllLanes, found)));
      if (lane_id() == 0) s.num_found[threadIdx.x / kWarpLanes] = in_warp;
    }
    workers_meet();
    return s.num_found[0] + s.num_found[1];
  }

  // Where the row of an entry is.
  __device__ ExpertRow look_up(uint32_t i) const {
    const int64_t wanted = params.sends != 0 ? entry(i) : params.routing.kept_experts[i];
    const int32_t expert = params.routing.experts[i];
    const uint32_t row = params.routing.rows[i];
    const float* const weights_of = weights();
    const float weight = weights_of != nullptr ? weights_of[i] : 1.0f;
    if (wanted < 0 || expert < 0) return {-1, 0, 0};
    const uint32_t owner = owner_of(expert);
    const uint32_t first = local_experts(p().options.num_experts, p().options.num_ranks, owner).first;
    return {static_cast<int32_t>(owner), (static_cast<uint32_t>(expert) - first) * p().regions.low_latency_rows + row, weight};
  }
  __device__ bool looks_up_early() const { return num_entries() <= kLookedUp; }

  // Waits for the announcements of all ranks of the dispatch. False when the call stops.
  __device__ bool await_outputs(uint64_t routed, uint64_t epoch) {
    for (uint32_t i = threadIdx.x; looks_up_early() && i < num_entries(); i += num_workers()) s.entries[i] = look_up(i);
    uint64_t view = 0;
    if (is_led()) {
      if (!workers_await_leader(p(), s.call, kStepGo)) return false;
      view = __ldcg(&p().state->view);
    } else {
      if (s.bad != 0) return false;
      view = routed & ~s.call.masked;  // In a call that is not led nobody is masked.
    }
    for (uint32_t src = threadIdx.x; src < p().options.num_ranks; src += num_workers()) {
      const bool counts = in_view(view, src);
      s.regions[src] = counts ? region_of(src, header().peer_slots[src]) : nullptr;
      if (src == p().rank && reads_x()) s.regions[src] = x();
      if (!counts || src == p().rank || is_led()) continue;
      const ReadyLine* line = ready_at(own_memory(p()), p().regions, src, p().slot);
      // Pairs with announce() of src. Whether it refuses the call the leader sees; to read its rows then does no harm.
      for (uint32_t looks = 1; load_acquire_sys(&line->epoch) < epoch; ++looks) {
        if (looks % kLooksBetween != 0 || !is_stopped(p(), s.call)) continue;
        atomicOr(&s.stop, 1u);
        break;
      }
    }
    // Peers have written the rows by plain stores, perhaps; they are read by TMA, perhaps.
    if constexpr (kHasTma) fence_proxy_async();
    workers_meet();
    return s.stop == 0;
  }
  static constexpr uint32_t kLooksBetween = 16;

  template <bool kTma, bool kWeighted, bool kFp8>
  __device__ void reduce(uint64_t routed, uint64_t combine_epoch) {
    const uint64_t epoch = params.sends != 0 ? s.call.epoch : combine_epoch;
    if (epoch == 0 || !await_outputs(routed, epoch)) return;
    const uint32_t num_topk = params.routing.num_topk;
    const PullRows pull = {.hidden = p().options.hidden,
                           .hops = num_topk,
                           .begin = 0,
                           .end = params.routing.num_tokens,
                           .bias_0 = nullptr,
                           .bias_1 = nullptr,
                           .out = reinterpret_cast<uint16_t*>(params.args.out),
                           .plan = params.plan,
                           .claims = &p().state->claims[kClaimPull]};
    const bool early = looks_up_early();
    const auto source = [&](uint32_t token, uint32_t hop, float& weight) -> const uint8_t* {
      if (hop >= num_topk) return nullptr;
      const uint32_t i = token * num_topk + hop;
      const ExpertRow from = early ? s.entries[i] : look_up(i);
      if (from.owner < 0 || s.regions[from.owner] == nullptr) return nullptr;
      if constexpr (kWeighted) weight = from.weight;
      return s.regions[from.owner] + from.row * row_bytes();
    };
    if constexpr (kFp8) {
      pull_fp8_rows<kWeighted>(pull, source);
    } else {
      pull_rows<kTma, kWeighted>(pull, shared, barriers, [&](uint32_t token, uint32_t hop, float& weight) {
        return reinterpret_cast<const uint16_t*>(source(token, hop, weight));
      });
    }
  }

  // ---- the last warp ----

  __device__ void lead() {
    if (threadIdx.x % kWarpLanes == 0) {
      read_call(p(), s.call, params.sends != 0, true);
      if (params.sends == 0) s.call.epoch = header().combine_epoch;
    }
    const uint64_t routed = header().valid != 0 ? header().view : 0;
    const LaneSlots slots = lane_slots();  // under way with the rest: what is announced goes there
    __syncthreads();                       // The workers have taken the entries.
    if (!is_leader()) return;
    Leader leader(p(), s.call);
    leader.wait_stats = reinterpret_cast<int64_t*>(params.args.wait_stats);
    const bool sends = params.sends != 0, receives = params.receives != 0;
    bool goes = !s.call.skipped;
    if (goes && sends) goes = send(leader, routed, slots);
    if (!goes && leader.lane == 0) header().combine_epoch = 0;
    __syncwarp();
    uint64_t view = 0;
    if (goes && receives) goes = receive(leader, routed, view);
    if (!s.call.skipped && (!goes || (is_led() && receives))) stop_or_release(kStepGo, goes);
    leader.await_blocks(kMeetEnd, false);
    if (receives && (goes || is_refused()) && !leader.is_overtaken()) {
      // When the call was refused nobody reads, and says so too: then the announcements may be made anew.
      end_reading(p(), view & ~s.call.lost, header().peer_slots, s.call.epoch);
      if (goes && leader.lane == 0) p().state->rows_pulled += header().num_rows;
      if (leader.lane == 0) header().combine_epoch = 0;  // Nothing is left to be received, or given up.
    }
    call_end(p(), s.call, {sends, true, receives});
  }

  // The slots that ranks have used in the dispatch: of those that a lane has to do with.
  struct LaneSlots {
    static constexpr uint32_t kPeers = DEEPEP_MAX_RANKS / kWarpLanes;
    uint32_t slot[kPeers];
  };
  __device__ LaneSlots lane_slots() const {
    LaneSlots slots;
#pragma unroll
    for (uint32_t nth = 0; nth < LaneSlots::kPeers; ++nth) slots.slot[nth] = header().peer_slots[nth * kWarpLanes + lane_id()];
    return slots;
  }

  // Whether every rank has found alike that the call fails.
  __device__ bool is_refused() const { return s.call.code != 0 && p().state->finding.agreed != 0; }

  __device__ void stop_or_release(Step step, bool go) const {
    if (threadIdx.x % kWarpLanes == 0) release_blocks(p(), s.call, step, go);
    __syncwarp();
  }

  // False when the call has failed half-way; a refusal is kept for the receive half.
  __device__ bool send(Leader& leader, uint64_t routed, const LaneSlots& slots) {
    if (!leader.enter(DEEPEP_PHASE_PUBLISH)) return false;
    // Otherwise the outputs are there already, and deepep_expert_output() has waited where there was something to wait for. A
    // refusal must not take the place of an announcement that a peer has yet to read.
    const bool refuses = header().valid == 0 || s.bad != 0;
    if (copies() || refuses) {
      leader.begin_waits();
      wait_for_readers(leader, p().slot, 1);
      if (leader.failed()) return false;
    }
    check_entries(leader);
    if (copies()) {
      stop_or_release(kStepCounted, true);
      leader.await_blocks(kMeetCopied, false);
    }
    announce(leader, routed, slots);
    if (leader.lane == 0) {
      p().state->combine_epoch[p().slot] = s.call.epoch;
      header().refusal = s.call.code != 0 ? p().state->finding : Finding{};
      header().num_rows = s.num_rows;
      header().combine_epoch = s.call.epoch;
    }
    __syncwarp();
    return true;
  }

  __device__ void check_entries(Leader& leader) {
    if (header().valid == 0) {
      leader.refuse(DEEPEP_ERROR_INVALID_ARGUMENT, Reason::no_dispatch);
    } else if (s.bad != 0) {
      const uint32_t i = ~s.bad;
      Finding finding;
      finding.a = static_cast<int32_t>(i / params.routing.num_topk);
      finding.b = static_cast<int32_t>(i % params.routing.num_topk);
      finding.expected = params.routing.experts[i];
      finding.seen = entry(i);
      leader.refuse(DEEPEP_ERROR_INVALID_ARGUMENT, Reason::changed_entry, finding);
    }
  }

  // Tells the ranks of the dispatch; a message in the ring as well, so that a rank which is in another call notices.
  __device__ void announce(Leader& leader, uint64_t routed, const LaneSlots& slots) {
    const uint64_t gone = s.call.masked | s.call.lost;
#pragma unroll
    for (uint32_t nth = 0; nth < LaneSlots::kPeers; ++nth) {
      const uint32_t peer = nth * kWarpLanes + leader.lane;
      if (peer >= p().options.num_ranks || peer == p().rank || !in_view(routed & ~gone, peer)) continue;
      ReadyLine* line = ready_at(p().symmetric[peer], p().regions, p().rank, slots.slot[nth]);
      store_relaxed_sys(&line->code, s.call.code);
      store_relaxed_sys(&line->flags, params.args.flags & DEEPEP_FLAG_FP8);
      store_release_sys(&line->epoch, s.call.epoch);  // Pairs with await_outputs() and receive() of the peer.
    }
    uint32_t agreed[kNumAgreed] = {};
    agreed[kAgreedOp] = DEEPEP_OP_LOW_LATENCY_COMBINE;
    agreed[kAgreedMaskOnTimeout] = p().mask_on_timeout;
    leader.publish_all(agreed, params.routing.num_tokens);
  }

  // Waits for the outputs of every rank that takes part, which `view` then has. False when the call fails, on all ranks alike
  // or half-way.
  __device__ bool receive(Leader& leader, uint64_t routed, uint64_t& view) {
    Finding refusal;
    if (params.sends == 0 && s.call.epoch == 0) {
      leader.refuse(DEEPEP_ERROR_ABORTED, Reason::no_send);
      return false;
    }
    refusal = header().refusal;
    __syncwarp();
    if (leader.lane == 0) s.call.code = 0;
    __syncwarp();
    if (!leader.enter(DEEPEP_PHASE_REDUCE)) return false;
    leader.begin_waits();
    const auto line = [&](uint32_t src) { return ready_at(own_memory(p()), p().regions, src, p().slot); };
    const uint64_t came =
        leader.wait_for(routed, {Reason::late_output, s.call.epoch, 1, false}, [&](uint32_t src) { return &line(src)->epoch; });
    if (leader.failed() && !is_refused()) return false;
    view = (came | rank_bit(p().rank)) & routed & ~s.call.masked;
    if (leader.lane == 0) p().state->view = view;
    const uint64_t refusing =
        leader.ranks_where([&](uint32_t src) { return in_view(came & view, src) && line(src)->code != 0; });
    const uint32_t flags = params.args.flags & DEEPEP_FLAG_FP8;
    const uint64_t differing =
        leader.ranks_where([&](uint32_t src) { return in_view(came & view, src) && line(src)->flags != flags; });
    if (leader.failed()) {
      // Found while it waited.
    } else if (refusal.code != 0) {
      leader.refuse(refusal.code, refusal.reason, refusal);
    } else if (refusing != 0) {
      Finding finding;
      finding.peer = static_cast<int32_t>(__ffsll(static_cast<long long>(refusing)) - 1);
      finding.a = line(static_cast<uint32_t>(finding.peer))->code;
      leader.refuse(DEEPEP_ERROR_ABORTED, Reason::refused, finding);
    } else if (differing != 0) {
      Finding finding;
      finding.peer = static_cast<int32_t>(__ffsll(static_cast<long long>(differing)) - 1);
      finding.a = kAgreedFlags;
      finding.expected = flags;
      finding.seen = line(static_cast<uint32_t>(finding.peer))->flags;
      leader.refuse(DEEPEP_ERROR_MISMATCH, Reason::disagreement, finding);
    }
    // Found by every rank: the region has no readers after all.
    if (leader.failed() && leader.lane == 0) p().state->combine_epoch[p().slot] = 0;
    __syncwarp();
    return !leader.failed();
  }
};

// Low-latency combine of one rank: the send half, which is collective, the receive half, or both. Graph-safe. The last warp of
// block 0 leads.
template <bool kTma, bool kWeighted, bool kFp8>
__global__ void __launch_bounds__(kMaxBlockThreads + kWarpLanes, 1)
    low_latency_combine_kernel(const __grid_constant__ LowLatencyCombineParams params) {
  extern __shared__ __align__(128) uint8_t dynamic_shared[];
  __shared__ LowLatencyCombineShared s;
  __shared__ uint64_t barriers[kTma ? kMaxBarriers : 1];
  LowLatencyCombine combine{params, s, dynamic_shared, barriers};
  if (is_worker())
    combine.template work<kTma, kWeighted, kFp8>();
  else
    combine.lead();
}

// A combine whose receive half will never come: says that this rank reads nothing. Not collective; graph-safe. One warp.
__global__ void __launch_bounds__(kWarpLanes, 1)
    low_latency_give_up_kernel(const __grid_constant__ LowLatencyReceiveParams params) {
  __shared__ CallShared s;
  const CallParams& p = params.call;
  call_begin(p, s, false, true);
  const LowLatencyHeader& header = *params.routing.header;
  if (!s.skipped && header.combine_epoch != 0 && header.valid != 0) {
    end_reading(p, header.view & ~s.lost, header.peer_slots, header.combine_epoch);
  }
  arrive(p, kMeetEnd);
  call_end(p, s, {false, true, false});
}

}  // namespace deepep
