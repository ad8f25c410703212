// The rows of a dispatch: where they go on every rank, and all that travels with them.
//
// In: a routing with its hops, the slots of all ranks and where this rank's rows begin in each. Out: rows in those slots; in
// this rank's own, what nobody sends: padding, and the end of shapes that are those of the capacity. Caller: dispatch.cuh,
// between its two synchronisations.
#pragma once

#include "pushed.cuh"
#include "rows.cuh"
#include "rows_push.cuh"
#include "scales.cuh"

namespace deepep {

// The slots of all ranks, as a block pushes to them.
struct DispatchShared {
  CallShared call;
  RoutingHeader known;  // leader, of a cached dispatch: the handle's, as the call began
  uint64_t expected;    // leader, as the call began: the ranks that are not left out
  int32_t said_code;    // leader: what its message says
  uint64_t ended_ns;    // leader: when this rank's blocks had ended
  uint64_t left_out;    // leader: ranks whose rows will not come
  PushedShared pushed;  // leader
  uint64_t num_rows;    // this rank's, when it goes
  uint32_t stopped;     // 1 = a warp of this block has left rows out
  uint8_t* slots[DEEPEP_MAX_RANKS];         // the ranks' memory, until find_slots()
  int32_t first_experts[DEEPEP_MAX_RANKS];  // of the ranks
  uint32_t row_bases[DEEPEP_MAX_RANKS];     // rank layout
};

__device__ inline ScaleUnits scale_units(const deepep_dispatch_args& args) {
  return scale_units(ScaleRows{args.num_scales, args.scale_elem_bytes, args.scales_elem_stride, args.recv_scales_elem_stride,
                               args.scales | args.scales_row_stride | args.recv_scales_row_stride});
}

// What a warp does of a dispatch of few tokens.
struct FewPart {
  bool has = false;
  uint32_t token = 0;
  uint32_t nth = 0;         // the row's pieces come first, then its hops
  DeviceHop hop = {-1, 0};  // of a piece this lane's, else the one
  int32_t expert = -1;      // of entry `lane` of the token; in the expert layout of the hop's
  float weight = 0.0f;
  PieceValues values;       // of the piece; else the first is this lane's first unit of scales
};

struct DispatchRows {
  const DispatchParams& params;
  DispatchShared& s;

  __device__ const CallParams& p() const { return params.call; }
  __device__ bool cached() const { return (params.args.flags & DEEPEP_FLAG_CACHED) != 0; }
  __device__ bool by_expert() const { return params.routing.layout == DEEPEP_LAYOUT_EXPERT; }
  __device__ const float* weights() const { return reinterpret_cast<const float*>(params.args.topk_weights); }
  __device__ const uint8_t* scales(uint32_t token) const {
    return reinterpret_cast<const uint8_t*>(params.args.scales) + token * params.args.scales_row_stride;
  }
  __device__ int32_t source_index(uint32_t token) const {
    return static_cast<int32_t>(p().rank * p().options.max_tokens_per_rank + token);
  }
  __device__ uint8_t* payload(uint8_t* slot, uint64_t row) const {
    return slot + p().regions.recv_x + row * params.args.row_bytes;
  }

  __device__ uint64_t scales_offset(uint64_t row) const { return row * params.args.recv_scales_row_stride; }

  // ---- rows that nobody sends

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
      store_unit(here.scales + scales_offset(row) + units.to(unit), {0, 0, 0, 0}, units.bytes);
    }
  }

  // Warps `first`, `first` + `step`, …: clears rows begin … end - 1.
  __device__ void clear_rows(const SlotView& here, uint64_t begin, uint64_t end, uint32_t first, uint32_t step,
                             bool payload_too) const {
    for (uint64_t row = begin + first; row < end; row += step) clear_row(here, row, payload_too);
  }

  // Expert layout: the rows of this rank's slot that no rank pushes to. All blocks share them.
  __device__ void clear_padding() const {
    const SlotView here = slot_view(p().regions, s.slots[p().rank]);
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
  // All threads of the blocks from `first_block` on share them.
  __device__ void clear_experts(uint32_t first_block) const {
    if (by_expert() || (params.args.flags & DEEPEP_FLAG_NO_CPU_SYNC) == 0 || params.routing.num_topk == 0) return;
    constexpr uint32_t kWords = 4;  // at once
    const uint64_t row_words = uint64_t{params.routing.num_topk} * params.routing.topk_idx_bytes / 4;
    auto* words = reinterpret_cast<uint32_t*>(slot_view(p().regions, s.slots[p().rank]).topk_idx);
    const uint64_t begin = s.num_rows * row_words, end = p().options.max_recv_tokens * row_words;
    const uint64_t first = align_up(begin, kWords) < end ? align_up(begin, kWords) : end, last = end / kWords * kWords;
    const uint32_t mine = (blockIdx.x - first_block) * blockDim.x + threadIdx.x, all = (gridDim.x - first_block) * blockDim.x;
    for (uint64_t i = first + kWords * mine; i < last; i += kWords * all) {
      *reinterpret_cast<uint4*>(words + i) = {0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff};
    }
    if (begin + mine < first) words[begin + mine] = 0xffffffff;
    if (last + mine < end && last + mine >= first) words[last + mine] = 0xffffffff;
  }

  // ---- where rows go

  // A row that a token becomes.
  struct Row {
    uint8_t* slot;  // nullptr = none
    uint32_t rank;
    uint64_t row;
  };
  __device__ DeviceHop hop_of(uint32_t token, uint32_t hop) const {
    if (hop >= params.routing.width) return {-1, 0};
    return params.routing.hops[uint64_t{token} * params.routing.width + hop];
  }
  __device__ Row row_of(const DeviceHop& to) const {
    if (to.key < 0) return {};
    const auto key = static_cast<uint32_t>(to.key);
    const uint32_t rank = by_expert() ? p().partition.rank(key) : key;
    if (!in_view(s.call.view, rank)) return {};
    return {s.slots[rank], rank, uint64_t{by_expert() ? row_bases(p())[key] : s.row_bases[rank]} + to.index};
  }

  // ---- what travels beside the rows

  // Entry `lane` of a row's token (rank layout): its expert and its weight, or none, when another rank owns it.
  __device__ void put_entry(const SlotView& to, const Row& row, int32_t expert, float weight) const {
    const uint32_t lane = lane_id(), num_topk = params.routing.num_topk;
    if (lane >= num_topk) return;
    const bool here = expert >= 0 && p().partition.rank(static_cast<uint32_t>(expert)) == row.rank;
    put_index(to.topk_idx, row.row * num_topk + lane, here ? expert - s.first_experts[row.rank] : -1);
    if (weights() != nullptr) to.topk_weights[row.row * num_topk + lane] = here ? weight : 0.0f;
  }

  // One warp: all of it for the rows of a token.
  __device__ void put_beside(uint32_t token, const ScaleUnits& units) const {
    const uint32_t lane = lane_id();
    const uint32_t num_topk = params.routing.num_topk;
    const bool has_entry = lane < num_topk;
    const uint64_t entry = uint64_t{token} * num_topk + lane;
    const float weight = has_entry && weights() != nullptr ? weights()[entry] : 0.0f;
    const int32_t expert = has_entry ? params.routing.experts[entry] : -1;
    const bool puts_topk = !by_expert() && num_topk > 0;
    const uint32_t rounds = (units.count + kWarpLanes - 1) / kWarpLanes;
    for (uint32_t first = 0; first < params.routing.width; first += kWarpLanes) {
      const Row mine = row_of(hop_of(token, first + lane));
      if (mine.slot != nullptr) {
        const SlotView to = slot_view(p().regions, mine.slot);
        to.src_idx[mine.row] = source_index(token);
        if (by_expert() && weights() != nullptr) to.topk_weights[mine.row] = weight;  // hop k is entry k
      }
      const uint32_t rows = __ballot_sync(kAllLanes, mine.slot != nullptr);
      for (uint32_t round = 0; round < rounds || (round == 0 && puts_topk); ++round) {
        const uint32_t unit = round * kWarpLanes + lane;
        const bool has_unit = unit < units.count;
        const uint4 scale = has_unit ? load_unit(scales(token) + units.from(unit), units.bytes) : uint4{};
        for (uint32_t rest = rows; rest != 0; rest &= rest - 1) {
          const int from = __ffs(static_cast<int>(rest)) - 1;
          const uint32_t rank = __shfl_sync(kAllLanes, mine.rank, from);
          const Row row = {s.slots[rank], rank, __shfl_sync(kAllLanes, mine.row, from)};
          const SlotView to = slot_view(p().regions, row.slot);
          if (has_unit) store_unit(to.scales + scales_offset(row.row) + units.to(unit), scale, units.bytes);
          if (round == 0 && puts_topk) put_entry(to, row, expert, weight);
        }
        __syncwarp();
      }
    }
  }

  // ---- many tokens: warps claim them

  template <bool kTma>
  __device__ void push(uint8_t* shared, uint64_t* barriers) {
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
      const Row row = row_of(hop_of(token, hop));
      return stopped || row.slot == nullptr ? nullptr : payload(row.slot, row.row);
    };
    const ScaleUnits units = scale_units(params.args);
    push_rows<kTma>(rows, shared, barriers, to, [&](uint32_t token) {
      if (!stopped) put_beside(token, units);
    });
    if (stopped && lane_id() == 0) atomicOr(&s.stopped, 1u);
  }
  static constexpr uint32_t kTokensBetweenLooks = 16;

  // ---- few tokens: a warp for every piece, and for what travels beside every row
  //
  // What such a call takes are not bytes but steps. So nothing is claimed, what does not wait for the other ranks is there
  // before they are, and the leader's block does alone what it can: it counts all tokens, and sends them if it has the warps.

  __device__ bool is_few() const { return params.few_parts != 0; }

  // Whatever of a warp's part is known before the ranks have agreed. By whole warps; none for the leader's first.
  __device__ FewPart take_part() const {
    FewPart part;
    const uint32_t warp = threadIdx.x / kWarpLanes, warps = params.plan.warps, lane = lane_id();
    if (warp >= warps) return part;
    const uint32_t parts = params.few_parts, all = params.routing.num_tokens * parts;
    // One more than there are, which nobody takes: the first warp comes last, and the leader's last of all.
    const uint32_t mine = first_claim(all + 1, (warp != 0 ? warp : warps) - 1, warps);
    if (mine >= all) return part;
    part.has = true;
    part.token = mine / parts;
    part.nth = mine % parts;
    if (part.nth < params.few_pieces) {
      const auto* x = reinterpret_cast<const uint8_t*>(params.args.x) + part.token * params.args.x_stride;
      part.values.load(x + part.nth * kPushStep, piece_bytes_of(part));
    } else if (params.args.num_scales != 0) {
      const ScaleUnits units = scale_units(params.args);
      if (lane < units.count) part.values.v[0] = load_unit(scales(part.token) + units.from(lane), units.bytes);
    }
    if (cached()) find_hop(part);
    return part;
  }
  __device__ uint32_t piece_bytes_of(const FewPart& part) const {
    return min(kPushStep, params.args.row_bytes - part.nth * kPushStep);
  }

  // When this rank's hops are there.
  __device__ void find_hop(FewPart& part) const {
    const uint32_t pieces = params.few_pieces, num_topk = params.routing.num_topk;
    const bool is_piece = part.nth < pieces;
    part.hop = hop_of(part.token, is_piece ? lane_id() : part.nth - pieces);
    const uint32_t nth = by_expert() ? part.nth - pieces : lane_id();  // hop k is entry k
    if (is_piece || nth >= num_topk) return;
    const uint64_t entry = uint64_t{part.token} * num_topk + nth;
    if (!by_expert()) part.expert = params.routing.experts[entry];
    if (weights() != nullptr) part.weight = weights()[entry];
  }

  // When the ranks have agreed.
  __device__ void put_part(FewPart& part) const {
    if (!part.has) return;
    if (!cached()) find_hop(part);
    const Row row = row_of(part.hop);
    if (part.nth < params.few_pieces) {
      const uint64_t mine = row.slot != nullptr ? reinterpret_cast<uint64_t>(payload(row.slot, row.row)) : 0;
      for (uint32_t rest = __ballot_sync(kAllLanes, row.slot != nullptr); rest != 0; rest &= rest - 1) {
        auto* to = reinterpret_cast<uint8_t*>(__shfl_sync(kAllLanes, mine, __ffs(static_cast<int>(rest)) - 1));
        part.values.store(to + part.nth * kPushStep, piece_bytes_of(part));
      }
    } else if (row.slot != nullptr) {
      put_row_beside(part, row);
    }
  }
  __device__ void put_row_beside(const FewPart& part, const Row& row) const {
    const uint32_t lane = lane_id();
    const SlotView to = slot_view(p().regions, row.slot);
    if (lane == 0) {
      to.src_idx[row.row] = source_index(part.token);
      if (by_expert() && weights() != nullptr) to.topk_weights[row.row] = part.weight;
    }
    if (!by_expert()) put_entry(to, row, part.expert, part.weight);
    if (params.args.num_scales == 0) return;
    const ScaleUnits units = scale_units(params.args);
    for (uint32_t unit = lane; unit < units.count; unit += kWarpLanes) {
      const uint4 scale = unit == lane ? part.values.v[0] : load_unit(scales(part.token) + units.from(unit), units.bytes);
      store_unit(to.scales + scales_offset(row.row) + units.to(unit), scale, units.bytes);
    }
  }
};

}  // namespace deepep
