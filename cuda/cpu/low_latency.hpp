// What a slot remembers of a low-latency dispatch: its routing, its payload, and which halves are still to come.
//
// In: the dispatch fills it. Out: the receive half and the combine find their rows by it. It hangs on Slot::state; work that
// was enqueued keeps it alive. Callers: low_latency_dispatch.cpp, low_latency_combine.cpp.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "buffer.hpp"
#include "handle.hpp"
#include "payload.hpp"
#include "pushed.hpp"
#include "scales.hpp"

namespace deepep {

// Where the tensors of a low-latency slot lie, on any rank, and how their rows follow each other.
struct LowLatencyLayout {
  uint32_t max_rows = 0;     // of an expert
  uint32_t row_bytes = 0;    // as received: e4m3 with FLAG_FP8
  ScaleCopy scales;            // elements as received; from the caller's or from the cast's
  uint64_t expert_stride = 0;  // of scales, bytes
};

struct LowLatencyState {
  // Written when a call is enqueued; under Buffer::mutex.
  uint64_t dispatch_epoch = 0;
  RoutingPlan plan;
  bool received = false;          // the dispatch's receive half was enqueued, or it had none
  uint64_t combine_epoch = 0;     // of a combine whose receive half is still to come; 0 = none
  std::shared_ptr<void> combine;  // that combine
  int64_t* wait_stats = nullptr;  // the caller's, for both halves of the dispatch

  // Written by the dispatch; on the communication stream.
  LowLatencyLayout layout;
  Routing routing;
  PeerSlots slots{};  // that the ranks used: rows are there, and expert outputs will be
  Failure failure;    // of the send half, when every rank has found it alike
};

// The state of a slot that a low-latency dispatch holds; rejects otherwise. The caller holds Buffer::mutex.
std::shared_ptr<LowLatencyState> low_latency_state(Buffer& buffer, int32_t slot);

// Rejects when the slot's region is still to be read by the receive half of a combine. The caller holds Buffer::mutex.
void check_no_pending_combine(Buffer& buffer, int32_t slot);

// Row of an expert's region among all rows of the rank that owns the expert.
inline uint64_t region_row(const Buffer& buffer, uint32_t local_expert, uint64_t row) {
  return uint64_t{local_expert} * buffer.regions.low_latency_rows + row;
}

}  // namespace deepep
