// The kernels, as host code sees them.
//
// In: a params struct, of which a launch fills in what follows from the rest, and a place. Out: one kernel enqueued, or the
// driver's error. Blocks of an operation stay on their multiprocessors until it ends and wait for each other, so a grid never
// exceeds what fits on the device beside the other ranks'. Every launch is graph-safe. Callers: cuda/host.
#pragma once

#include <cuda_runtime_api.h>

#include "../host/params.hpp"

namespace deepep {

// Loads every kernel of the present device and raises their shared-memory limits: a kernel that is loaded while another one
// spins is a deadlock. Call once a device, before any launch. Tells whether they may be launched early: see Place.
cudaError_t load_kernels(bool& launch_early);

// Where a kernel is enqueued. `early`: the device may place its blocks as soon as those of the kernel before it have gone, and
// not only when all that they wrote is seen; the kernel waits for that itself (await_kernel_before), when it was compiled for
// sm_90 or later. Not in a capture: a graph orders such kernels by a slower way.
struct Place {
  cudaStream_t stream;
  bool early;
};

cudaError_t launch_dispatch(DispatchParams& params, Place place);
cudaError_t launch_combine(CombineParams& params, Place place);
// Low latency: the send half of a dispatch, or both halves; its receive half alone; a combine, by halves or whole; the end of a
// combine that nobody will receive.
cudaError_t launch_low_latency_dispatch(LowLatencyDispatchParams& params, Place place);
cudaError_t launch_low_latency_receive(LowLatencyReceiveParams params, Place place);
cudaError_t launch_low_latency_combine(LowLatencyCombineParams& params, Place place);
cudaError_t launch_low_latency_give_up(LowLatencyReceiveParams params, Place place);
cudaError_t launch_message(MessageParams params, Place place);
cudaError_t launch_readers(ReadersParams params, Place place);
cudaError_t launch_layout(LayoutParams params, int32_t num_sms, Place place);
cudaError_t launch_update(UpdateParams params, cudaStream_t stream);
// Copies `bytes`, a multiple of 16, with one block of the copy kernel on each of num_sms multiprocessors: the ceiling that
// other figures are held against.
cudaError_t launch_copy(void* dst, const void* src, uint64_t bytes, int32_t num_sms, cudaStream_t stream);

}  // namespace deepep
