// The counting of a routing; see layout.hpp.
#include "layout.hpp"

#include <bit>

#include "../api/checks.hpp"
#include "../api/operations.hpp"
#include "exchange.hpp"
#include "wait.hpp"

namespace deepep {
namespace {

void reset(Counts& counts, const Options& options) {
  counts.tokens.assign(options.num_ranks, 0);
  counts.entries.assign(options.num_experts, 0);
}

// Rank layout: a hop for each rank in the set, ascending.
void put_rank_hops(uint64_t ranks, const std::vector<uint32_t>& tokens, Hop* hops, uint32_t width) {
  uint32_t i = 0;
  for (; ranks != 0; ranks &= ranks - 1, ++i) {
    const int rank = std::countr_zero(ranks);
    hops[i] = {rank, tokens[static_cast<size_t>(rank)]};
  }
  for (; i < width; ++i) hops[i] = {};
}

void count_ranks(uint64_t ranks, std::vector<uint32_t>& tokens) {
  for (; ranks != 0; ranks &= ranks - 1) tokens[static_cast<size_t>(std::countr_zero(ranks))] += 1;
}

}  // namespace

bool count_topk(Operation& op, const TopkIdx& topk, uint32_t num_tokens, Counts& counts, Routing* routing) {
  const Options& options = op.buffer.options;
  const ExpertOwners owners(options);
  reset(counts, options);
  const bool by_rank = routing != nullptr && routing->plan.space == RowSpace::rank;
  if (routing != nullptr) {
    routing->width = routing->plan.width(options.num_ranks);
    routing->hops.resize(size_t{num_tokens} * routing->width);
    routing->experts.resize(size_t{num_tokens} * topk.num_topk);
  }
  for (uint32_t token = 0; token < num_tokens; ++token) {
    uint64_t ranks = 0;
    for (uint32_t k = 0; k < topk.num_topk; ++k) {
      const size_t i = size_t{token} * topk.num_topk + k;
      const int64_t value = topk.at(i);
      if (value < -1 || value >= static_cast<int64_t>(options.num_experts)) {
        op.fail({.code = DEEPEP_ERROR_INVALID_ARGUMENT,
                 .reason = Reason::bad_entry,
                 .agreed = 1,
                 .a = static_cast<int32_t>(token),
                 .b = static_cast<int32_t>(k),
                 .expected = options.num_experts,
                 .seen = value});
        return false;
      }
      const auto expert = static_cast<int32_t>(value);
      if (routing != nullptr) {
        routing->experts[i] = expert;
        if (!by_rank) routing->hops[i] = {expert, expert < 0 ? 0 : counts.entries[static_cast<size_t>(expert)]};
      }
      if (expert < 0) continue;
      counts.entries[static_cast<size_t>(expert)] += 1;
      ranks |= uint64_t{1} << owners[expert];
    }
    if (by_rank) put_rank_hops(ranks, counts.tokens, &routing->hops[size_t{token} * routing->width], routing->width);
    count_ranks(ranks, counts.tokens);
  }
  return true;
}

bool count_tokens_in_rank(Operation& op, const uint8_t* is_token_in_rank, const int32_t* num_tokens_per_expert,
                          uint32_t num_tokens, Counts& counts, Routing& routing) {
  const Options& options = op.buffer.options;
  reset(counts, options);
  routing.width = routing.plan.width(options.num_ranks);
  routing.hops.resize(size_t{num_tokens} * routing.width);
  routing.experts.clear();
  for (uint32_t token = 0; token < num_tokens; ++token) {
    uint64_t ranks = 0;
    for (uint32_t rank = 0; rank < options.num_ranks; ++rank) {
      if (is_token_in_rank[size_t{token} * options.num_ranks + rank] != 0) ranks |= uint64_t{1} << rank;
    }
    put_rank_hops(ranks, counts.tokens, &routing.hops[size_t{token} * routing.width], routing.width);
    count_ranks(ranks, counts.tokens);
  }
  for (uint32_t e = 0; num_tokens_per_expert != nullptr && e < options.num_experts; ++e) {
    // No rank has more entries; so the sums over all ranks fit an int32.
    constexpr uint32_t most = DEEPEP_MAX_TOKENS * DEEPEP_MAX_TOPK;
    if (num_tokens_per_expert[e] < 0 || static_cast<uint32_t>(num_tokens_per_expert[e]) > most) {
      op.fail({.code = DEEPEP_ERROR_INVALID_ARGUMENT,
               .reason = Reason::bad_expert_count,
               .agreed = 1,
               .a = static_cast<int32_t>(e),
               .seen = num_tokens_per_expert[e]});
      return false;
    }
    counts.entries[e] = static_cast<uint32_t>(num_tokens_per_expert[e]);
  }
  return true;
}

void get_dispatch_layout(Buffer& buffer, const deepep_dispatch_layout_args& args) {
  check_layout(buffer, args);
  buffer.enqueue(DEEPEP_OP_LAYOUT, stream_fields(args), false, [args](Operation& op) {
    const Options& options = op.buffer.options;
    const auto num_tokens = static_cast<uint32_t>(args.num_tokens);
    const TopkIdx topk = {reinterpret_cast<const void*>(args.topk_idx), args.topk_idx_bytes,
                          static_cast<uint32_t>(args.num_topk)};
    Counts counts;
    if (!count_topk(op, topk, num_tokens, counts, nullptr)) return;
    auto* per_rank = reinterpret_cast<int32_t*>(args.num_tokens_per_rank);
    auto* per_expert = reinterpret_cast<int32_t*>(args.num_tokens_per_expert);
    auto* in_rank = reinterpret_cast<uint8_t*>(args.is_token_in_rank);
    for (uint32_t rank = 0; rank < options.num_ranks; ++rank) per_rank[rank] = static_cast<int32_t>(counts.tokens[rank]);
    for (uint32_t e = 0; e < options.num_experts; ++e) per_expert[e] = static_cast<int32_t>(counts.entries[e]);
    const ExpertOwners owners(options);
    for (uint32_t token = 0; token < num_tokens; ++token) {
      uint8_t* flags = in_rank + size_t{token} * options.num_ranks;
      for (uint32_t rank = 0; rank < options.num_ranks; ++rank) flags[rank] = 0;
      for (uint32_t k = 0; k < topk.num_topk; ++k) {
        const auto expert = static_cast<int32_t>(topk.at(size_t{token} * topk.num_topk + k));
        if (expert >= 0) flags[owners[expert]] = 1;
      }
    }
  });
}

}  // namespace deepep
