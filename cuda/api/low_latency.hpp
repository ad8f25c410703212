// Low-latency mode as the host sees it: what is checked, where outputs lie, and what a slot knows between the halves of calls.
//
// In: args structs of the ABI, with Buffer::mutex held. Out: [out] fields, facts in the slot, and work that the backend
// enqueues. The operations themselves (operations.hpp) are here for both backends; what they enqueue is the backend's.
#pragma once

#include <cstdint>
#include <memory>

#include "../abi/deepep.h"
#include "checks.hpp"
#include "routing_plan.hpp"

namespace deepep {

class Buffer;
struct LowLatencySlot;

// Where the tensors of a low-latency slot lie, on any rank, and how their rows follow each other.
struct LowLatencyLayout {
  uint32_t max_rows = 0;       // of an expert
  uint32_t row_bytes = 0;      // as received: e4m3 with FLAG_FP8
  ScaleCopy scales;            // elements as received; from the caller's or from the cast's
  uint64_t expert_stride = 0;  // of scales, bytes
};

// What both backends know of a slot that a low-latency dispatch holds: LowLatencySlot derives from it, and Slot::state is one.
struct LowLatencyFacts {
  RoutingPlan plan;
  LowLatencyLayout layout;
  uint64_t wait_stats = 0;      // the caller's, for both halves of the dispatch
  uint64_t dispatch_epoch = 0;  // of the dispatch
  bool received = false;        // its receive half was enqueued, or it had none
  uint64_t combine_epoch = 0;   // of a combine whose receive half is still to come; 0 = none
  uint64_t combine_generation = 0;  // the buffer's then: in another one it is given up, see protocol.hpp, Failures
};

// Rejects when the slot's region is still to be read by the receive half of a combine, and when the slot is not held.
void check_no_pending_combine(Buffer& buffer, int32_t slot);

// A slot is about to be released: a combine in it whose receive half never came says that it will read nothing.
void give_up_pending_combine(Buffer& buffer, int32_t slot);

// Of the backend: enqueue a call, or a half of one. Those with an epoch return it.
uint64_t enqueue_dispatch(Buffer& buffer, const deepep_low_latency_dispatch_args& args,
                          const std::shared_ptr<LowLatencySlot>& slot);
void enqueue_dispatch_receive(Buffer& buffer, const deepep_receive_args& args, const std::shared_ptr<LowLatencySlot>& slot);
uint64_t enqueue_combine(Buffer& buffer, const deepep_low_latency_combine_args& args,
                         const std::shared_ptr<LowLatencySlot>& slot);
void enqueue_combine_receive(Buffer& buffer, const deepep_receive_args& args, const std::shared_ptr<LowLatencySlot>& slot);
// Instead of the receive half of the combine in slot number `index`.
void enqueue_combine_give_up(Buffer& buffer, int32_t index, const std::shared_ptr<LowLatencySlot>& slot);

}  // namespace deepep
