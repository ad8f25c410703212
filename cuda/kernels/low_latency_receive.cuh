// The receive half of a low-latency dispatch: waits until everyone's rows are there.
//
// In: the flags that the peers' blocks raise. Out: rows that may be read; of a rank that died between its counts and its rows,
// zeros without a source. Phase ARRIVE, in the kernel of both halves or in one of its own. Workers look for the flags; the last
// warp leads, watches over them, and sees to what does not come soon. Graph-safe. Callers: low_latency_dispatch.cuh,
// launch_low_latency_receive().
#pragma once

#include "low_latency_count.cuh"
#include "pushed.cuh"

namespace deepep {

constexpr uint32_t kReceiveWarps = 9;  // of a receive half, the leader's included

// Where a low-latency slot keeps what it received.
struct ExpertRegions {
  const LowLatencyScales& scales;
  uint32_t row_bytes;
  uint32_t max_rows;  // of an expert

  struct Row {
    uint8_t* x;
    uint8_t* scales;
    int32_t* src_idx;
  };
  // Where the scales of a row come first, one after another, when they are to be turned into columns.
  __device__ uint8_t* scale_row(const Regions& regions, uint8_t* slot, uint32_t local_expert, uint32_t row) const {
    return slot + regions.scale_rows + (uint64_t{local_expert} * max_rows + row) * scales.num * scales.elem_bytes;
  }
  __device__ Row row(const Regions& regions, uint8_t* slot, uint32_t local_expert, uint32_t row) const {
    const uint64_t at = uint64_t{local_expert} * max_rows + row;
    return {slot + regions.recv_x + at * row_bytes,
            slot + regions.recv_scales + local_expert * scales.expert_stride + row * scales.to_row_stride,
            reinterpret_cast<int32_t*>(slot + regions.recv_src_idx) + at};
  }
};

// What the workers of the leader's block have found of the peers' rows.
struct Arrivals {
  uint32_t came[DEEPEP_MAX_RANKS];  // 1 = a rank's rows are there
  uint32_t num_came;                // how many ranks' are

  // By a warp, before a meeting.
  __device__ void clear() {
    for (uint32_t rank = lane_id(); rank < DEEPEP_MAX_RANKS; rank += kWarpLanes) came[rank] = 0;
    if (lane_id() == 0) num_came = 0;
  }
};

// Workers of the leader's block: look for the rows of all ranks, more than one warp for each where there are as many: one asks
// while the other's answer is on its way. They give up when the leader does. All have passed a meeting since the call began.
__device__ inline void look_for_rows(const CallParams& p, const CallShared& s, Arrivals& arrivals, uint64_t view,
                                     int64_t* wait_stats) {
  const uint64_t begin_ns = global_time_ns();
  const uint32_t warps = min(num_workers() / kWarpLanes, p.options.num_ranks);
  look_in_turn(
      p, s.epoch, view, threadIdx.x / kWarpLanes % warps, warps,
      [&](uint32_t src, bool at_once) {
        if (exchange_acq_rel_block(&arrivals.came[src], 1) != 0) return;  // Pairs with wait_for_rows() of the leader.
        if (!at_once) keep_wait(p, 0, src, global_time_ns() - begin_ns, wait_stats);
        reduce_add_release_block(&arrivals.num_came, 1);  // Pairs with comes_soon().
      },
      [&](uint32_t looks) { return looks % kLooksBetween != 0 || !__any_sync(kAllLanes, is_stopped(p, s)); });
}

// ---- the leader's warp

// A rank that died between its counts and its rows: the places of its rows become zeros without a source, the others stay where
// they are, because every rank has computed with them.
DEEPEP_COLD __device__ inline void forget_expert_rows_of(const CallParams& p, const ExpertRegions& regions, uint32_t src) {
  const uint32_t lane = threadIdx.x % kWarpLanes;
  uint8_t* slot = own_memory(p) + slot_offset(p.regions, p.slot);
  auto* ranges = reinterpret_cast<int64_t*>(slot + p.regions.layout_range);
  for (uint32_t local = 0; local < p.num_local_experts; ++local) {
    int64_t& range = ranges[local * p.options.num_ranks + src];
    const auto begin = static_cast<uint32_t>(range >> 32), count = static_cast<uint32_t>(range);
    for (uint32_t i = begin; i < begin + count; ++i) {
      const ExpertRegions::Row row = regions.row(p.regions, slot, local, i);
      for (uint32_t at = lane * 16; at < regions.row_bytes; at += kWarpLanes * 16) store_stream(row.x + at, {0, 0, 0, 0});
      for (uint32_t scale = lane; scale < regions.scales.num; scale += kWarpLanes) {
        for (uint32_t byte = 0; byte < regions.scales.elem_bytes; ++byte) {
          row.scales[scale * regions.scales.to_elem_stride + byte] = 0;
        }
      }
      if (lane == 0) *row.src_idx = -1;
    }
    __syncwarp();
    if (lane == 0) range = static_cast<int64_t>(begin) << 32;
  }
}
// Of all ranks of a set.
DEEPEP_COLD __device__ inline void forget_expert_rows(const CallParams& p, const ExpertRegions& regions, uint64_t ranks) {
  for (; ranks != 0; ranks &= ranks - 1) {
    forget_expert_rows_of(p, regions, static_cast<uint32_t>(__ffsll(static_cast<long long>(ranks)) - 1));
  }
}

// The dispatch has failed: whoever works by the device's counts, without asking how it ended, finds no rows of an earlier one.
DEEPEP_COLD __device__ inline void clear_counts(const CallParams& p) {
  uint8_t* slot = own_memory(p) + slot_offset(p.regions, p.slot);
  auto* counts = reinterpret_cast<int32_t*>(slot + p.regions.counts);
  auto* ranges = reinterpret_cast<int64_t*>(slot + p.regions.layout_range);
  for (uint32_t local = lane_id(); local < p.num_local_experts; local += kWarpLanes) counts[local] = 0;
  for (uint32_t i = lane_id(); i < p.num_local_experts * p.options.num_ranks; i += kWarpLanes) ranges[i] = 0;
  __syncwarp();
}

// Waits for everyone's rows, as long as it takes. False when the call has failed.
DEEPEP_COLD __device__ inline bool wait_for_rows(const CallParams& p, CallShared& s, const LowLatencyRouting& routing,
                                                 const ExpertRegions& regions, const Arrivals& arrivals, uint64_t view,
                                                 int64_t* wait_stats) {
  Leader leader(p, s);
  if (p.mask_on_timeout != 0) {
    leader.wait_stats = wait_stats;
    forget_expert_rows(p, regions, wait_pushed(leader, routing.header->view));
    return !leader.failed();
  }
  if (!leader.enter(DEEPEP_PHASE_ARRIVE)) return false;
  leader.begin_waits();
  const uint64_t epoch = s.epoch;
  // For the finding.
  const auto seen = [&](uint32_t src) { return least_pushed(p, src); };
  const auto come = [&](uint64_t pending) {
    // The workers look at the flags, which are many. Pairs with look_for_rows(). Of ranks that are gone this warp wants to know
    // for certain, at once.
    uint64_t came = leader.ranks_where(
        [&](uint32_t src) { return in_view(pending, src) && load_acquire_block(&arrivals.came[src]) != 0; });
    for (uint64_t rest = pending & s.lost & ~came; rest != 0; rest &= rest - 1) {
      const auto src = static_cast<uint32_t>(__ffsll(static_cast<long long>(rest)) - 1);
      if (have_pushed(p, epoch, src)) came |= rank_bit(src);
    }
    return came;
  };
  leader.wait_until(view, {Reason::late_rows, epoch, -1, false}, come, seen, leader.begin_wait());
  return !leader.failed();
}

// Waits for the rows that look_for_rows() looks for, of the ranks in the view. False when the call has failed.
__device__ inline bool receive_rows(const CallParams& p, CallShared& s, const LowLatencyRouting& routing,
                                    const ExpertRegions& regions, const Arrivals& arrivals, uint64_t view,
                                    int64_t* wait_stats) {
  const bool plain = p.mask_on_timeout == 0 && p.inject[DEEPEP_PHASE_ARRIVE].wanted == 0;
  const auto others = static_cast<uint32_t>(__popcll(view & ~rank_bit(p.rank)));
  if (plain && comes_soon(&arrivals.num_came, others)) return true;
  const bool came = wait_for_rows(p, s, routing, regions, arrivals, view, wait_stats);
  if (!came && lane_id() == 0) release_blocks(p, s, kStepGo, false);  // The workers may still look.
  __syncwarp();
  while (came && p.mask_on_timeout == 0 && !comes_soon(&arrivals.num_came, others)) {
  }
  return came;
}

// ---- the kernel of the half alone

// Fails a receive half whose send half did not come to its end, or repeats what that has found.
DEEPEP_COLD __device__ inline bool check_send_half(const CallParams& p, CallShared& s, const LowLatencyHeader& header) {
  Leader leader(p, s);
  if (header.failure.code == 0) {
    Finding finding;
    finding.expected = static_cast<int64_t>(header.epoch);
    leader.refuse(DEEPEP_ERROR_ABORTED, Reason::no_send, finding);
    return false;
  }
  leader.refuse(header.failure.code, header.failure.reason, header.failure);
  return false;
}

// The receive half of a low-latency dispatch. Not collective; graph-safe. One block, whose last warp leads.
__global__ void __launch_bounds__(kReceiveWarps* kWarpLanes, 1)
    low_latency_receive_kernel(const __grid_constant__ LowLatencyReceiveParams params) {
  __shared__ CallShared s;
  __shared__ Arrivals arrivals;
  await_kernel_before();
  const CallParams& p = params.call;
  const LowLatencyHeader& header = *params.routing.header;
  if (threadIdx.x == num_workers()) {
    read_call(p, s, false, true);
    s.epoch = header.epoch;
  }
  if (!is_worker()) arrivals.clear();
  const bool is_valid = header.valid != 0;
  __syncthreads();
  // Of a rank that was masked after the send half nothing is awaited, nor kept: the same whether its rows have come or not.
  auto* wait_stats = reinterpret_cast<int64_t*>(params.wait_stats);
  if (is_worker()) {
    if (!s.skipped && is_valid && p.mask_on_timeout == 0) {
      look_for_rows(p, s, arrivals, header.view & ~s.masked, wait_stats);
    }
    return;
  }
  const uint64_t view = header.view & ~s.masked;
  const ExpertRegions regions = {params.scales, params.row_bytes, p.regions.low_latency_rows};
  if (!s.skipped && (is_valid || check_send_half(p, s, header))) {
    const bool came = receive_rows(p, s, params.routing, regions, arrivals, view, wait_stats);
    if (came && p.mask_on_timeout == 0) forget_expert_rows(p, regions, header.view & ~view);
  }
  if (s.code != 0 || s.skipped) clear_counts(p);
  call_end(p, s, {false, true, true});
}

}  // namespace deepep
