// What is known of a routing when its dispatch is enqueued: the shapes, not where the tokens go.
//
// In: dispatch args. Out: a plain struct that a handle keeps for combine and for cached dispatch. Callers: the checks of both
// backends, and whatever sizes memory by it.
#pragma once

#include <cstdint>

#include "../abi/deepep.h"

namespace deepep {

// What a key of a hop and a row number count.
enum class RowSpace : uint32_t {
  rank = DEEPEP_LAYOUT_RANK,      // key: rank; row: among all rows of that rank
  expert = DEEPEP_LAYOUT_EXPERT,  // key: expert; row: among all rows of its rank
  region = 2,                     // key: expert; row: within the expert's region (low latency)
};

struct RoutingPlan {
  bool made = false;
  RowSpace space = RowSpace::rank;
  uint32_t expert_alignment = 1;
  uint32_t num_tokens = 0;
  uint32_t num_topk = 0;  // 0 = routed by is_token_in_rank
  uint32_t topk_idx_bytes = 4;
  uint64_t epoch = 0;  // of the dispatch that makes the routing; 0 = not enqueued yet
  // Hops of a token: rank layout ascending by rank, at most one a rank; otherwise one for each k.
  uint32_t width(uint32_t num_ranks) const {
    return space != RowSpace::rank ? num_topk : num_topk != 0 && num_topk < num_ranks ? num_topk : num_ranks;
  }
};

}  // namespace deepep
