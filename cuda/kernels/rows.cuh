// From the count matrix to row numbers: the leader's block works out where this rank's rows begin on every rank.
//
// In: the matrix that a routing keeps, or the messages that it is taken from, and who takes part. Out: that matrix,
// row_bases() in scratch, state->num_rows, and in shared memory how many rows each rank receives, in the rank layout the bases
// too. The same arithmetic as the CPU's (common/routing.hpp), a thread a rank or expert. Callers: dispatch, combine.
#pragma once

#include "count.cuh"

namespace deepep {

__device__ inline CountMatrix matrix_of(const CallParams& p, const RoutingParams& routing, uint64_t view) {
  return {routing.tokens, routing.entries, p.options.num_ranks, p.options.num_experts, view};
}

// Shared memory of find_row_bases().
struct RowTables {
  uint64_t* rows;     // [num_ranks]: rows that each rank receives
  uint32_t* bases;    // [num_ranks]: row_bases() (rank layout)
  uint32_t* entries;  // [num_experts]: entries of each expert over all ranks (expert layout)
};

__device__ inline RowTables row_tables(const CallParams& p, uint8_t* shared) {
  auto* words = reinterpret_cast<uint32_t*>(shared + 8 * p.options.num_ranks);
  return {reinterpret_cast<uint64_t*>(shared), words, words};
}

// One warp: the expert groups of rank `dst`, one after another; `entries` are the experts' totals. In row_bases() each of its
// experts has how many entries lower ranks have, and gets this rank's first row. Returns the rows of all groups.
__device__ inline uint64_t place_groups(const CallParams& p, uint32_t dst, uint32_t alignment, const uint32_t* entries) {
  const uint32_t lane = threadIdx.x % kWarpLanes;
  const ExpertRange experts = p.partition.experts(dst);
  uint64_t group = 0;
  for (uint32_t first = 0; first < experts.count; first += kWarpLanes) {
    const bool is_mine = first + lane < experts.count;
    const uint32_t expert = experts.first + first + lane;
    const uint64_t rows = is_mine ? aligned(entries[expert], alignment) : 0;
    uint64_t before = rows;  // inclusive sum over the lanes
    for (uint32_t step = 1; step < kWarpLanes; step *= 2) {
      const uint64_t other = __shfl_up_sync(kAllLanes, before, step);
      if (lane >= step) before += other;
    }
    const auto begin = static_cast<uint32_t>(group + before - rows);
    if (is_mine) row_bases(p)[expert] += begin;
    if (is_mine && dst == p.rank) {
      group_begins(p)[first + lane] = begin;
      group_entries(p)[first + lane] = entries[expert];
    }
    group += __shfl_sync(kAllLanes, before, kWarpLanes - 1);
  }
  return group;
}

// What the rows of a rank, or of an expert, are by a column of the matrix.
__device__ inline void put_rank_rows(const CallParams& p, const RowTables& tables, uint32_t dst, const ColumnSums& tokens) {
  row_bases(p)[dst] = tables.bases[dst] = tokens.before;
  tables.rows[dst] = tokens.all;
  if (dst == p.rank) p.state->num_rows = tokens.all;
}
__device__ inline void put_expert_rows(const CallParams& p, const RowTables& tables, uint32_t expert,
                                       const ColumnSums& entries) {
  row_bases(p)[expert] = entries.before;
  tables.entries[expert] = entries.all;
}

// Threads `first`, `first + step`, … of the leader's block: adds the columns up that the layout wants.
__device__ inline void add_columns_up(const CallParams& p, const RoutingParams& routing, uint64_t view, const RowTables& tables,
                                      uint32_t first, uint32_t step) {
  const uint32_t ranks = p.options.num_ranks, experts = p.options.num_experts;
  if (routing.layout == DEEPEP_LAYOUT_RANK) {
    for (uint32_t dst = first; dst < ranks; dst += step) {
      put_rank_rows(p, tables, dst, add_up(routing.tokens + dst, ranks, ranks, p.rank, view));
    }
  } else {
    for (uint32_t expert = first; expert < experts; expert += step) {
      put_expert_rows(p, tables, expert, add_up(routing.entries + expert, experts, ranks, p.rank, view));
    }
  }
}

// The same with the counts of a call's messages: takes the matrix out of them, which the ring will reuse. False for a thread of
// whose counts some do not come soon.
__device__ inline bool take_columns(const CallParams& p, const RoutingParams& routing, uint64_t epoch, uint64_t view,
                                    const RowTables& tables, uint32_t first_column, uint32_t step) {
  const uint32_t ranks = p.options.num_ranks, experts = p.options.num_experts;
  const bool by_rank = routing.layout == DEEPEP_LAYOUT_RANK;
  const uint64_t* const first_words = message_counts(message_at(own_memory(p), p.regions, 0, epoch));
  const uint64_t stride = uint64_t{p.regions.message_ring} * p.regions.message_bytes / sizeof(uint64_t);
  for (uint32_t i = first_column; i < ranks + experts; i += step) {
    uint32_t* to = i < ranks ? routing.tokens + i : routing.entries + (i - ranks);
    const uint32_t width = i < ranks ? ranks : experts;
    const uint64_t* words = first_words + i;
    ColumnSums sums;
    for (uint32_t first = 0; first < ranks; first += kCountsAtOnce, words += kCountsAtOnce * stride) {
      uint32_t counts[kCountsAtOnce];
      const auto looks_again = [](uint32_t looks) { return looks < Waits::kSoonLooks; };
      if (!take_counts(words, stride, static_cast<uint32_t>(view >> first), epoch, counts, looks_again)) return false;
#pragma unroll
      for (uint32_t nth = 0; nth < kCountsAtOnce; ++nth) {
        const uint32_t src = first + nth;
        if (src < ranks) *to = counts[nth], to += width;
        sums.before += src < p.rank ? counts[nth] : 0;
        sums.all += counts[nth];
      }
    }
    if (by_rank && i < ranks) put_rank_rows(p, tables, i, sums);
    if (!by_rank && i >= ranks) put_expert_rows(p, tables, i - ranks, sums);
  }
  return true;
}

// Leader's warp: waits for the counts of all ranks in the view.
DEEPEP_COLD __device__ inline void wait_for_counts(Leader leader, uint64_t view) {
  const CallParams& p = leader.p;
  const uint64_t epoch = leader.s.epoch, begin_ns = leader.begin_wait();
  const uint32_t columns = p.options.num_ranks + p.options.num_experts;
  const auto is_there = [&](uint32_t src, uint32_t i) {
    return is_count_of(load_relaxed_sys(message_counts(leader.message_of(src)) + i), epoch);
  };
  const auto come = [&](uint64_t pending) {
    uint64_t came = 0;
    for (uint64_t rest = pending; rest != 0; rest &= rest - 1) {
      const auto src = static_cast<uint32_t>(__ffsll(static_cast<long long>(rest)) - 1);
      bool all = true;
      for (uint32_t i = leader.lane; i < columns; i += kWarpLanes) all = is_there(src, i) && all;
      if (__all_sync(kAllLanes, all)) came |= rank_bit(src);
    }
    return came;
  };
  // One lane, for a finding: how many words are there, in order.
  const auto seen = [&](uint32_t src) {
    uint64_t came = 0;
    while (came < columns && is_there(src, static_cast<uint32_t>(came))) ++came;
    return came;
  };
  leader.begin_waits(begin_ns);
  leader.wait_until(view, {Reason::late_message, columns, -1, false}, come, seen, begin_ns);
}

// Warps `first`, `first + step`, … of it, when all columns have been added up: places the groups of the expert layout.
__device__ inline void place_all_groups(const CallParams& p, const RoutingParams& routing, const RowTables& tables,
                                        uint32_t first, uint32_t step) {
  if (routing.layout == DEEPEP_LAYOUT_RANK) return;
  for (uint32_t dst = first; dst < p.options.num_ranks; dst += step) {
    const uint64_t rows = place_groups(p, dst, routing.expert_alignment, tables.entries);
    if (lane_id() != 0) continue;
    tables.rows[dst] = rows;
    if (dst == p.rank) p.state->num_rows = rows;
  }
}

// Both, by the warps of it that neither lead nor publish, while messages come. The block must meet before others look.
__device__ inline void find_row_bases_beside(const CallParams& p, const RoutingParams& routing, uint64_t view,
                                             const RowTables& tables) {
  constexpr uint32_t first = 2;  // a plan has more warps
  const uint32_t warp = threadIdx.x / kWarpLanes, warps = blockDim.x / kWarpLanes;
  if (warp < first) return;
  const uint32_t threads = blockDim.x - first * kWarpLanes;
  add_columns_up(p, routing, view, tables, threadIdx.x - first * kWarpLanes, threads);
  if (routing.layout == DEEPEP_LAYOUT_RANK) return;
  named_barrier(1, threads);
  place_all_groups(p, routing, tables, warp - first, warps - first);
}

// Both, by all threads of the leader's block, which must meet before anyone looks.
__device__ inline void find_row_bases(const CallParams& p, const RoutingParams& routing, uint64_t view,
                                      const RowTables& tables) {
  add_columns_up(p, routing, view, tables, threadIdx.x, blockDim.x);
  __syncthreads();
  place_all_groups(p, routing, tables, threadIdx.x / kWarpLanes, blockDim.x / kWarpLanes);
}

}  // namespace deepep
