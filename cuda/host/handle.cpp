// Routing handles: see handle.hpp.

#include "handle.hpp"

#include <atomic>

#include "buffer.hpp"

namespace deepep {

RoutingParams cut_routing(uint8_t* base, const Options& options, uint32_t num_tokens, uint32_t num_topk, uint64_t& bytes) {
  const uint64_t ranks = options.num_ranks;
  const uint64_t most_hops = larger(num_topk, ranks);  // without topk_idx a token can go to every rank
  uint64_t at = 0;
  const auto cut = [&](uint64_t size) {
    uint8_t* const part = base + at;
    at = align_up(at + size, kRegionAlignment);
    return part;
  };
  RoutingParams routing = {};
  routing.header = reinterpret_cast<RoutingHeader*>(cut(sizeof(RoutingHeader)));
  routing.hops = reinterpret_cast<DeviceHop*>(cut(num_tokens * most_hops * sizeof(DeviceHop)));
  routing.experts = reinterpret_cast<int32_t*>(cut(uint64_t{num_tokens} * num_topk * sizeof(int32_t)));
  routing.tokens = reinterpret_cast<uint32_t*>(cut(ranks * ranks * sizeof(uint32_t)));
  routing.entries = reinterpret_cast<uint32_t*>(cut(ranks * options.num_experts * sizeof(uint32_t)));
  bytes = at;
  return routing;
}

RoutingParams routing_for(RoutingParams memory, const RoutingPlan& plan, uint32_t num_ranks) {
  memory.layout = static_cast<uint32_t>(plan.space);
  memory.expert_alignment = plan.expert_alignment;
  memory.num_tokens = plan.num_tokens;
  memory.num_topk = plan.num_topk;
  memory.topk_idx_bytes = plan.topk_idx_bytes;
  memory.width = plan.width(num_ranks);
  return memory;
}

// Nothing need be cleared: what the memory holds counts only under the name of this handle.
void prepare_handle(Buffer& buffer, Handle& handle) {
  uint64_t bytes = 0;
  cut_routing(nullptr, buffer.options, handle.max_tokens, handle.max_topk, bytes);
  auto* const base = static_cast<uint8_t*>(buffer.device_pool->allocate_own(bytes));
  handle.address = reinterpret_cast<uint64_t>(base);
  handle.memory = cut_routing(base, buffer.options, handle.max_tokens, handle.max_topk, bytes);
  static std::atomic<uint32_t> names{1};
  do handle.memory.name = ++names;
  while (handle.memory.name == 0);
}

Handle::~Handle() {
  if (address == 0) return;
  if (const auto owner = buffer.lock()) owner->device_pool->recycle(address);
}

}  // namespace deepep
