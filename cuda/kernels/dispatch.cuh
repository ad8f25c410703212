// Dispatch: counts first, then each row straight to its final place on every destination rank. One kernel.
//
// In: DispatchParams. Out: rows in the peers' slots and in this rank's, counts on the device and on the host. Phases: NOTIFY
// (count, exchange messages, check), SEND (push), ARRIVE (wait for everyone's pushes). protocol.hpp says why two
// synchronisations suffice. While the leader waits for messages, all blocks work out the places of their tokens; when it goes,
// warps of all blocks claim tokens to push. Graph-safe. Caller: launch_dispatch().
#pragma once

#include "pushed.cuh"
#include "rows.cuh"
#include "rows_push.cuh"
#include "scales.cuh"

namespace deepep {

// Where a slot's received tensors lie, on any rank.
struct SlotView {
  uint8_t* x;
  uint8_t* scales;
  uint8_t* topk_idx;
  float* topk_weights;
  int32_t* src_idx;
};

__device__ inline SlotView slot_view(const CallParams& p, uint8_t* slot) {
  const Regions& r = p.regions;
  return {slot + r.recv_x, slot + r.recv_scales, slot + r.recv_topk_idx, reinterpret_cast<float*>(slot + r.recv_topk_weights),
          reinterpret_cast<int32_t*>(slot + r.recv_src_idx)};
}

// Warps of a block beside those that push: they give the counts to the user while rows move.
constexpr uint32_t kClerks = 1;

// The slots of all ranks, as a block pushes to them.
struct DispatchShared {
  CallShared call;
  RoutingHeader known;  // leader, of a cached dispatch: the handle's, as the call began
  uint64_t left_out;    // leader: ranks whose rows will not come
  PushedShared pushed;  // leader
  uint32_t stopped;     // 1 = a warp of this block has left rows out
  uint8_t* slots[DEEPEP_MAX_RANKS];
  int32_t first_experts[DEEPEP_MAX_RANKS];
  uint32_t row_bases[DEEPEP_MAX_RANKS];  // rank layout
};

__device__ inline ScaleUnits scale_units(const deepep_dispatch_args& args) {
  return scale_units(ScaleRows{args.num_scales, args.scale_elem_bytes, args.scales_elem_stride, args.recv_scales_elem_stride,
                               args.scales | args.scales_row_stride | args.recv_scales_row_stride});
}

struct Dispatch {
  const DispatchParams& params;
  DispatchShared& s;
  uint8_t* shared;

  __device__ const CallParams& p() const { return params.call; }
  __device__ bool cached() const { return (params.args.flags & DEEPEP_FLAG_CACHED) != 0; }
  __device__ bool by_expert() const { return params.routing.layout == DEEPEP_LAYOUT_EXPERT; }
  __device__ RoutingInput input() const {
    return {reinterpret_cast<const void*>(params.args.topk_idx), reinterpret_cast<const uint8_t*>(params.args.is_token_in_rank),
            params.routing.topk_idx_bytes, params.routing.num_tokens, params.routing.num_topk};
  }
  __device__ const float* weights() const { return reinterpret_cast<const float*>(params.args.topk_weights); }

  // ---- NOTIFY

  // A thread of the leader's block, before call_begin(): its loads are under way together with those there.
  __device__ void read_known() const {
    if (is_leader() && cached()) s.known = *params.routing.header;
  }

  // Leader's block: what this rank finds wrong in its own routing, before it says anything.
  __device__ void check_routing() {
    if (threadIdx.x >= kWarpLanes) return;
    Leader leader(p(), s.call);
    if (cached()) {
      if (s.known.valid != params.routing.name) leader.refuse(DEEPEP_ERROR_INVALID_ARGUMENT, Reason::no_routing);
      return;
    }
    const uint64_t bad = load_relaxed_gpu(&p().state->bad_entry);
    if (bad == 0) return;
    const RoutingInput from = input();
    Finding finding;
    finding.a = static_cast<int32_t>(~bad / from.num_topk);
    finding.b = static_cast<int32_t>(~bad % from.num_topk);
    finding.expected = p().options.num_experts;
    finding.seen = from.raw(~bad);
    leader.refuse(DEEPEP_ERROR_INVALID_ARGUMENT, Reason::bad_entry, finding);
  }

  // Leader's block: num_tokens_per_expert of a routing by is_token_in_rank.
  __device__ void check_expert_counts(const int32_t* per_expert) {
    constexpr int32_t most = DEEPEP_MAX_TOKENS * DEEPEP_MAX_TOPK;
    for (uint32_t e = threadIdx.x; e < p().options.num_experts; e += blockDim.x) {
      if (per_expert[e] < 0 || per_expert[e] > most) max_relaxed_gpu(&p().state->bad_entry, ~uint64_t{e});
    }
    __syncthreads();
    const uint64_t bad = load_relaxed_gpu(&p().state->bad_entry);
    if (bad == 0 || threadIdx.x >= kWarpLanes) return;
    Finding finding;
    finding.a = static_cast<int32_t>(~bad);
    finding.seen = per_expert[~bad];
    Leader(p(), s.call).refuse(DEEPEP_ERROR_INVALID_ARGUMENT, Reason::bad_expert_count, finding);
  }

  // Leader's block: puts this rank's counts into its messages.
  __device__ void store_counts(const int32_t* per_expert) {
    const uint32_t ranks = p().options.num_ranks, columns = ranks + p().options.num_experts;
    for (uint32_t i = threadIdx.x; i < columns; i += blockDim.x) {
      uint32_t sum = counted_before(p(), gridDim.x, i);
      if (i >= ranks && per_expert != nullptr) sum = static_cast<uint32_t>(per_expert[i - ranks]);
      for (uint32_t peer = 0; peer < ranks; ++peer) {
        if (in_view(s.call.masked | s.call.lost, peer)) continue;
        message_counts(message_at(p().symmetric[peer], p().regions, p().rank, s.call.epoch))[i] = sum;
      }
    }
  }

  // Leader's block: takes the count matrix out of the messages, which the ring will reuse.
  __device__ void keep_counts() {
    const uint32_t ranks = p().options.num_ranks, experts = p().options.num_experts, columns = ranks + experts;
    for (uint32_t i = threadIdx.x; i < ranks * columns; i += blockDim.x) {
      const uint32_t src = i / columns, column = i % columns;
      const uint32_t* counts = message_counts(message_at(own_memory(p()), p().regions, src, s.call.epoch));
      const uint32_t count = in_view(s.call.view, src) ? counts[column] : 0;
      if (column < ranks)
        params.routing.tokens[src * ranks + column] = count;
      else
        params.routing.entries[src * experts + (column - ranks)] = count;
    }
  }

  // Leader's warp, when the rows of all ranks are known. Every rank has the whole matrix, so all fail alike, before a row has
  // moved.
  __device__ void check_capacity(Leader& leader, const RowTables& tables) {
    for (uint32_t first = 0; first < p().options.num_ranks; first += kWarpLanes) {
      const uint32_t mine = first + leader.lane;
      const bool counts = mine < p().options.num_ranks && in_view(s.call.view, mine);
      const uint32_t over = __ballot_sync(kAllLanes, counts && tables.rows[mine] > p().options.max_recv_tokens);
      if (over == 0) continue;
      const uint32_t dst = first + static_cast<uint32_t>(__ffs(static_cast<int>(over))) - 1;
      Finding finding;
      finding.peer = static_cast<int32_t>(dst);
      finding.expected = p().options.max_recv_tokens;
      finding.seen = static_cast<int64_t>(tables.rows[dst]);
      leader.refuse(DEEPEP_ERROR_CAPACITY, Reason::capacity, finding);
      return;
    }
  }

  // The same: releases the blocks to push, or stops them.
  __device__ void go(Leader& leader, const RowTables& tables) {
    check_capacity(leader, tables);
    if (!leader.failed()) {
      if (leader.lane == 0) {
        params.routing.header->view = s.call.view;
        if (!cached()) params.routing.header->epoch = s.call.epoch;
      }
      leader.enter(DEEPEP_PHASE_SEND);
    }
    if (leader.lane == 0) release_blocks(p(), s.call, kStepGo, s.call.code == 0);
  }

  // The leader's block until it goes, or stops with s.call.code. The second warp publishes; where there are no counts it waits
  // for its fence beside what the first does.
  __device__ void lead(const CountTables& tables) {
    const bool leads = threadIdx.x < kWarpLanes, publishes = threadIdx.x / kWarpLanes == 1;
    Leader leader(p(), s.call);
    if (publishes && cached()) {
      if (threadIdx.x == kWarpLanes) say_routing(s.call, s.known.epoch);
      __syncwarp();
      fence_acq_rel_sys();  // What has read the slot comes before what says that it can be written.
    }
    bool entered = true;
    if (leads) entered = leader.enter(DEEPEP_PHASE_NOTIFY);
    const auto* per_expert = reinterpret_cast<const int32_t*>(params.args.num_tokens_per_expert);
    if (!cached()) {
      wait_for_blocks(p(), s.call, kMeetCounted, true);
      if (threadIdx.x == 0) release_blocks(p(), s.call, kStepCounted, s.call.code == 0);
    }
    if (__syncthreads_or(leads && !entered)) {  // Silent, as deepep_inject told it: nothing is said to the peers.
      if (threadIdx.x == 0) release_blocks(p(), s.call, kStepGo, false);
      return;
    }
    check_routing();
    if (!cached() && params.args.topk_idx == 0 && per_expert != nullptr) check_expert_counts(per_expert);
    __syncthreads();
    if (!cached() && s.call.code == 0) store_counts(per_expert);
    __syncthreads();
    if (publishes) cached() ? leader.publish_all<true>() : leader.publish_all();
    // While the messages come: the places, or of a routing that is known already the rows, should all ranks take part.
    const bool goes = s.call.code == 0, places = !cached() && goes;
    const uint64_t expected = all_ranks(p()) & ~(s.call.masked | s.call.lost);
    const RowTables rows = row_tables(p(), shared);
    if (places) {
      place_block(p(), input(), tables, by_expert(), params.routing);
      arrive(p(), kMeetPlaced);
    } else if (goes) {
      find_row_bases(p(), params.routing, expected, rows);
    }
    __syncthreads();
    bool gone = false;
    if (leads) {
      gone = leader.gather(0, true) && cached() && s.call.view == expected;
      if (gone) go(leader, rows);  // It needs nobody for that.
    }
    if (!__syncthreads_or(leads && !gone)) return;
    if (s.call.code != 0) {
      if (threadIdx.x == 0) release_blocks(p(), s.call, kStepGo, false);
      return;
    }
    if (!cached()) keep_counts();
    __syncthreads();
    find_row_bases(p(), params.routing, s.call.view, rows);
    // Any block may push any token: all must have their places.
    if (places) wait_for_blocks(p(), s.call, kMeetPlaced, false);
    if (leads) go(leader, rows);
  }

  // True when rows may be pushed. By all threads.
  __device__ bool notify() {
    const CountTables tables = count_tables(p(), shared, shared_bytes(), by_expert());
    if (!cached()) {
      // Until this dispatch has succeeded the handle holds no routing.
      if (is_leader() && threadIdx.x == 0) params.routing.header->valid = 0;
      if (!s.call.skipped) {
        count_block(p(), input(), tables, by_expert(), params.routing.experts);
        arrive(p(), kMeetCounted);
      }
    }
    if (s.call.skipped) return false;
    if (is_leader()) {
      lead(tables);
      __syncthreads();
      return s.call.code == 0;
    }
    if (!cached()) {
      // A stop is for good: whoever asked again would change the answer that others of the block are reading.
      if (!await_leader(p(), s.call, kStepCounted)) return false;
      place_block(p(), input(), tables, by_expert(), params.routing);
      arrive(p(), kMeetPlaced);
    }
    return await_leader(p(), s.call, kStepGo);
  }

  __device__ uint32_t shared_bytes() const { return params.plan.block_bytes; }

  // ---- counts for the user

  __device__ void store_count(uint64_t i, int32_t value) const {
    reinterpret_cast<int32_t*>(params.args.recv_num_rows)[i] = value;
    if (p().seq != 0) store_relaxed_sys(reinterpret_cast<uint64_t*>(params.args.host_counts) + i, host_count(p().seq, value));
  }

  // The clerk of each block, a warp that pushes no rows: the counts, on the device and on the host. Each word tells the host
  // by itself that it is there: a fence would wait for more than them. The clerks share them, because one after another they
  // would take longer than the rows of few tokens; the first of all, which the host looks at, mostly comes last.
  __device__ void fill_counts() {
    const CountMatrix matrix = matrix_of(p(), params.routing, s.call.view);
    const uint32_t lane = threadIdx.x % kWarpLanes;
    const uint32_t ranks = p().options.num_ranks;
    auto* stats = reinterpret_cast<int32_t*>(params.args.expert_stats);
    for (uint32_t e = blockIdx.x * kWarpLanes + lane; e < p().num_local_experts; e += gridDim.x * kWarpLanes) {
      const uint32_t entries = entries_before(matrix, ranks, p().first_expert + e);
      store_count(2 + e, static_cast<int32_t>(aligned(entries, params.routing.expert_alignment)));
      if (stats != nullptr) stats[e] += static_cast<int32_t>(entries);
    }
    if (is_leader()) {
      for (uint32_t src = lane; src < ranks; src += kWarpLanes) {
        const uint32_t tokens = in_view(s.call.view, src) ? matrix.tokens[src * ranks + p().rank] : 0;
        store_count(2 + p().num_local_experts + src, static_cast<int32_t>(tokens));
      }
      if (lane == 0) {
        store_count(1, static_cast<int32_t>(p().state->num_rows));
        store_count(0, static_cast<int32_t>(tokens_before(matrix, ranks, p().rank)));
      }
    }
    if (blockIdx.x != gridDim.x - 1) return;
    const uint64_t sent = rows_sent();
    if (lane != 0) return;
    const uint64_t row_bytes = params.args.row_bytes + uint64_t{params.args.num_scales} * params.args.scale_elem_bytes;
    reduce_add_relaxed_gpu(&p().state->rows_sent, sent);
    reduce_add_relaxed_gpu(&p().state->bytes_sent, sent * row_bytes);
  }

  // Nothing came: whoever works by the counts, without asking how the call ended, finds no rows of an earlier one. The host
  // does the same with its own.
  __device__ void clear_counts() {
    const uint32_t num_counts = 2 + p().num_local_experts + p().options.num_ranks;
    auto* counts = reinterpret_cast<int32_t*>(params.args.recv_num_rows);
    for (uint32_t i = threadIdx.x; i < num_counts; i += blockDim.x) counts[i] = 0;
    __syncthreads();
  }

  // ---- SEND

  __device__ void put_index(uint8_t* topk_idx, uint64_t i, int32_t value) const {
    if (params.routing.topk_idx_bytes == 4)
      reinterpret_cast<int32_t*>(topk_idx)[i] = value;
    else
      reinterpret_cast<int64_t*>(topk_idx)[i] = value;
  }

  // One warp: -1 source index and no weight in a row that nobody fills; with `payload_too` zeros in x and scales.
  __device__ void clear_row(const SlotView& here, uint64_t row, bool payload_too) const {
    const uint32_t lane = threadIdx.x % kWarpLanes;
    const uint32_t num_topk = params.routing.num_topk;
    const uint32_t weights_a_row = by_expert() ? 1 : num_topk;
    if (lane == 0) here.src_idx[row] = -1;
    if (!by_expert() && lane < num_topk) put_index(here.topk_idx, row * num_topk + lane, -1);
    if (params.args.recv_topk_weights != 0 && lane < weights_a_row) here.topk_weights[row * weights_a_row + lane] = 0.0f;
    if (!payload_too) return;
    auto* x = reinterpret_cast<uint4*>(here.x + row * params.args.row_bytes);
    for (uint32_t i = lane; i < params.args.row_bytes / 16; i += kWarpLanes) x[i] = {0, 0, 0, 0};
    if (params.args.num_scales == 0) return;
    const ScaleUnits units = scale_units(params.args);
    for (uint32_t unit = lane; unit < units.count; unit += kWarpLanes) {
      store_unit(here.scales + row * params.args.recv_scales_row_stride + units.to(unit), {0, 0, 0, 0}, units.bytes);
    }
  }

  // Warps `first`, `first` + `step`, …: clears rows begin … end - 1.
  __device__ void clear_rows(const SlotView& here, uint64_t begin, uint64_t end, uint32_t first, uint32_t step,
                             bool payload_too) const {
    for (uint64_t row = begin + first; row < end; row += step) clear_row(here, row, payload_too);
  }

  // Expert layout: the rows of this rank's slot that no rank pushes to. All blocks share them.
  __device__ void clear_padding() const {
    const SlotView here = slot_view(p(), s.slots[p().rank]);
    const uint32_t warps = blockDim.x / kWarpLanes;
    const uint32_t warp = blockIdx.x * warps + threadIdx.x / kWarpLanes;
    const uint32_t alignment = params.routing.expert_alignment;
    for (uint32_t e = 0; alignment > 1 && e < p().num_local_experts; ++e) {
      const uint64_t begin = __ldcg(group_begins(p()) + e), entries = __ldcg(group_entries(p()) + e);
      clear_rows(here, begin + entries, begin + align_up(entries, alignment), warp, gridDim.x * warps,
                 (params.args.flags & DEEPEP_FLAG_ZERO_PADDING) != 0);
    }
  }

  // Rank layout: no experts in the rows after the last, where shapes are those of the capacity. -1 is all ones in either width.
  // All threads share them.
  __device__ void clear_experts() const {
    if (by_expert() || (params.args.flags & DEEPEP_FLAG_NO_CPU_SYNC) == 0 || params.routing.num_topk == 0) return;
    constexpr uint32_t kWords = 4;  // at once
    const uint64_t row_words = uint64_t{params.routing.num_topk} * params.routing.topk_idx_bytes / 4;
    auto* words = reinterpret_cast<uint32_t*>(slot_view(p(), s.slots[p().rank]).topk_idx);
    const uint64_t begin = __ldcg(&p().state->num_rows) * row_words, end = p().options.max_recv_tokens * row_words;
    const uint64_t first = align_up(begin, kWords) < end ? align_up(begin, kWords) : end, last = end / kWords * kWords;
    const uint32_t mine = blockIdx.x * blockDim.x + threadIdx.x, all = gridDim.x * blockDim.x;
    for (uint64_t i = first + kWords * mine; i < last; i += kWords * all) {
      *reinterpret_cast<uint4*>(words + i) = {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff};
    }
    if (begin + mine < first) words[begin + mine] = 0xffffffff;
    if (last + mine < end && last + mine >= first) words[last + mine] = 0xffffffff;
  }

  // A row that a token becomes.
  struct Row {
    uint8_t* slot;  // nullptr = none
    uint32_t rank;
    uint64_t row;
  };
  __device__ Row row_of(uint32_t token, uint32_t hop) const {
    if (hop >= params.routing.width) return {};
    const DeviceHop to = params.routing.hops[uint64_t{token} * params.routing.width + hop];
    if (to.key < 0) return {};
    const auto key = static_cast<uint32_t>(to.key);
    const uint32_t rank = by_expert() ? p().partition.rank(key) : key;
    if (!in_view(s.call.view, rank)) return {};
    return {s.slots[rank], rank, uint64_t{by_expert() ? row_bases(p())[key] : s.row_bases[rank]} + to.index};
  }

  // One warp: what travels beside the rows of a token: scales, source index, top-k.
  __device__ void put_beside(uint32_t token, const ScaleUnits& units) const {
    const uint32_t lane = threadIdx.x % kWarpLanes;
    const uint32_t num_topk = params.routing.num_topk;
    const uint64_t entry = uint64_t{token} * num_topk + lane;
    const bool has_entry = lane < num_topk;
    const float weight = has_entry && weights() != nullptr ? weights()[entry] : 0.0f;
    const int32_t expert = has_entry ? params.routing.experts[entry] : -1;
    const int32_t source = static_cast<int32_t>(p().rank * p().options.max_tokens_per_rank + token);
    const uint32_t owner = expert >= 0 ? p().partition.rank(static_cast<uint32_t>(expert)) : ~0u;
    const auto* scales = reinterpret_cast<const uint8_t*>(params.args.scales) + token * params.args.scales_row_stride;
    const bool puts_topk = !by_expert() && num_topk > 0;
    const uint32_t rounds = (units.count + kWarpLanes - 1) / kWarpLanes;
    for (uint32_t first = 0; first < params.routing.width; first += kWarpLanes) {
      const Row mine = row_of(token, first + lane);
      if (mine.slot != nullptr) {
        const SlotView to = slot_view(p(), mine.slot);
        to.src_idx[mine.row] = source;
        if (by_expert() && weights() != nullptr) to.topk_weights[mine.row] = weight;  // hop k is entry k
      }
      const uint32_t rows = __ballot_sync(kAllLanes, mine.slot != nullptr);
      for (uint32_t round = 0; round < rounds || (round == 0 && puts_topk); ++round) {
        const uint32_t unit = round * kWarpLanes + lane;
        const bool has_unit = unit < units.count;
        const uint4 scale = has_unit ? load_unit(scales + units.from(unit), units.bytes) : uint4{};
        for (uint32_t rest = rows; rest != 0; rest &= rest - 1) {
          const int from = __ffs(static_cast<int>(rest)) - 1;
          const uint32_t rank = __shfl_sync(kAllLanes, mine.rank, from);
          const uint64_t row = __shfl_sync(kAllLanes, mine.row, from);
          const SlotView to = slot_view(p(), s.slots[rank]);
          if (has_unit) store_unit(to.scales + row * params.args.recv_scales_row_stride + units.to(unit), scale, units.bytes);
          if (round != 0 || !puts_topk || !has_entry) continue;
          const bool here = owner == rank;
          put_index(to.topk_idx, row * num_topk + lane, here ? expert - s.first_experts[rank] : -1);
          if (weights() != nullptr) to.topk_weights[row * num_topk + lane] = here ? weight : 0.0f;
        }
        __syncwarp();
      }
    }
  }

  template <bool kTma>
  __device__ void send(uint64_t* barriers) {
    if (threadIdx.x / kWarpLanes < params.plan.warps)
      push<kTma>(barriers);
    else
      fill_counts();
    clear_experts();  // Last: a warp that has few rows to push, or none, does it while others push theirs.
  }

  template <bool kTma>
  __device__ void push(uint64_t* barriers) {
    const PushRows rows = {.x = reinterpret_cast<const uint8_t*>(params.args.x),
                           .x_stride = params.args.x_stride,
                           .row_bytes = params.args.row_bytes,
                           .hops = params.routing.width,
                           .begin = 0,
                           .end = params.routing.num_tokens,
                           .plan = params.plan,
                           .claims = &p().state->claims[kClaimPush]};
    uint32_t looks = 0;
    bool stopped = false;
    const auto to = [&](uint32_t token, uint32_t hop) -> uint8_t* {
      if (++looks % kTokensBetweenLooks == 0) stopped = stopped || must_stop(p(), s.call, s.call.view);
      const Row row = row_of(token, hop);
      return stopped || row.slot == nullptr ? nullptr : row.slot + p().regions.recv_x + row.row * params.args.row_bytes;
    };
    const ScaleUnits units = scale_units(params.args);
    push_rows<kTma>(rows, shared, barriers, to, [&](uint32_t token) {
      if (!stopped) put_beside(token, units);
    });
    if (stopped && lane_id() == 0) atomicOr(&s.stopped, 1u);
  }
  static constexpr uint32_t kTokensBetweenLooks = 16;

  // What every block needs to know before it pushes.
  __device__ void find_slots() {
    const DeviceState& state = *p().state;
    if (threadIdx.x == 0) s.call.view = __ldcg(&state.view), s.stopped = 0;
    if (is_leader()) s.pushed.clear();
    for (uint32_t rank = threadIdx.x; rank < p().options.num_ranks; rank += blockDim.x) {
      s.slots[rank] = p().symmetric[rank] + slot_offset(p().regions, __ldcg(&state.peer_slots[rank]));
      if (!by_expert()) s.row_bases[rank] = __ldcg(row_bases(p()) + rank);
      s.first_experts[rank] = static_cast<int32_t>(p().partition.experts(rank).first);
    }
    // The counting has used the shared memory that bulk copies will write; rows were last touched by plain accesses.
    if constexpr (kHasTma) fence_proxy_async();
    __syncthreads();
  }

  // ---- ARRIVE: leader's block, when all blocks have pushed

  // A rank that died between its counts and its rows: the places of its rows become padding, the others stay where they are,
  // because every rank has computed with them.
  __device__ void forget_rows_of(uint32_t src) {
    const CountMatrix matrix = matrix_of(p(), params.routing, s.call.view);
    const SlotView here = slot_view(p(), s.slots[p().rank]);
    const uint32_t warp = threadIdx.x / kWarpLanes, warps = blockDim.x / kWarpLanes;
    if (by_expert()) {
      for (uint32_t e = 0; e < p().num_local_experts; ++e) {
        const uint32_t expert = p().first_expert + e;
        const uint64_t begin = __ldcg(group_begins(p()) + e);
        clear_rows(here, begin + entries_before(matrix, src, expert), begin + entries_before(matrix, src + 1, expert), warp,
                   warps, true);
      }
    } else {
      clear_rows(here, tokens_before(matrix, src, p().rank), tokens_before(matrix, src + 1, p().rank), warp, warps, true);
    }
    // The host may be reading the counts, which were handed out before.
    if (threadIdx.x == 0) store_count(2 + p().num_local_experts + src, 0);
  }

  // One warp: rows that this rank has sent.
  __device__ uint64_t rows_sent() const {
    const uint32_t lane = threadIdx.x % kWarpLanes;
    const uint32_t ranks = p().options.num_ranks, experts = p().options.num_experts;
    uint64_t sum = 0;
    if (!by_expert()) {
      for (uint32_t dst = lane; dst < ranks; dst += kWarpLanes) {
        if (in_view(s.call.view, dst)) sum += params.routing.tokens[p().rank * ranks + dst];
      }
    } else {
      for (uint32_t e = lane; e < experts; e += kWarpLanes) {
        if (in_view(s.call.view, p().partition.rank(e))) sum += params.routing.entries[p().rank * experts + e];
      }
    }
    for (uint32_t step = kWarpLanes / 2; step != 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    return sum;
  }

  // This block's rows are in place: the leader is told, and the peers, unless that is for the leader to say, or rows were left
  // out.
  __device__ void end_block(bool went) {
    __syncthreads();
    if (went && p().mask_on_timeout == 0 && threadIdx.x / kWarpLanes == 1 && s.stopped == 0) {
      announce_block(p(), s.call.view, s.call.epoch, is_leader() ? p().state->peer_slots : nullptr);
    }
    // Releases what the block has written; pairs with Leader::await_blocks().
    if (threadIdx.x == 0) reduce_add_release_gpu(&p().state->arrivals[kMeetEnd], 1);
  }

  __device__ void finish(bool went) {
    const uint32_t warp = threadIdx.x / kWarpLanes;
    const bool masks = p().mask_on_timeout != 0;
    uint64_t ended_ns = 0;
    if (warp == 0) {
      Leader leader(p(), s.call);
      leader.await_blocks(kMeetEnd, false);
      ended_ns = leader.begin_wait();
    } else if (went && !masks) {
      look_for_blocks(p(), s.call, s.pushed, s.call.view);
    }
    __syncthreads();
    if (warp == 0 && went) {
      Leader leader(p(), s.call);
      uint64_t left_out = 0;
      if (!masks) {
        const uint64_t late = late_blocks(leader, s.pushed, s.call.view, ended_ns);
        const bool entered = leader.enter(DEEPEP_PHASE_ARRIVE);
        if (p().inject[DEEPEP_PHASE_ARRIVE].wanted != 0) ended_ns = leader.begin_wait();
        if (entered && late != 0) wait_for_blocks_of(leader, late, ended_ns);
        if (!leader.failed()) check_views(leader, s.call.view, s.call.view & ~rank_bit(p().rank));
        // Whoever has left this rank out has failed in this call.
        if (must_stop(p(), s.call, s.call.view)) leader.is_left_out();
      } else if (!leader.is_left_out()) {
        // Whoever has left this rank out may have given its slot to others.
        announce_pushed(leader, s.call.view, p().state->peer_slots);
        left_out = wait_pushed(leader, s.call.view);
      }
      if (leader.lane == 0) s.left_out = left_out;
    }
    __syncthreads();
    if (!went) {
      clear_counts();
    } else {
      for (uint64_t rest = s.call.code == 0 ? s.left_out : 0; rest != 0; rest &= rest - 1) {
        forget_rows_of(static_cast<uint32_t>(__ffsll(static_cast<long long>(rest)) - 1));
      }
    }
    __syncthreads();
    if (threadIdx.x >= kWarpLanes) return;
    if (threadIdx.x == 0 && s.call.code == 0 && !s.call.skipped) params.routing.header->valid = params.routing.name;
    call_end(p(), s.call, {true, true, true});
  }
};

// Dispatch of one rank. Collective; graph-safe. Block 0 leads.
template <bool kTma>
__global__ void __launch_bounds__(kMaxBlockThreads + kClerks * kWarpLanes, 1)
    dispatch_kernel(const __grid_constant__ DispatchParams params) {
  extern __shared__ __align__(128) uint8_t dynamic_shared[];
  __shared__ DispatchShared s;
  __shared__ uint64_t barriers[kMaxBarriers];
  kernel_begin(params);
  Dispatch dispatch{params, s, dynamic_shared};
  if (threadIdx.x == kWarpLanes) dispatch.read_known();
  call_begin(params.call, s.call, true, true);
  const bool goes = dispatch.notify();
  if (goes) {
    dispatch.find_slots();
    if (dispatch.by_expert()) dispatch.clear_padding();
    dispatch.template send<kTma>(barriers);
  }
  dispatch.end_block(goes);
  if (is_leader()) dispatch.finish(goes);
}

}  // namespace deepep
