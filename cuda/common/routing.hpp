// From counts to positions: where the rows of each source rank lie on each destination rank.
//
// In: the count matrix of a dispatch, u32 tokens [num_ranks, num_ranks] (tokens that rank s sends to rank d) and u32 entries
// [num_ranks, num_experts] (top-k entries of rank s for expert e), and the view: bit s is set when rank s takes part. Out: row
// numbers. Every rank has the whole matrix, so every rank computes the same. Rows are in (source rank, token, k) order.
// Callers: dispatch, combine and low latency on the CPU; kernels share in_view() and add_up(). Rows of ranks outside the view
// do not exist.
#pragma once

#include <cstdint>

#include "partition.hpp"
#include "regions.hpp"

namespace deepep {

struct CountMatrix {
  const uint32_t* tokens = nullptr;
  const uint32_t* entries = nullptr;
  uint32_t num_ranks = 0;
  uint32_t num_experts = 0;
  uint64_t view = 0;
};

DEEPEP_HOST_DEVICE constexpr bool in_view(uint64_t view, uint32_t rank) { return (view >> rank & 1) != 0; }

// A column of the matrix added up: what the ranks before one have, and what all have.
struct ColumnSums {
  uint32_t before = 0;
  uint32_t all = 0;
};
DEEPEP_HOST_DEVICE inline ColumnSums add_up(const uint32_t* column, uint64_t stride, uint32_t num_ranks, uint32_t rank,
                                            uint64_t view) {
  ColumnSums sums;
  for (uint32_t s = 0; s < num_ranks; ++s) {
    const uint32_t count = in_view(view, s) ? column[s * stride] : 0;
    sums.before += s < rank ? count : 0;
    sums.all += count;
  }
  return sums;
}

// Tokens that ranks 0 … end - 1 send to rank `dst`: with end = s the first row of s in the rank layout, with end =
// num_ranks the rows in use.
DEEPEP_HOST_DEVICE inline uint32_t tokens_before(const CountMatrix& m, uint32_t end, uint32_t dst) {
  return add_up(m.tokens + dst, m.num_ranks, end, end, m.view).all;
}

// Entries that ranks 0 … end - 1 have for an expert: with end = s the first row of s inside the expert's group.
DEEPEP_HOST_DEVICE inline uint32_t entries_before(const CountMatrix& m, uint32_t end, uint32_t expert) {
  return add_up(m.entries + expert, m.num_experts, end, end, m.view).all;
}

// Rows of an expert's group in the expert layout, padding included.
DEEPEP_HOST_DEVICE inline uint64_t group_rows(const CountMatrix& m, uint32_t expert, uint32_t alignment) {
  return align_up(entries_before(m, m.num_ranks, expert), alignment);
}

// Rows that rank `dst` needs in the expert layout.
DEEPEP_HOST_DEVICE inline uint64_t expert_layout_rows(const CountMatrix& m, uint32_t dst, uint32_t alignment) {
  const ExpertRange experts = local_experts(m.num_experts, m.num_ranks, dst);
  uint64_t rows = 0;
  for (uint32_t e = 0; e < experts.count; ++e) rows += group_rows(m, experts.first + e, alignment);
  return rows;
}

// First rows of rank `src` on every rank, out u32 [num_ranks] (rank layout).
DEEPEP_HOST_DEVICE inline void rank_layout_bases(const CountMatrix& m, uint32_t src, uint32_t* out) {
  for (uint32_t dst = 0; dst < m.num_ranks; ++dst) out[dst] = tokens_before(m, src, dst);
}

// First rows of rank `src` for every expert on the rank that owns it, out u32 [num_experts] (expert layout).
DEEPEP_HOST_DEVICE inline void expert_layout_bases(const CountMatrix& m, uint32_t src, uint32_t alignment, uint32_t* out) {
  for (uint32_t dst = 0; dst < m.num_ranks; ++dst) {
    const ExpertRange experts = local_experts(m.num_experts, m.num_ranks, dst);
    uint64_t group = 0;
    for (uint32_t e = experts.first; e < experts.first + experts.count; ++e) {
      out[e] = static_cast<uint32_t>(group + entries_before(m, src, e));
      group += group_rows(m, e, alignment);
    }
  }
}

// First rows of rank `src` inside every expert's region, out u32 [num_experts] (low latency: a region an expert).
DEEPEP_HOST_DEVICE inline void low_latency_bases(const CountMatrix& m, uint32_t src, uint32_t* out) {
  for (uint32_t e = 0; e < m.num_experts; ++e) out[e] = entries_before(m, src, e);
}

}  // namespace deepep
