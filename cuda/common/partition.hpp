// Which rank owns which expert: consecutive runs, the first num_experts % num_ranks ranks own one more.
//
// In: counts. Out: indices. The same arithmetic as lib/layout.ts, for host and device code. Callers: buffer creation, every
// operation that reads topk_idx.
#pragma once

#include <cstdint>

#include "../abi/deepep.h"
#include "regions.hpp"

namespace deepep {

// A run of consecutive experts: first … first + count - 1.
struct ExpertRange {
  uint32_t first = 0;
  uint32_t count = 0;  // 0 when there are fewer experts than ranks
};

// How experts are dealt out to ranks. To make one takes divisions, to ask it none: on a GPU a division is some twenty
// instructions, which a kernel of a few microseconds has to fetch.
struct Partition {
  uint32_t base = 0;       // experts of a rank, if not one more
  uint32_t extra = 0;      // ranks that own one more
  uint32_t in_larger = 0;  // experts of those
  uint32_t larger_inverse = 0, base_inverse = 0;

  DEEPEP_HOST_DEVICE static constexpr Partition of(uint32_t num_experts, uint32_t num_ranks) {
    const uint32_t base = num_experts / num_ranks, extra = num_experts % num_ranks;
    return {base, extra, extra * (base + 1), inverse(base + 1), base != 0 ? inverse(base) : 0};
  }

  // The experts of a rank.
  DEEPEP_HOST_DEVICE constexpr ExpertRange experts(uint32_t rank) const {
    return {rank * base + (rank < extra ? rank : extra), base + (rank < extra ? 1u : 0u)};
  }
  // The rank that owns an expert, which must be less than num_experts.
  DEEPEP_HOST_DEVICE constexpr uint32_t rank(uint32_t expert) const {
    return expert < in_larger ? quotient(expert, larger_inverse) : extra + quotient(expert - in_larger, base_inverse);
  }

 private:
  // n / d = n * inverse(d) / 2^24, rounded down, for n and d up to 4096: inverse(d) / 2^24 is larger than 1 / d by less than
  // 1 / 2^24, which n times is at most 1 / 4096, and n / d is short of the next whole number by 1 / d at least.
  static_assert(DEEPEP_MAX_EXPERTS <= 4096);
  static constexpr uint32_t kBits = 24;
  DEEPEP_HOST_DEVICE static constexpr uint32_t inverse(uint32_t d) { return ((1u << kBits) + d - 1) / d; }
  DEEPEP_HOST_DEVICE static constexpr uint32_t quotient(uint32_t n, uint32_t inverse) {
    return static_cast<uint32_t>(uint64_t{n} * inverse >> kBits);
  }
};

// The same where nobody has made one.
DEEPEP_HOST_DEVICE constexpr ExpertRange local_experts(uint32_t num_experts, uint32_t num_ranks, uint32_t rank) {
  return Partition::of(num_experts, num_ranks).experts(rank);
}
DEEPEP_HOST_DEVICE constexpr uint32_t expert_rank(uint32_t expert, uint32_t num_experts, uint32_t num_ranks) {
  return Partition::of(num_experts, num_ranks).rank(expert);
}

}  // namespace deepep
