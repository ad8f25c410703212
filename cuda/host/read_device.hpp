// A look at device memory beside everything that runs.
//
// In: a few kilobytes of device memory. Out: their present content. Callers: a buffer, for what its kernels have counted.
#pragma once

#include <cstdint>

namespace deepep {

constexpr uint64_t kMostRead = 64 * 1024;

// Makes what a look needs, so that none has to allocate while kernels spin. Before the first buffer of a device.
void prepare_reads(int device);
// Copies up to kMostRead bytes of the device's memory now, on a stream of its own and by a copy engine: kernels that spin do
// not hold it up. Some ten microseconds. Rejects with SYSTEM when nothing has come within a tenth of a second, or CUDA has
// failed; `dst` is as it was then. Disturbs no capture.
void read_device(int device, void* dst, const void* src, uint64_t bytes);

}  // namespace deepep
