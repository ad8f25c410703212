// From the count matrix to row numbers: the leader's block works out where this rank's rows begin on every rank.
//
// In: the matrix that a routing keeps, and who takes part. Out: row_bases() in scratch, state->num_rows, and in shared memory
// how many rows each rank receives. The same arithmetic as the CPU's (common/routing.hpp), a thread a rank or expert. Callers:
// dispatch, combine.
#pragma once

#include "count.cuh"

namespace deepep {

__device__ inline CountMatrix matrix_of(const CallParams& p, const RoutingParams& routing, uint64_t view) {
  return {routing.tokens, routing.entries, p.options.num_ranks, p.options.num_experts, view};
}

// Shared memory of find_row_bases().
struct RowTables {
  uint64_t* rows;     // [num_ranks]: rows that each rank receives
  uint32_t* entries;  // [num_experts]: entries of each expert over all ranks (expert layout)
};

__device__ inline RowTables row_tables(const CallParams& p, uint8_t* shared) {
  return {reinterpret_cast<uint64_t*>(shared), reinterpret_cast<uint32_t*>(shared + 8 * p.options.num_ranks)};
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

// By all threads of the leader's block.
__device__ inline void find_row_bases(const CallParams& p, const RoutingParams& routing, uint64_t view,
                                      const RowTables& tables) {
  const CountMatrix matrix = matrix_of(p, routing, view);
  const uint32_t ranks = p.options.num_ranks;
  if (routing.layout == DEEPEP_LAYOUT_RANK) {
    for (uint32_t dst = threadIdx.x; dst < ranks; dst += blockDim.x) {
      row_bases(p)[dst] = tokens_before(matrix, p.rank, dst);
      tables.rows[dst] = tokens_before(matrix, ranks, dst);
    }
  } else {
    for (uint32_t expert = threadIdx.x; expert < p.options.num_experts; expert += blockDim.x) {
      row_bases(p)[expert] = entries_before(matrix, p.rank, expert);
      tables.entries[expert] = entries_before(matrix, ranks, expert);
    }
    __syncthreads();
    for (uint32_t dst = threadIdx.x / kWarpLanes; dst < ranks; dst += blockDim.x / kWarpLanes) {
      const uint64_t rows = place_groups(p, dst, routing.expert_alignment, tables.entries);
      if (threadIdx.x % kWarpLanes == 0) tables.rows[dst] = rows;
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) p.state->num_rows = tables.rows[p.rank];
}

}  // namespace deepep
