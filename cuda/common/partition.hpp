// Which rank owns which expert: consecutive runs, the first num_experts % num_ranks ranks own one more.
//
// In: counts. Out: indices. The same arithmetic as lib/layout.ts, for host and device code. Callers: buffer creation, every
// operation that reads topk_idx.
#pragma once

#include <cstdint>

#include "regions.hpp"

namespace deepep {

// A run of consecutive experts: first … first + count - 1.
struct ExpertRange {
  uint32_t first = 0;
  uint32_t count = 0;  // 0 when there are fewer experts than ranks
};

// The experts of a rank.
DEEPEP_HOST_DEVICE constexpr ExpertRange local_experts(uint32_t num_experts, uint32_t num_ranks, uint32_t rank) {
  const uint32_t base = num_experts / num_ranks;
  const uint32_t extra = num_experts % num_ranks;
  return {rank * base + (rank < extra ? rank : extra), base + (rank < extra ? 1u : 0u)};
}

// The rank that owns an expert, which must be less than num_experts.
DEEPEP_HOST_DEVICE constexpr uint32_t expert_rank(uint32_t expert, uint32_t num_experts, uint32_t num_ranks) {
  const uint32_t base = num_experts / num_ranks;
  const uint32_t extra = num_experts % num_ranks;
  const uint32_t in_larger = extra * (base + 1);  // experts of the ranks that own one more
  return expert < in_larger ? expert / (base + 1) : extra + (expert - in_larger) / base;
}

}  // namespace deepep
