// The counting of a routing: from topk_idx or is_token_in_rank to counts and hops.
//
// In: a rank's routing as the caller gave it. Out: how many of its tokens go to each rank and each expert, and for a dispatch
// the hops of every token. Callers: get_dispatch_layout, dispatch, low latency; all on the communication stream.
#pragma once

#include <cstdint>
#include <vector>

#include "buffer.hpp"
#include "handle.hpp"

namespace deepep {

// topk_idx of either width.
struct TopkIdx {
  const void* data = nullptr;
  uint32_t bytes = 4;  // of an entry: 4 or 8
  uint32_t num_topk = 0;

  int64_t at(size_t i) const {
    return bytes == 4 ? static_cast<const int32_t*>(data)[i] : static_cast<const int64_t*>(data)[i];
  }
};

// What one rank sends.
struct Counts {
  std::vector<uint32_t> tokens;   // [num_ranks]: a token counts once however many of its experts are there
  std::vector<uint32_t> entries;  // [num_experts]: an expert listed twice by a token counts twice
};

// Fills counts and, where `routing` is given (with its plan), hops and experts. False after refusing an entry that is
// neither -1 nor an expert: the failure names token, entry and value.
bool count_topk(Operation& op, const TopkIdx& topk, uint32_t num_tokens, Counts& counts, Routing* routing);

// The same from u8 [num_tokens, num_ranks] and optional i32 [num_experts].
bool count_tokens_in_rank(Operation& op, const uint8_t* is_token_in_rank, const int32_t* num_tokens_per_expert,
                          uint32_t num_tokens, Counts& counts, Routing& routing);

}  // namespace deepep
