// Routing handles of the CUDA backend: device memory that a dispatch fills and that combines read.
//
// In: how many tokens of how many entries. Out: RoutingParams for kernels. Nothing of a routing is ever on the host: only its
// plan is. Callers: handle_create, the operations, and the buffer, which has such memory of its own.
#pragma once

#include <cstdint>
#include <memory>

#include "../api/handles.hpp"
#include "params.hpp"

namespace deepep {

// Device memory for the routing of up to num_tokens tokens of up to num_topk entries, cut from `base`; with a base of nullptr
// only the sizes are right. `bytes` becomes what it takes.
RoutingParams cut_routing(uint8_t* base, const Options& options, uint32_t num_tokens, uint32_t num_topk, uint64_t& bytes);

// The same memory for a dispatch with this plan, which it must be large enough for.
RoutingParams routing_for(RoutingParams memory, const RoutingPlan& plan, uint32_t num_ranks);

struct Handle : HandleFacts {
  Handle() = default;
  ~Handle();  // The memory is the pool's again: operations that use it hold the handle.
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;

  RoutingParams memory = {};
  uint64_t address = 0;  // of the block in the buffer's pool
};

}  // namespace deepep
