// What a slot remembers of a low-latency dispatch: its routing, and the combine whose receive half is still to come.
//
// In: the dispatch fills it. Out: the receive half and the combine find their rows by it. It hangs on Slot::state; work that
// was enqueued keeps it alive. Callers: low_latency_dispatch.cpp, low_latency_combine.cpp.
#pragma once

#include <cstdint>
#include <memory>

#include "../api/low_latency.hpp"
#include "buffer.hpp"
#include "handle.hpp"
#include "pushed.hpp"

namespace deepep {

struct LowLatencyCombine;

struct LowLatencySlot : LowLatencyFacts {
  // Written when a call is enqueued; under Buffer::mutex.
  std::shared_ptr<LowLatencyCombine> combine;  // of combine_epoch

  // Written by the dispatch; on the communication stream.
  Routing routing;
  PeerSlots slots{};  // that the ranks used: rows are there, and expert outputs will be
  Failure failure;    // of the send half, when every rank has found it alike
};

// Row of an expert's region among all rows of the rank that owns the expert.
inline uint64_t region_row(const Buffer& buffer, uint32_t local_expert, uint64_t row) {
  return uint64_t{local_expert} * buffer.regions.low_latency_rows + row;
}

}  // namespace deepep
