// A dispatch at work: what runs on the communication stream once a call has been checked.
//
// In: a job, whose outputs are named. Out: rows, scales, top-k and source indices in a slot of every rank, counts, and the
// routing in the handle; or op.failure. Caller: dispatch.cpp.
#pragma once

#include <cstdint>
#include <memory>

#include "buffer.hpp"
#include "handle.hpp"

namespace deepep {

// One dispatch, from its checks to its end.
struct DispatchJob {
  deepep_dispatch_args args;
  RoutingPlan plan;
  std::shared_ptr<Handle> handle;  // nullptr = the routing is not kept
  bool cached = false;
  uint32_t slot = 0;
};

void run_dispatch(Operation& op, const DispatchJob& job);

}  // namespace deepep
