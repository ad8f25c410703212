// Routing handles: what both backends know of one, and how it is found by its number.
//
// In: deepep_handle_create_args, and numbers. Out: the backend's Handle, which derives from HandleFacts and adds the routing.
// A handle outlives neither its use by enqueued work, which holds it, nor needs its buffer to be destroyed.
#pragma once

#include <cstdint>
#include <memory>

#include "../abi/deepep.h"
#include "routing_plan.hpp"

namespace deepep {

class Buffer;
struct Handle;

struct HandleFacts {
  std::weak_ptr<Buffer> buffer;
  uint32_t max_tokens = 0;
  uint32_t max_topk = 0;
  RoutingPlan plan;  // of the dispatch enqueued last; under Buffer::mutex
};

// The handle, which must belong to the buffer. Rejects otherwise.
std::shared_ptr<Handle> find_handle(Buffer& buffer, uint64_t id);

// Of the backend: gives a new handle the memory it needs for max_tokens of max_topk. Rejects when there is none.
void prepare_handle(Buffer& buffer, Handle& handle);

}  // namespace deepep
