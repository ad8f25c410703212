// The expert-output region of a slot: who reads it, and when it may be written again.
//
// In: combines, which begin and end reading. Out: a wait until every reader of the slot's last combine is gone. Callers:
// combine and low-latency combine before they copy in, and deepep_expert_output before the user writes. On the communication
// stream.
#pragma once

#include <cstdint>

#include "buffer.hpp"
#include "wait.hpp"

namespace deepep {

// Waits until no rank reads the region of this rank's slot any more. False when the operation has failed.
bool wait_for_readers(Operation& op, uint32_t slot, PeerWait& wait);

// From now on the slot's region belongs to the readers of this operation: `ranks`, but for those that are masked.
void begin_reading(Operation& op, uint32_t slot, uint64_t ranks);

// The operation has failed on all ranks before any has read: the region has no readers after all.
void forget_readers(Operation& op, uint32_t slot);

// This rank has read all it wants from `slot` of `rank` in this operation.
void end_reading(Operation& op, uint32_t rank, uint32_t slot);

// This rank reads nothing any more of any combine up to `epoch`: a failure has ended by a mask. On the communication stream.
void end_all_reading(Buffer& buffer, uint64_t epoch);

}  // namespace deepep
