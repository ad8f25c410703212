// Routings: where every token of a dispatch went. A handle of the ABI keeps one for combine and for cached dispatch.
//
// In: a dispatch fills it. Out: with the count matrix and the ranks that take part, the row of every (token, destination) on
// every rank (common/routing.hpp). It holds positions within this rank's own rows, not rows, because rows move when a rank is
// masked. Callers: dispatch, combine, low latency (which keeps one in the slot).
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "../api/handles.hpp"
#include "../common/routing.hpp"
#include "buffer.hpp"
#include "exchange.hpp"

namespace deepep {

// A row that a token becomes: the index-th of this rank's rows for the key.
struct Hop {
  int32_t key = -1;  // rank or expert; -1 = none
  uint32_t index = 0;
};

// Filled and read on the communication stream only.
struct Routing {
  bool valid = false;     // its dispatch has succeeded
  uint64_t epoch = 0;     // of that dispatch: the routing's name, the same on every rank
  uint64_t view = 0;      // ranks that took part in the latest dispatch with it
  RoutingPlan plan;
  uint32_t width = 0;
  std::vector<Hop> hops;           // [num_tokens, width]
  std::vector<int32_t> experts;    // [num_tokens, num_topk]: topk_idx
  std::vector<uint32_t> tokens;    // the count matrix: [num_ranks, num_ranks]
  std::vector<uint32_t> entries;   // [num_ranks, num_experts]

  // Whether it is what the plan's dispatch has made: that one may have failed, or been skipped, and left an earlier routing.
  bool is(const RoutingPlan& enqueued) const { return valid && epoch == enqueued.epoch; }

  CountMatrix matrix(const Options& options) const { return matrix(options, view); }
  // With the ranks of another dispatch.
  CountMatrix matrix(const Options& options, uint64_t ranks) const {
    return {tokens.data(), entries.data(), options.num_ranks, options.num_experts, ranks};
  }
};

// Takes the view and the count matrix out of the messages, which the ring will reuse.
void keep_counts(const Exchange& exchanged, const Options& options, Routing& routing);

struct Handle : HandleFacts {
  Routing routing;
};

// Which rank owns each expert, looked up rather than divided.
class ExpertOwners {
 public:
  explicit ExpertOwners(const Options& options);
  uint32_t operator[](int32_t expert) const { return rank_[static_cast<size_t>(expert)]; }

 private:
  std::vector<uint8_t> rank_;
};

// This rank's tokens of each key, in the order of their rows: those of key i are tokens[begin[i]] … tokens[begin[i + 1] - 1].
struct TokensByKey {
  std::vector<uint32_t> begin;
  std::vector<uint32_t> tokens;
};
TokensByKey tokens_by_key(const Routing& routing, const Options& options, uint32_t rank);

// First row of this rank for every key of the routing's space, over the ranks in a view.
std::vector<uint32_t> row_bases(const Routing& routing, uint64_t view, const Options& options, uint32_t rank);

}  // namespace deepep
