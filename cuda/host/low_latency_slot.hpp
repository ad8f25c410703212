// What a slot remembers on the host of a low-latency dispatch, and its memory on the device.
//
// In: calls that were enqueued; a buffer's options. Out: what later halves are held against, and the LowLatencyRouting that
// kernels fill and read. Where tokens go is on the device only, so that replays need nothing of the host. Callers:
// low_latency.cpp; the creation of a buffer, for the memory.
#pragma once

#include <cstdint>

#include "../api/low_latency.hpp"
#include "params.hpp"
#include "stream.hpp"

namespace deepep {

struct LowLatencySlot : LowLatencyFacts {
  CaptureId dispatch_capture = 0;              // that the dispatch is part of; 0 = none
  CaptureId combine_capture = 0;               // the same of the combine of combine_epoch
  deepep_low_latency_combine_args combine = {};  // its args
};

// Memory for what a slot remembers, cut from `base`; with a base of nullptr only the sizes are right. `bytes` becomes what it
// takes: nothing without low-latency mode. Must be zeros at first.
LowLatencyRouting cut_low_latency_routing(uint8_t* base, const Options& options, uint64_t& bytes);

}  // namespace deepep
