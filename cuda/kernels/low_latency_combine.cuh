// Low-latency combine: expert outputs are announced to the ranks of the dispatch, then each pulls and reduces its tokens' rows.
// One kernel for either half, or for both.
//
// In: LowLatencyCombineParams. Out: bf16 [num_tokens, hidden]. Phases: PUBLISH (wait until earlier readers of the region are
// gone, copy in what the caller has elsewhere, announce), and in the receive half REDUCE (wait for the peers' announcements,
// pull). The receive half may come many calls later, so announcements have lines of their own, and weights and routing are
// taken over by the send half. Graph-safe. Callers: launch_low_latency_combine(), launch_low_latency_give_up().
//
// As in the dispatch nobody waits for a leader: every block pulls as soon as it has seen all announcements, while the last warp
// of block 0 announces this rank's outputs and sees to what does not come soon, or is refused.
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
// Entries that a block looks up at once; of more than these each warp looks up its own later.
constexpr uint32_t kLookedUp = 1024;

struct LowLatencyCombineShared {
  CallShared call;
  uint32_t bad;  // ~position of the first entry that is not the dispatch's; 0 = none
  uint32_t num_rows;
  uint32_t stop;
  uint64_t gone;                             // ranks that nobody is to tell; the leader learns of more meanwhile
  uint64_t routed;                           // ranks of the dispatch; 0 = it has not succeeded
  uint32_t seen;                             // 1 = the workers have seen all announcements; for the leader
  uint32_t all_read;                         // 1 = a worker's warp is to tell the ranks in `read_of` that their rows are read
  uint64_t read_of;
  uint64_t waited_ns[DEEPEP_MAX_RANKS];      // leader's block
  const uint8_t* regions[DEEPEP_MAX_RANKS];  // expert outputs, by rank
  uint32_t slots[DEEPEP_MAX_RANKS];          // that the ranks have used in the dispatch
  ExpertRow entries[kLookedUp];
};

struct LowLatencyCombine {
  const LowLatencyCombineParams& params;
  LowLatencyCombineShared& s;
  uint32_t* starts;  // dynamic shared memory: [num_local_experts + 1], see find_starts()

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
  // Whether the blocks go by the leader's word.
  __device__ bool is_led() const {
    return p().mask_on_timeout != 0 || p().inject[DEEPEP_PHASE_PUBLISH].wanted != 0 ||
           p().inject[DEEPEP_PHASE_REDUCE].wanted != 0;
  }

  // Whether what is announced is there already: then it needs no leader.
  __device__ bool is_early() const { return params.sends != 0 && !is_led() && !copies(); }

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

  template <bool kWeighted, bool kFp8>
  __device__ void work() {
    const bool reads = threadIdx.x == num_workers() - 1, sends = params.sends != 0;
    CallFound state = {};
    if (reads) state = find_call(p());
    const bool checks = is_leader() && sends;
    const uint32_t count = checks ? num_entries() : min(num_entries(), kLookedUp);
    Entry entry = read_entry(threadIdx.x, count);  // under way with the rest
    const uint64_t routed = header().valid != 0 ? header().view : 0;
    const uint64_t combine_epoch = header().combine_epoch;
    const uint64_t masked = p().state->masked;
    const uint32_t slot = threadIdx.x < p().options.num_ranks ? header().peer_slots[threadIdx.x] : 0;
    if (threadIdx.x == 0) s.bad = s.num_rows = s.stop = 0;
    workers_meet();
    if (threadIdx.x < p().options.num_ranks) {
      s.slots[threadIdx.x] = slot;
      find_region(threadIdx.x, routed & ~masked);
    }
    for (uint32_t i = threadIdx.x; i < count; i += num_workers(), entry = read_entry(i, count)) {
      const ExpertRow from = found(entry);
      if (i < kLookedUp) s.entries[i] = from;
      if (checks && routed != 0) check_entry(i, entry, from, routed & ~masked);
    }
    if (reads) {
      read_call(p(), s.call, sends, true, state);
      if (!sends) s.call.epoch = combine_epoch;
      s.gone = s.call.masked | s.call.lost;
      s.routed = routed;
    }
    __syncthreads();
    if (!s.call.skipped) {
      bool goes = true;
      if (copies()) {
        goes = workers_await_leader(p(), s.call, kStepCounted);
        if (goes && routed != 0) {
          find_starts();
          if constexpr (kFp8)
            cast_in();
          else
            copy_in();
        }
        workers_arrive(p(), kMeetCopied);
      }
      if (params.receives != 0 && goes && routed != 0) reduce<kWeighted, kFp8>(routed, combine_epoch);
    }
    workers_arrive(p(), kMeetEnd);
    if (ends_apart() && is_leader() && threadIdx.x < kWarpLanes) {
      while (__shfl_sync(kAllLanes, load_acquire_block(&s.all_read), 0) == 0) {  // Pairs with lead().
      }
      __syncwarp();
      end_reading(p(), s.read_of, s.slots, s.call.epoch);
    }
  }

  // Whether workers tell the peers that their rows are read, while the leader ends the call.
  __device__ bool ends_apart() const { return params.receives != 0 && !is_led(); }

  // What the dispatch and the caller say of an entry.
  struct Entry {
    int64_t wanted;  // the dispatch's expert, or -1
    int32_t expert;
    uint32_t row;
    float weight;
  };
  __device__ Entry read_entry(uint32_t i, uint32_t count) const {
    if (i >= count) return {};
    const float* const weights_of = weights();
    return {params.sends != 0 ? entry(i) : params.routing.kept_experts[i], params.routing.experts[i], params.routing.rows[i],
            weights_of != nullptr ? weights_of[i] : 1.0f};
  }

  // The leader's block checks all entries, counts the rows, and keeps both for a receive half of its own.
  __device__ void check_entry(uint32_t i, const Entry& entry, const ExpertRow& from, uint64_t view) {
    if (entry.wanted != -1 && entry.wanted != entry.expert) atomicMax(&s.bad, ~i);
    // A wrong one is not looked at: the call fails.
    const bool is_wanted = entry.wanted == entry.expert;
    if (is_wanted && from.owner >= 0 && in_view(view, static_cast<uint32_t>(from.owner))) atomicAdd(&s.num_rows, 1u);
    if (params.receives != 0) return;
    params.routing.kept_experts[i] = is_wanted ? entry.expert : -1;
    if (params.args.topk_weights != 0) params.routing.kept_weights[i] = entry.weight;
  }

  // Where the row of an entry is.
  __device__ ExpertRow found(const Entry& entry) const {
    if (entry.wanted < 0 || entry.expert < 0) return {-1, 0, 0};
    const ExpertOwner owner = ExpertOwner::of(p(), static_cast<uint32_t>(entry.expert));
    return {static_cast<int32_t>(owner.rank), owner.local * p().regions.low_latency_rows + entry.row, entry.weight};
  }
  __device__ ExpertRow look_up(uint32_t i) const { return i < kLookedUp ? s.entries[i] : found(read_entry(i, i + 1)); }

  // ---- what is copied in

  // The rows of this rank's experts, one after another: starts[i] of them come before local expert i. The workers meet after.
  __device__ void find_starts() const {
    const auto* counts =
        reinterpret_cast<const int32_t*>(own_memory(p()) + slot_offset(p().regions, p().slot) + p().regions.counts);
    if (threadIdx.x < kWarpLanes) {
      uint32_t before = 0;
      for (uint32_t first = 0; first < p().num_local_experts; first += kWarpLanes) {
        const uint32_t local = first + lane_id();
        const uint32_t count = local < p().num_local_experts ? static_cast<uint32_t>(counts[local]) : 0;
        uint32_t sum = count;  // inclusive, over the lanes
        for (uint32_t step = 1; step < kWarpLanes; step *= 2) {
          const uint32_t other = __shfl_up_sync(kAllLanes, sum, step);
          if (lane_id() >= step) sum += other;
        }
        if (local < p().num_local_experts) starts[local] = before + sum - count;
        before += __shfl_sync(kAllLanes, sum, kWarpLanes - 1);
      }
      if (lane_id() == 0) starts[p().num_local_experts] = before;
    }
    workers_meet();
  }

  // Of the nth of those rows.
  struct LocalRow {
    uint32_t local;  // expert
    uint32_t row;
    uint64_t at;  // in the region, all experts' rows counted
  };
  __device__ LocalRow local_row(uint32_t nth) const {
    uint32_t begin = 0, end = p().num_local_experts;  // the last expert that starts at nth or before
    while (end - begin > 1) {
      const uint32_t middle = (begin + end) / 2;
      (starts[middle] <= nth ? begin : end) = middle;
    }
    const uint32_t row = nth - starts[begin];
    return {begin, row, uint64_t{begin} * p().regions.low_latency_rows + row};
  }

  // Copies what the peers will pull; this rank's own rows too when x may be gone before the receive half. All warps of all
  // blocks share the rows.
  __device__ void copy_in() const {
    const auto* ranges =
        reinterpret_cast<const int64_t*>(own_memory(p()) + slot_offset(p().regions, p().slot) + p().regions.layout_range);
    const uint32_t warps = num_workers() / kWarpLanes, count = starts[p().num_local_experts];
    const auto bytes = static_cast<uint32_t>(row_bytes());
    for (uint32_t nth = blockIdx.x * warps + threadIdx.x / kWarpLanes; nth < count; nth += gridDim.x * warps) {
      const LocalRow from = local_row(nth);
      if (reads_x()) {
        const int64_t own = ranges[from.local * p().options.num_ranks + p().rank];
        if (from.row - static_cast<uint32_t>(own >> 32) < static_cast<uint32_t>(own)) continue;
      }
      for (uint32_t offset = 0; offset < bytes; offset += kPieceUnits * kUnitBytes) {
        RowPiece<false, kPieceUnits> piece;
        const uint32_t left = min(bytes - offset, kPieceUnits * kUnitBytes);
        piece.load(x() + from.at * bytes + offset, left);
        piece.store(piece.share({}, offset / kUnitBytes, left, 0), own_region() + from.at * bytes, nullptr);
      }
    }
  }

  // Casts all rows to FP8, from where they are, which can be the region itself: a row of it then begins with the e4m3 row, and
  // its scales follow. Blocks share the rows; a block reads some whole ones before it writes.
  __device__ void cast_in() const {
    const CastRows rows = {.channels = p().options.hidden, .ue8m0 = false};
    const auto bytes = static_cast<uint32_t>(row_bytes());
    const uint32_t warps = num_workers() / kWarpLanes,
                   per_row = (bytes + kPieceUnits * kUnitBytes - 1) / (kPieceUnits * kUnitBytes);
    const uint32_t at_once = warps / per_row, count = starts[p().num_local_experts];
    const uint32_t in_pass = threadIdx.x / kWarpLanes / per_row, first_unit = threadIdx.x / kWarpLanes % per_row * kPieceUnits;
    const uint8_t* from = x() != nullptr ? x() : own_region();
    for (uint32_t first = blockIdx.x * at_once; first < count; first += gridDim.x * at_once) {
      const uint32_t nth = first + in_pass, offset = first_unit * kUnitBytes;
      const bool has = in_pass < at_once && nth < count;
      const uint64_t at = has ? local_row(nth).at * bytes : 0;
      const uint32_t left = has ? min(bytes - offset, kPieceUnits * kUnitBytes) : 0;
      const uint32_t units = (left + kUnitBytes - 1) / kUnitBytes;
      RowPiece<true, kPieceUnits> piece;
      piece.load(from + at + offset, left);
      piece.cast(units, false);
      workers_meet();
      if (!has) continue;
      uint8_t* to = own_region() + at;
      piece.store(piece.share(rows, first_unit, left, sizeof(float)), to, to + CastRows::scales_offset(rows.channels));
    }
  }

  // ---- what is pulled

  // Where this rank finds a rank's rows. One thread.
  __device__ void find_region(uint32_t src, uint64_t view) {
    const uint8_t* const region = src == p().rank && reads_x() ? x() : region_of(src, s.slots[src]);
    s.regions[src] = in_view(view, src) ? region : nullptr;
  }

  // The leader's word, where the blocks go by it. False when the call stops.
  __device__ bool await_word() {
    if (!workers_await_leader(p(), s.call, kStepGo)) return false;
    const uint64_t view = __ldcg(&p().state->view);
    if (threadIdx.x < p().options.num_ranks) find_region(threadIdx.x, view);
    workers_meet();
    return true;
  }
  // Else waits for the announcements of all ranks of the dispatch. False when the call stops.
  __device__ bool await_outputs(uint64_t view, uint64_t epoch) {
    if (s.bad != 0) return false;
    for (uint32_t src = threadIdx.x; src < p().options.num_ranks; src += num_workers()) {
      // Where rows are cast, this rank's own ones are what all its blocks have cast, which it is told as the others are.
      if (!in_view(view, src) || (src == p().rank && !casts())) continue;
      const ReadyLine* line = ready_at(own_memory(p()), p().regions, src, p().slot);
      const uint64_t begin_ns = global_time_ns();
      uint32_t looks = 1;
      // Pairs with announce_outputs() of src. Whether it refuses the call the leader sees; to read its rows then does no harm.
      for (; load_acquire_sys(&line->epoch) < epoch; ++looks) {
        if (looks % kLooksBetween != 0 || !is_stopped(p(), s.call)) continue;
        atomicOr(&s.stop, 1u);
        break;
      }
      if (looks > 1 && src != p().rank) s.waited_ns[src] = global_time_ns() - begin_ns;
    }
    workers_meet();
    if (is_leader() && threadIdx.x == 0) store_release_block(&s.seen, 1);  // Pairs with comes_soon().
    return s.stop == 0;
  }

  template <bool kWeighted, bool kFp8>
  __device__ void reduce(uint64_t routed, uint64_t combine_epoch) {
    const uint64_t epoch = params.sends != 0 ? s.call.epoch : combine_epoch;
    const bool led = is_led();
    if (epoch == 0 || (led && !await_word())) return;
    // A call that is not led masks nobody: these are the ranks as it began.
    const auto come = [&] { return led || await_outputs(routed & ~s.call.masked, epoch); };
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
    const auto source = [&](uint32_t token, uint32_t hop, float& weight) -> const uint8_t* {
      if (hop >= num_topk) return nullptr;
      const ExpertRow from = look_up(token * num_topk + hop);
      if (from.owner < 0 || s.regions[from.owner] == nullptr) return nullptr;
      if constexpr (kWeighted) weight = from.weight;
      return s.regions[from.owner] + from.row * row_bytes();
    };
    if constexpr (kFp8) {
      pull_fp8_rows<kWeighted>(pull, source, come);
    } else {
      constexpr uint32_t kVectors = 1, kBatch = 8;
      pull_rows_plain<kWeighted, kVectors, kBatch>(pull, source, come);
    }
  }

  // ---- the last warp ----

  __device__ void lead() {
    const bool sends = params.sends != 0, receives = params.receives != 0;
    ReadyLine* const mine = is_leader() && lane_id() < p().options.num_ranks ? line_of(lane_id()) : nullptr;
    if (is_leader() && is_early()) fence_to_peers(p());  // The outputs are there, which announce_outputs() says.
    if (lane_id() == 0) s.seen = s.all_read = 0;
    for (uint32_t rank = lane_id(); rank < DEEPEP_MAX_RANKS; rank += kWarpLanes) s.waited_ns[rank] = 0;
    __syncthreads();  // The workers have read the state and looked up the entries.
    if (!is_leader()) return;
    const uint64_t routed = s.routed;
    bool goes = !s.call.skipped;
    if (goes && sends) {
      if (is_early() && routed != 0 && s.bad == 0) {
        announce_outputs(routed & ~s.gone, 0, mine);
        publish_message();
        keep_sent(routed & ~s.gone);
      } else {
        goes = send_slowly(params, s, starts);
      }
    }
    if (!goes && lane_id() == 0) header().combine_epoch = 0;
    __syncwarp();
    uint64_t view = routed & ~s.call.masked;
    if (goes && receives) goes = receive(routed, view);
    if (!s.call.skipped && (!goes || (is_led() && receives))) stop_or_release(kStepGo, goes);
    // Nothing can fail any more where the workers go by themselves: the books are kept while they pull. What they have waited
    // they have said before that.
    const bool surely = ends_apart() && goes && comes_soon(&s.seen, 1);
    if (surely) keep_books(true);
    Leader(p(), s.call).await_blocks(kMeetEnd, false);
    // When the call was refused nobody reads, and says so too: then the announcements may be made anew.
    const bool ends =
        receives && (goes || is_refused()) && (p().mask_on_timeout == 0 || !is_overtaken(p(), s.call));
    if (ends_apart() && lane_id() == 0) {
      s.read_of = ends ? view & ~s.call.lost : 0;
      store_release_block(&s.all_read, 1);
    }
    if (ends && !ends_apart()) end_reading(p(), view & ~s.call.lost, s.slots, s.call.epoch);
    if (ends && lane_id() == 0) header().combine_epoch = 0;  // Nothing is left to be received, or given up.
    if (receives && !surely) keep_books(goes);
    call_end(p(), s.call, {sends, true, receives});
  }

  // What the statistics say of the receive half.
  __device__ void keep_books(bool goes) const {
    if (goes && lane_id() == 0) reduce_add_relaxed_gpu(&p().state->rows_pulled, header().num_rows);
    if (p().mask_on_timeout == 0) keep_waits(p(), 1, s.waited_ns, wait_stats());
  }

  DEEPEP_COLD __device__ static bool is_overtaken(const CallParams& p, CallShared& s) { return Leader(p, s).is_overtaken(); }

  __device__ int64_t* wait_stats() const { return reinterpret_cast<int64_t*>(params.args.wait_stats); }

  // Whether every rank has found alike that the call fails.
  __device__ bool is_refused() const { return s.call.code != 0 && p().state->finding.agreed != 0; }

  __device__ void stop_or_release(Step step, bool go) const {
    if (lane_id() == 0) release_blocks(p(), s.call, step, go);
    __syncwarp();
  }

  // Tells the ranks of the dispatch that the outputs are there: after a fence. This rank too, where rows are cast. `mine`: this
  // lane's first line, looked up before. Pairs with await_outputs() and wait_for_outputs() of the peer.
  __device__ void announce_outputs(uint64_t told, int32_t code, ReadyLine* mine) const {
    const uint64_t said = count_word(s.call.epoch, ready_said(code, params.args.flags & DEEPEP_FLAG_FP8));
    for (uint32_t peer = lane_id(); peer < p().options.num_ranks; peer += kWarpLanes) {
      if (!in_view(told, peer) || (peer == p().rank && !casts())) continue;
      ReadyLine* line = peer == lane_id() ? mine : line_of(peer);
      store_relaxed_sys(&line->said, said);
      store_relaxed_sys(&line->epoch, s.call.epoch);
    }
    __syncwarp();
  }
  // Where a peer is told of this rank's outputs.
  __device__ ReadyLine* line_of(uint32_t peer) const {
    return ready_at(p().symmetric[peer], p().regions, p().rank, header().peer_slots[peer]);
  }
  // A message in the ring as well, so that a rank which is in another call notices.
  __device__ void publish_message() const {
    Leader(p(), s.call).publish_all();
  }

  // What the receive half, and later calls, need to know of the send half.
  __device__ void keep_sent(uint64_t told) const {
    if (lane_id() == 0) {
      header().earlier = p().state->readers[p().slot];
      p().state->readers[p().slot] = {s.call.epoch, told};
      header().refusal.code = 0;
      if (s.call.code != 0) header().refusal = p().state->finding;
      header().num_rows = s.num_rows;
      header().combine_epoch = s.call.epoch;
    }
    __syncwarp();
  }

  // Waits for the outputs of every rank that takes part, which `view` then has. False when the call fails, on all ranks alike
  // or half-way.
  __device__ bool receive(uint64_t routed, uint64_t& view) {
    const bool may_go = routed != 0 && s.call.epoch != 0 && s.call.code == 0 && header().refusal.code == 0;
    if (!is_led() && may_go && comes_soon(&s.seen, 1)) {
      const uint32_t flags = params.args.flags & DEEPEP_FLAG_FP8;
      bool is_odd = false;
      for (uint32_t src = lane_id(); src < p().options.num_ranks; src += kWarpLanes) {
        if (src == p().rank || !in_view(view, src)) continue;
        const uint64_t said = load_relaxed_sys(&ready_at(own_memory(p()), p().regions, src, p().slot)->said);
        is_odd = is_odd || said != count_word(s.call.epoch, ready_said(0, flags));
      }
      if (!__any_sync(kAllLanes, is_odd)) return true;
    }
    view = receive_slowly(params, s, starts);
    return s.call.code == 0;
  }

  // ---- its seldom ways ----

  // The send half where something is copied, or refused, or deepep_inject wants something. False when the call has failed
  // half-way; a refusal is kept for the receive half.
  DEEPEP_COLD __device__ static bool send_slowly(const LowLatencyCombineParams& params, LowLatencyCombineShared& s,
                                                 uint32_t* starts) {
    LowLatencyCombine self{params, s, starts};
    return self.send();
  }
  __device__ bool send() {
    Leader leader(p(), s.call);
    leader.wait_stats = wait_stats();
    const uint64_t routed = s.routed;
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
    fence_to_peers(p());
    const uint64_t told = routed & ~(s.call.masked | s.call.lost);
    announce_outputs(told, s.call.code, lane_id() < p().options.num_ranks ? line_of(lane_id()) : nullptr);
    publish_message();
    keep_sent(told);
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

  DEEPEP_COLD __device__ static uint64_t receive_slowly(const LowLatencyCombineParams& params, LowLatencyCombineShared& s,
                                                        uint32_t* starts) {
    LowLatencyCombine self{params, s, starts};
    Leader leader(params.call, s.call);
    leader.wait_stats = self.wait_stats();
    uint64_t view = 0;
    self.wait_for_outputs(leader, s.routed, view);
    return view;
  }

  // Waits for the outputs of every rank that takes part, which `view` then has. False when the call fails, on all ranks alike
  // or half-way.
  __device__ bool wait_for_outputs(Leader& leader, uint64_t routed, uint64_t& view) {
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
    // What a line says may come a little after its epoch. Pairs with announce_outputs() of src.
    const auto seen = [&](uint32_t src) {
      const uint64_t epoch = load_acquire_sys(&line(src)->epoch);
      return is_count_of(load_relaxed_sys(&line(src)->said), epoch) ? epoch : 0;
    };
    const auto come = [&](uint64_t pending) {
      return leader.ranks_where([&](uint32_t src) { return in_view(pending, src) && seen(src) >= s.call.epoch; });
    };
    const int32_t kind = is_led() ? 1 : -1;
    const uint64_t came = leader.wait_until(routed, {Reason::late_output, s.call.epoch, kind, false}, come, seen,
                                            leader.begin_wait());
    if (leader.failed() && !is_refused()) return false;
    view = (came | rank_bit(p().rank)) & routed & ~s.call.masked;
    if (leader.lane == 0) p().state->view = view;
    const auto said = [&](uint32_t src) { return load_relaxed_sys(&line(src)->said); };
    const uint64_t refusing =
        leader.ranks_where([&](uint32_t src) { return in_view(came & view, src) && code_said(said(src)) != 0; });
    const uint32_t flags = params.args.flags & DEEPEP_FLAG_FP8;
    const uint64_t differing =
        leader.ranks_where([&](uint32_t src) { return in_view(came & view, src) && flags_said(said(src)) != flags; });
    if (leader.failed()) {
      // Found while it waited.
    } else if (refusal.code != 0) {
      leader.refuse(refusal.code, refusal.reason, refusal);
    } else if (refusing != 0) {
      Finding finding;
      finding.peer = static_cast<int32_t>(__ffsll(static_cast<long long>(refusing)) - 1);
      finding.a = code_said(said(static_cast<uint32_t>(finding.peer)));
      leader.refuse(DEEPEP_ERROR_ABORTED, Reason::refused, finding);
    } else if (differing != 0) {
      Finding finding;
      finding.peer = static_cast<int32_t>(__ffsll(static_cast<long long>(differing)) - 1);
      finding.a = kAgreedFlags;
      finding.expected = flags;
      finding.seen = flags_said(said(static_cast<uint32_t>(finding.peer)));
      leader.refuse(DEEPEP_ERROR_MISMATCH, Reason::disagreement, finding);
    }
    // Found by every rank: the region has no readers after all.
    if (leader.failed() && leader.lane == 0) forget_readers(p(), p().slot, s.call.epoch, header().earlier);
    __syncwarp();
    return !leader.failed();
  }
};

// Low-latency combine of one rank: the send half, which is collective, the receive half, or both. Graph-safe. The last warp of
// block 0 leads.
template <bool kWeighted, bool kFp8>
__global__ void __launch_bounds__(kMaxBlockThreads + kWarpLanes, 1)
    low_latency_combine_kernel(const __grid_constant__ LowLatencyCombineParams params) {
  extern __shared__ __align__(128) uint8_t dynamic_shared[];
  __shared__ LowLatencyCombineShared s;
  await_kernel_before();
  LowLatencyCombine combine{params, s, reinterpret_cast<uint32_t*>(dynamic_shared)};
  if (is_worker())
    combine.template work<kWeighted, kFp8>();
  else
    combine.lead();
}

// A combine whose receive half will never come: says that this rank reads nothing. Not collective; graph-safe. One warp.
__global__ void __launch_bounds__(kWarpLanes, 1)
    low_latency_give_up_kernel(const __grid_constant__ LowLatencyReceiveParams params) {
  __shared__ CallShared s;
  await_kernel_before();
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
