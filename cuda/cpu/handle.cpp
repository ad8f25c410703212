// Routings and handles; see handle.hpp.
#include "handle.hpp"

namespace deepep {

void keep_counts(const Exchange& exchanged, const Options& options, Routing& routing) {
  const size_t ranks = options.num_ranks;
  const size_t experts = options.num_experts;
  routing.view = exchanged.view;
  routing.tokens.assign(ranks * ranks, 0);
  routing.entries.assign(ranks * experts, 0);
  for (uint32_t src = 0; src < ranks; ++src) {
    if (exchanged.from[src] == nullptr) continue;
    const uint64_t* counts = message_counts(exchanged.from[src]);
    const auto count = [&](size_t i) { return static_cast<uint32_t>(counts[i]); };
    for (size_t i = 0; i < ranks; ++i) routing.tokens[src * ranks + i] = count(i);
    for (size_t i = 0; i < experts; ++i) routing.entries[src * experts + i] = count(ranks + i);
  }
}

ExpertOwners::ExpertOwners(const Options& options) : rank_(options.num_experts) {
  for (uint32_t rank = 0; rank < options.num_ranks; ++rank) {
    const ExpertRange experts = local_experts(options.num_experts, options.num_ranks, rank);
    for (uint32_t e = 0; e < experts.count; ++e) rank_[experts.first + e] = static_cast<uint8_t>(rank);
  }
}

TokensByKey tokens_by_key(const Routing& routing, const Options& options, uint32_t rank) {
  const bool by_rank = routing.plan.space == RowSpace::rank;
  const uint32_t num_keys = by_rank ? options.num_ranks : options.num_experts;
  const uint32_t* counts = by_rank ? &routing.tokens[size_t{rank} * num_keys] : &routing.entries[size_t{rank} * num_keys];
  TokensByKey result;
  result.begin.resize(num_keys + 1, 0);
  for (uint32_t key = 0; key < num_keys; ++key) result.begin[key + 1] = result.begin[key] + counts[key];
  result.tokens.resize(result.begin[num_keys]);
  for (size_t i = 0; i < size_t{routing.plan.num_tokens} * routing.width; ++i) {
    const Hop hop = routing.hops[i];
    if (hop.key < 0) continue;
    result.tokens[result.begin[static_cast<size_t>(hop.key)] + hop.index] = static_cast<uint32_t>(i / routing.width);
  }
  return result;
}

std::vector<uint32_t> row_bases(const Routing& routing, uint64_t view, const Options& options, uint32_t rank) {
  const CountMatrix matrix = routing.matrix(options, view);
  const RowSpace space = routing.plan.space;
  std::vector<uint32_t> bases(space == RowSpace::rank ? options.num_ranks : options.num_experts);
  if (space == RowSpace::rank) rank_layout_bases(matrix, rank, bases.data());
  if (space == RowSpace::expert) expert_layout_bases(matrix, rank, routing.plan.expert_alignment, bases.data());
  if (space == RowSpace::region) low_latency_bases(matrix, rank, bases.data());
  return bases;
}

// The vectors grow when a dispatch fills them.
void prepare_handle(Buffer&, Handle&) {}

}  // namespace deepep
