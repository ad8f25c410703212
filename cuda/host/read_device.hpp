// A look at device memory beside everything that runs.
//
// In: a few kilobytes of device memory. Out: their present content. Callers: a buffer, for what its kernels have counted.
#pragma once

#include <cstdint>

namespace deepep {

// Copies up to kMostRead bytes of the device's memory now, on a stream of its own and by a copy engine: kernels that spin do not
// hold it up. Some ten microseconds. False when nothing has come within a tenth of a second, or CUDA has failed. Neither rejects
// nor disturbs a capture.
constexpr uint64_t kMostRead = 64 * 1024;
bool read_device(int device, void* dst, const void* src, uint64_t bytes) noexcept;

}  // namespace deepep
