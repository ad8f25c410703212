// Counting a routing on the device: from topk_idx or is_token_in_rank to counts, and to the place of every token among this
// rank's rows.
//
// In: a rank's routing as the caller gave it. Out: scratch row kScratchRows + b: what block b counted, where it has not all
// tokens; then, with all blocks' counts, the hops. The order (token, k) is kept without sorting: every block takes a run of
// tokens, or one takes all of few, cut into one section a warp, and what lies in earlier blocks and sections comes before.
// Callers: dispatch, get_dispatch_layout.
#pragma once

#include "../common/partition.hpp"
#include "leader.cuh"

namespace deepep {

// A routing as the caller gave it.
struct RoutingInput {
  const void* topk_idx;             // int32 or int64 [num_tokens, num_topk], nullptr = by is_token_in_rank
  const uint8_t* is_token_in_rank;  // [num_tokens, num_ranks]
  uint32_t topk_idx_bytes;
  uint32_t num_tokens;
  uint32_t num_topk;

  __device__ int64_t raw(uint64_t i) const {
    return topk_idx_bytes == 4 ? static_cast<const int32_t*>(topk_idx)[i] : static_cast<const int64_t*>(topk_idx)[i];
  }
};

// A run of tokens.
struct TokenRange {
  uint32_t begin;
  uint32_t end;
};

// The tokens of this block, or with `part` of `parts` a section of a run.
__device__ inline TokenRange cut(TokenRange run, uint32_t part, uint32_t parts) {
  const uint32_t each = (run.end - run.begin + parts - 1) / parts;
  const uint32_t begin = run.begin + part * each;
  return {begin < run.end ? begin : run.end, begin + each < run.end ? begin + each : run.end};
}
__device__ inline TokenRange block_tokens(uint32_t num_tokens) { return cut({0, num_tokens}, blockIdx.x, gridDim.x); }
// Which section of its block's tokens is a warp's. Those of a leader's block that lead and publish come last.
__device__ inline uint32_t own_section() {
  const uint32_t warp = threadIdx.x / kWarpLanes, warps = blockDim.x / kWarpLanes;
  return warp < 2 ? warps - 1 - warp : warp - 2;
}

// Shared memory of a count: tables of u32, one row a section.
struct CountTables {
  uint32_t* tokens;   // [sections, num_ranks]
  uint32_t* entries;  // [by_expert ? sections : 1, num_experts]
  uint32_t sections;
};

// What a kernel that counts, or works out row bases, needs at least.
constexpr uint64_t kCountBytes = kMaxWarps * DEEPEP_MAX_RANKS * 4 + uint64_t{2} * DEEPEP_MAX_EXPERTS * 4;

__host__ __device__ inline uint64_t count_bytes(const Options& options, uint32_t sections, bool by_expert) {
  return 4 * (uint64_t{sections} * options.num_ranks + uint64_t{by_expert ? sections : 1} * options.num_experts);
}

__device__ inline CountTables count_tables(const CallParams& p, uint8_t* shared, uint32_t shared_bytes, bool by_expert) {
  uint32_t sections = blockDim.x / kWarpLanes;
  while (sections > 1 && count_bytes(p.options, sections, by_expert) > shared_bytes) sections -= 1;
  auto* words = reinterpret_cast<uint32_t*>(shared);
  return {words, words + sections * p.options.num_ranks, sections};
}

__device__ inline uint32_t* scratch_row(const CallParams& p, uint32_t row) {
  return p.scratch + uint64_t{row} * (p.options.num_ranks + p.options.num_experts);
}
__device__ inline uint32_t* row_bases(const CallParams& p) { return scratch_row(p, 0); }
__device__ inline uint32_t* group_begins(const CallParams& p) { return scratch_row(p, 1); }
__device__ inline uint32_t* group_entries(const CallParams& p) { return scratch_row(p, 2); }
__device__ inline uint32_t* counts_of_block(const CallParams& p, uint32_t block) {
  return scratch_row(p, kScratchRows + block);
}

// Entries of an expert's group, padding included. Mostly there is none.
__device__ inline uint32_t aligned(uint32_t entries, uint32_t alignment) {
  return alignment == 1 ? entries : (entries + alignment - 1) / alignment * alignment;
}

// Entry i as an expert; -1 for none, and for a wrong one, which has been noted.
__device__ inline int32_t expert_of_entry(const CallParams& p, const RoutingInput& input, uint64_t i) {
  const int64_t value = input.raw(i);
  return value < 0 || value >= static_cast<int64_t>(p.options.num_experts) ? -1 : static_cast<int32_t>(value);
}

// The ranks that a token goes to.
__device__ inline uint64_t ranks_of_token(const CallParams& p, const RoutingInput& input, uint32_t token) {
  uint64_t ranks = 0;
  if (input.topk_idx == nullptr) {
    for (uint32_t rank = 0; rank < p.options.num_ranks; ++rank) {
      if (input.is_token_in_rank[uint64_t{token} * p.options.num_ranks + rank] != 0) ranks |= rank_bit(rank);
    }
    return ranks;
  }
  for (uint32_t k = 0; k < input.num_topk; ++k) {
    const int32_t expert = expert_of_entry(p, input, uint64_t{token} * input.num_topk + k);
    if (expert >= 0) ranks |= rank_bit(p.partition.rank(static_cast<uint32_t>(expert)));
  }
  return ranks;
}

// One warp: counts the entries of a section, notes wrong ones, and keeps the experts for later if asked.
__device__ inline void count_entries(const CallParams& p, const RoutingInput& input, TokenRange section, uint32_t* entries,
                                     int32_t* experts) {
  if (input.topk_idx == nullptr) return;
  const uint64_t end = uint64_t{section.end} * input.num_topk;
  for (uint64_t i = uint64_t{section.begin} * input.num_topk + threadIdx.x % kWarpLanes; i < end; i += kWarpLanes) {
    const int64_t value = input.raw(i);
    const int32_t expert = expert_of_entry(p, input, i);
    // The first wrong entry of all has the largest ~position.
    if (value < -1 || value >= static_cast<int64_t>(p.options.num_experts)) max_relaxed_gpu(&p.state->bad_entry, ~i);
    if (experts != nullptr) experts[i] = expert;
    if (expert >= 0) atomicAdd(&entries[expert], 1u);
  }
}

// One warp: counts the tokens of a section by rank.
__device__ inline void count_tokens(const CallParams& p, const RoutingInput& input, TokenRange section, uint32_t* tokens) {
  const uint32_t lane = threadIdx.x % kWarpLanes;
  uint32_t low = 0, high = 0;  // of ranks lane and lane + 32
  for (uint32_t first = section.begin; first < section.end; first += kWarpLanes) {
    const uint64_t ranks = first + lane < section.end ? ranks_of_token(p, input, first + lane) : 0;
    for (uint32_t rank = 0; rank < p.options.num_ranks; ++rank) {
      const uint32_t count = __popc(__ballot_sync(kAllLanes, in_view(ranks, rank)));
      if (rank == lane) low += count;
      if (rank == lane + kWarpLanes) high += count;
    }
  }
  if (lane < p.options.num_ranks) tokens[lane] = low;
  if (lane + kWarpLanes < p.options.num_ranks) tokens[lane + kWarpLanes] = high;
}

// Counts a block's tokens: fills the tables. By all threads.
__device__ inline void count_sections(const CallParams& p, const RoutingInput& input, TokenRange tokens,
                                      const CountTables& tables, bool by_expert, int32_t* experts) {
  const uint32_t ranks = p.options.num_ranks, num_experts = p.options.num_experts;
  const uint32_t rows = by_expert ? tables.sections : 1;
  for (uint32_t i = threadIdx.x; i < rows * num_experts; i += blockDim.x) tables.entries[i] = 0;
  __syncthreads();
  const uint32_t nth = own_section();
  if (nth < tables.sections) {
    const TokenRange section = cut(tokens, nth, tables.sections);
    count_entries(p, input, section, tables.entries + (by_expert ? nth * num_experts : 0), experts);
    count_tokens(p, input, section, tables.tokens + nth * ranks);
  }
  __syncthreads();
}

// What they have counted in column i.
__device__ inline uint32_t counted_here(const CallParams& p, const CountTables& tables, bool by_expert, uint32_t i) {
  const uint32_t ranks = p.options.num_ranks, num_experts = p.options.num_experts;
  const bool is_rank = i < ranks;
  const uint32_t* column = is_rank ? tables.tokens + i : tables.entries + (i - ranks);
  const uint32_t rows = is_rank || by_expert ? tables.sections : 1;
  uint32_t sum = 0;
  for (uint32_t row = 0; row < rows; ++row) sum += column[row * (is_rank ? ranks : num_experts)];
  return sum;
}

// Both, where other blocks have tokens too: fills the block's row of scratch. By all threads; end with arrive(kMeetCounted).
__device__ inline void count_block(const CallParams& p, const RoutingInput& input, TokenRange tokens, const CountTables& tables,
                                   bool by_expert, int32_t* experts) {
  count_sections(p, input, tokens, tables, by_expert, experts);
  uint32_t* counts = counts_of_block(p, blockIdx.x);
  for (uint32_t i = threadIdx.x; i < p.options.num_ranks + p.options.num_experts; i += blockDim.x) {
    counts[i] = counted_here(p, tables, by_expert, i);
  }
}

// What blocks 0 … end - 1 have counted in column i. After kMeetCounted.
__device__ inline uint32_t counted_before(const CallParams& p, uint32_t end, uint32_t i) {
  uint32_t sum = 0;
#pragma unroll 4
  for (uint32_t block = 0; block < end; ++block) sum += __ldcg(counts_of_block(p, block) + i);
  return sum;
}

// Turns the tables from counts into first positions: what lies in earlier blocks and sections. By all threads, when the blocks
// before this one have counted.
__device__ inline void place_sections(const CallParams& p, const CountTables& tables, bool by_expert) {
  const uint32_t ranks = p.options.num_ranks;
  const uint32_t columns = by_expert ? p.options.num_experts : ranks;
  uint32_t* table = by_expert ? tables.entries : tables.tokens;
  for (uint32_t i = threadIdx.x; i < columns; i += blockDim.x) {
    uint32_t at = counted_before(p, blockIdx.x, by_expert ? ranks + i : i);
    for (uint32_t section = 0; section < tables.sections; ++section) {
      const uint32_t count = table[section * columns + i];
      table[section * columns + i] = at;
      at += count;
    }
  }
  __syncthreads();
}

// One warp, rank layout: the hops of a section's tokens, ascending by rank. `at` is the section's row of first positions.
__device__ inline void place_tokens(const CallParams& p, const RoutingInput& input, TokenRange section, const uint32_t* at,
                                    DeviceHop* hops, uint32_t width) {
  const uint32_t lane = threadIdx.x % kWarpLanes;
  const uint32_t before_me = (1u << lane) - 1;
  // Of ranks lane and lane + 32.
  uint32_t low = lane < p.options.num_ranks ? at[lane] : 0;
  uint32_t high = lane + kWarpLanes < p.options.num_ranks ? at[lane + kWarpLanes] : 0;
  for (uint32_t first = section.begin; first < section.end; first += kWarpLanes) {
    const bool is_mine = first + lane < section.end;
    const uint64_t ranks = is_mine ? ranks_of_token(p, input, first + lane) : 0;
    DeviceHop* mine = hops + uint64_t{first + lane} * width;
    uint32_t i = 0;
    for (uint32_t rank = 0; rank < p.options.num_ranks; ++rank) {
      const uint32_t lanes = __ballot_sync(kAllLanes, in_view(ranks, rank));
      uint32_t& next = rank < kWarpLanes ? low : high;
      const uint32_t begin = __shfl_sync(kAllLanes, next, rank % kWarpLanes);
      if (in_view(ranks, rank)) mine[i++] = {static_cast<int32_t>(rank), begin + __popc(lanes & before_me)};
      if (lane == rank % kWarpLanes) next += __popc(lanes);
    }
    for (; is_mine && i < width; ++i) mine[i] = {-1, 0};
    __syncwarp();
  }
}

// One warp, expert layout: the hops of a section's tokens, one for each k.
__device__ inline void place_entries(const CallParams& p, const RoutingInput& input, TokenRange section, uint32_t* at,
                                     DeviceHop* hops) {
  const uint32_t lane = threadIdx.x % kWarpLanes;
  const uint32_t before_me = (1u << lane) - 1;
  const uint64_t end = uint64_t{section.end} * input.num_topk;
  for (uint64_t first = uint64_t{section.begin} * input.num_topk; first < end; first += kWarpLanes) {
    const bool is_mine = first + lane < end;
    const int32_t expert = is_mine ? expert_of_entry(p, input, first + lane) : -1;
    const uint32_t same = __match_any_sync(kAllLanes, expert);
    const uint32_t begin = expert >= 0 ? at[expert] : 0;
    if (is_mine) hops[first + lane] = {expert, expert >= 0 ? begin + __popc(same & before_me) : 0};
    __syncwarp();
    if (expert >= 0 && (same & before_me) == 0) at[expert] += __popc(same);
    __syncwarp();
  }
}

// Fills the hops of a block's tokens, when place_sections() has been. By whole warps.
__device__ inline void place_block(const CallParams& p, const RoutingInput& input, TokenRange tokens, const CountTables& tables,
                                   bool by_expert, const RoutingParams& routing) {
  const uint32_t nth = own_section();
  if (nth >= tables.sections) return;
  const TokenRange section = cut(tokens, nth, tables.sections);
  if (by_expert)
    place_entries(p, input, section, tables.entries + nth * p.options.num_experts, routing.hops);
  else
    place_tokens(p, input, section, tables.tokens + nth * p.options.num_ranks, routing.hops, routing.width);
}

}  // namespace deepep
