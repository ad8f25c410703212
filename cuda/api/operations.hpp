// The operations of the CPU backend, as the API layer calls them.
//
// In: a buffer and the args struct of the ABI, whose size, reserved fields and flag bits have been checked. Out: the [out]
// fields, and work enqueued on the communication stream. Each rejects by throwing (failure.hpp) before it has enqueued
// anything. The API layer holds Buffer::mutex during each call: do not lock it here, only in the work that runs later.
#pragma once

#include <cstdint>

#include "../abi/deepep.h"
#include "buffer.hpp"

namespace deepep {

void get_dispatch_layout(Buffer& buffer, const deepep_dispatch_layout_args& args);
void dispatch(Buffer& buffer, deepep_dispatch_args& args);
void combine(Buffer& buffer, const deepep_combine_args& args);
void low_latency_dispatch(Buffer& buffer, deepep_low_latency_dispatch_args& args);
void low_latency_dispatch_receive(Buffer& buffer, const deepep_receive_args& args);
void low_latency_combine(Buffer& buffer, const deepep_low_latency_combine_args& args);
void low_latency_combine_receive(Buffer& buffer, const deepep_receive_args& args);
void expert_output(Buffer& buffer, deepep_expert_output_args& args);
// A slot is released: a low-latency combine in it whose receive half never came says that it will read nothing.
void give_up_pending_combine(Buffer& buffer, int32_t slot);
void barrier(Buffer& buffer, const deepep_barrier_args& args);
void refuse_call(Buffer& buffer, const deepep_refuse_args& args);

// Handles are published in the registry under Kind::handle (registry.hpp) and keep a weak_ptr to their buffer.
void handle_create(Buffer& buffer, deepep_handle_create_args& args);
// Rejects a handle that was destroyed or never existed. Called without a lock: the handle may outlive its buffer.
void handle_destroy(uint64_t handle);

}  // namespace deepep
