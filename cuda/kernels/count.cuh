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
  const uint32_t tokens = run.end - run.begin;
  const uint32_t each = tokens <= parts ? 1 : (tokens + parts - 1) / parts;
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

__host__ __device__ constexpr uint64_t count_bytes(uint64_t num_ranks, uint64_t num_experts, uint32_t sections,
                                                   bool by_expert) {
  return 4 * (sections * num_ranks + (by_expert ? sections : 1) * num_experts);
}
// Of what is made of them: a row of sums, and where the rows begin on every rank (rows.cuh).
__host__ __device__ inline uint32_t sums_bytes(const Options& options) { return 4 * (options.num_ranks + options.num_experts); }
__host__ __device__ inline uint32_t row_tables_bytes(const Options& options) {
  return 8 * options.num_ranks + 4 * (options.num_ranks > options.num_experts ? options.num_ranks : options.num_experts);
}
// What a kernel needs that counts, and one that makes all of it. In the expert layout with room for fewer sections.
constexpr uint64_t kCountBytes = count_bytes(DEEPEP_MAX_RANKS, DEEPEP_MAX_EXPERTS, kMaxWarps, false);
inline uint64_t count_room(const Options& options) {
  return align_up(count_bytes(options.num_ranks, options.num_experts, kMaxWarps, false), 8) +
         align_up(row_tables_bytes(options), 8) + align_up(sums_bytes(options), 8);
}

__device__ inline CountTables count_tables(const CallParams& p, uint8_t* shared, uint32_t shared_bytes, bool by_expert) {
  const uint32_t ranks = p.options.num_ranks, experts = p.options.num_experts;
  uint32_t sections = blockDim.x / kWarpLanes;
  while (sections > 1 && count_bytes(ranks, experts, sections, by_expert) > shared_bytes) sections -= 1;
  auto* words = reinterpret_cast<uint32_t*>(shared);
  return {words, words + sections * ranks, sections};
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

// A round of a section's tokens as one warp looks at it: a lane for each token and column, which is an entry, or in a routing
// by is_token_in_rank a rank. As many whole tokens as there are lanes for; a token of more columns takes several rounds.
struct Columns {
  uint32_t count;   // of a token
  uint32_t tokens;  // in a round
  uint32_t token;   // this lane's, of them
  uint32_t column;  // this lane's, of a token's first round

  __device__ static Columns of(const CallParams& p, const RoutingInput& input) {
    const uint32_t count = input.topk_idx != nullptr ? input.num_topk : p.options.num_ranks, lane = lane_id();
    if (count > kWarpLanes) return {count, 1, 0, lane};
    return {count, kWarpLanes / count, lane / count, lane % count};
  }
  // The lanes that have this one's token.
  __device__ uint32_t lanes() const {
    return count < kWarpLanes ? ((1u << count) - 1) << (token * count) : kAllLanes;
  }
};

// What a lane has there: a rank that its token goes to, of all lanes of the token that have this one the first. -1 = none.
struct TokenRank {
  uint32_t token;
  int32_t rank;
};
// One warp, a round: `see(i, value)` is told of entry i as it was given.
template <class See>
__device__ __forceinline__ TokenRank look(const CallParams& p, const RoutingInput& input, const Columns& columns,
                                          TokenRange section, uint32_t first, uint32_t from_column, See see) {
  const uint32_t lane = lane_id(), column = columns.column + from_column;
  TokenRank to = {first + columns.token, -1};
  if (columns.token < columns.tokens && to.token < section.end && column < columns.count) {
    const uint64_t i = uint64_t{to.token} * columns.count + column;
    if (input.topk_idx == nullptr) {
      if (input.is_token_in_rank[i] != 0) to.rank = static_cast<int32_t>(column);
    } else {
      const int64_t value = input.raw(i);
      const bool is_expert = value >= 0 && value < static_cast<int64_t>(p.options.num_experts);
      if (is_expert) to.rank = static_cast<int32_t>(p.partition.rank(static_cast<uint32_t>(value)));
      see(i, value, is_expert);
    }
  }
  const uint32_t same = __match_any_sync(kAllLanes, to.rank << 6 | static_cast<int32_t>(columns.token));
  if ((same & ((1u << lane) - 1)) != 0) to.rank = -1;
  return to;
}

// One warp: counts the entries and tokens of a section, notes wrong entries, and keeps the experts for later if asked. Whether
// this lane has noted one.
__device__ inline bool count_section(const CallParams& p, const RoutingInput& input, TokenRange section, uint32_t* tokens,
                                     uint32_t* entries, int32_t* experts) {
  if (section.begin == section.end) return false;
  const Columns columns = Columns::of(p, input);
  bool bad = false;
  for (uint32_t first = section.begin; first < section.end; first += columns.tokens) {
    for (uint32_t from = 0; from < columns.count; from += kWarpLanes) {
      const TokenRank to = look(p, input, columns, section, first, from, [&](uint64_t i, int64_t value, bool is_expert) {
        const bool is_bad = !is_expert && value != -1;
        // The first wrong entry of all has the largest ~position.
        if (is_bad) max_relaxed_gpu(&p.state->bad_entry, ~i);
        bad = bad || is_bad;
        if (experts != nullptr) experts[i] = is_expert ? static_cast<int32_t>(value) : -1;
        if (is_expert) atomicAdd(&entries[value], 1u);
      });
      if (to.rank >= 0) atomicAdd(&tokens[to.rank], 1u);
    }
  }
  return bad;
}

// Before count_sections(), by all threads; the block must meet in between.
__device__ inline void clear_tables(const CallParams& p, const CountTables& tables, bool by_expert) {
  const uint32_t tokens = tables.sections * p.options.num_ranks;
  const uint32_t entries = (by_expert ? tables.sections : 1) * p.options.num_experts;
  for (uint32_t i = threadIdx.x; i < tokens; i += blockDim.x) tables.tokens[i] = 0;
  for (uint32_t i = threadIdx.x; i < entries; i += blockDim.x) tables.entries[i] = 0;
}

// Counts a block's tokens: fills the tables. By all threads. Whether some entry is wrong.
__device__ inline bool count_sections(const CallParams& p, const RoutingInput& input, TokenRange tokens,
                                      const CountTables& tables, bool by_expert, int32_t* experts) {
  const uint32_t nth = own_section();
  const bool bad = nth < tables.sections &&
                   count_section(p, input, cut(tokens, nth, tables.sections), tables.tokens + nth * p.options.num_ranks,
                                 tables.entries + (by_expert ? nth * p.options.num_experts : 0), experts);
  return __syncthreads_or(bad) != 0;
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
  clear_tables(p, tables, by_expert);
  __syncthreads();
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

// What one warp of all that share it tells the peers of `to`: a part of one peer's words, or of several. Value i of `count`, by
// value(i), becomes word i of words_of(peer). Pairs with take_counts() of the peer.
template <class WordsOf, class Value>
__device__ __forceinline__ void publish_counts(const CallParams& p, uint64_t to, uint64_t epoch, uint32_t warp, uint32_t warps,
                                               uint32_t count, WordsOf words_of, Value value) {
  // Ranks are counted as a power of two: it spares divisions.
  const uint32_t ranks = p.options.num_ranks, shift = 32 - static_cast<uint32_t>(__clz(static_cast<int32_t>(ranks - 1)));
  const uint32_t parts = max(warps >> shift, 1u), part = warp >> shift;
  for (uint32_t peer = warp & ((1u << shift) - 1); peer < ranks && part < parts; peer += warps) {
    if (!in_view(to, peer)) continue;
    uint64_t* const words = words_of(peer);
    for (uint32_t i = part * kWarpLanes + lane_id(); i < count; i += parts * kWarpLanes) {
      store_relaxed_sys(words + i, count_word(epoch, value(i)));
    }
  }
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
__device__ inline void place_tokens(const CallParams& p, const RoutingInput& input, TokenRange section, uint32_t* at,
                                    DeviceHop* hops, uint32_t width) {
  if (section.begin == section.end) return;
  const Columns columns = Columns::of(p, input);
  const uint32_t before_me = (1u << lane_id()) - 1;
  for (uint32_t first = section.begin; first < section.end; first += columns.tokens) {
    uint32_t before = 0;  // hops of the token from earlier rounds: of lower ranks
    for (uint32_t from = 0; from < columns.count; from += kWarpLanes) {
      const TokenRank to = look(p, input, columns, section, first, from, [](uint64_t, int64_t, bool) {});
      const bool has = to.rank >= 0;
      const uint32_t same = __match_any_sync(kAllLanes, to.rank);  // Tokens of the round that go to this one's rank.
      DeviceHop* const mine = hops + uint64_t{to.token} * width;
      uint32_t lower = before;
      for (uint32_t column = 0; column < min(columns.count, kWarpLanes); ++column) {
        const auto other = static_cast<uint32_t>(
            __shfl_sync(kAllLanes, to.rank, static_cast<int>((columns.token * columns.count + column) % kWarpLanes)));
        if (other < static_cast<uint32_t>(to.rank)) ++lower;
      }
      if (has) mine[lower] = {to.rank, at[to.rank] + static_cast<uint32_t>(__popc(same & before_me))};
      before += static_cast<uint32_t>(__popc(__ballot_sync(kAllLanes, has) & columns.lanes()));
      __syncwarp();
      if (has && (same & before_me) == 0) at[to.rank] += static_cast<uint32_t>(__popc(same));
      __syncwarp();
    }
    const uint32_t token = first + columns.token;
    if (columns.token >= columns.tokens || token >= section.end) continue;
    for (uint32_t i = columns.column; i < width; i += kWarpLanes) {
      if (i >= before) hops[uint64_t{token} * width + i] = {-1, 0};
    }
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
