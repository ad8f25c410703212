// What a backend does, as the API layer calls it. Each backend has these functions; all but the handles' are its own.
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
// Frees the slot after the present work of args.stream, if there is one. A low-latency combine in it whose receive half never
// came says that it will read nothing.
void release_slot(Buffer& buffer, const deepep_slot_release_args& args);
void barrier(Buffer& buffer, const deepep_barrier_args& args);
void refuse_call(Buffer& buffer, const deepep_refuse_args& args);

// Graphs. Beginning and ending a recording are calls of a buffer like the others; the other two find their graph first.
void graph_begin(Buffer& buffer, deepep_graph_args& args);
void graph_end(Buffer& buffer, deepep_graph_args& args);
void graph_launch(uint64_t graph, deepep_graph_args& args);
void graph_destroy(uint64_t graph);

// The device. Called without a lock; `buffer` may be nullptr. The args' size and reserved fields have been checked.
void fill_capabilities(uint64_t device, deepep_capabilities& out);
void get_peer_access(uint64_t device, deepep_peer_access_args& args);
void measure_copy(uint64_t device, deepep_measure_copy_args& args);
void plan_operation(Buffer* buffer, deepep_plan_args& args);
// DEEPEP_BACKEND_*.
int32_t backend();
// Rejects a device index that this backend does not have.
void check_device(uint64_t device);

// Handles are published in the registry under Kind::handle (registry.hpp) and keep a weak_ptr to their buffer.
void handle_create(Buffer& buffer, deepep_handle_create_args& args);
// Rejects a handle that was destroyed or never existed. Called without a lock: the handle may outlive its buffer.
void handle_destroy(uint64_t handle);

}  // namespace deepep
