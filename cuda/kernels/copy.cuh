// The copy kernel: what a number of multiprocessors can read and write at best, which other figures are held against.
#pragma once

#include "primitives.cuh"

namespace deepep {

constexpr uint32_t kCopyThreads = 1024;

// Copies `bytes`, a multiple of 16, between 16-byte aligned addresses. Any grid.
template <uint32_t kVectors>
__global__ void __launch_bounds__(kCopyThreads, 1) copy_kernel(uint8_t* dst, const uint8_t* src, uint64_t bytes) {
  const uint64_t step = uint64_t{gridDim.x} * kVectors * blockDim.x * 16;
  uint64_t at = (uint64_t{blockIdx.x} * kVectors * blockDim.x + threadIdx.x) * 16;
  for (; at < bytes; at += step) {
    uint4 values[kVectors];
#pragma unroll
    for (uint32_t v = 0; v < kVectors; ++v) {
      if (at + v * blockDim.x * 16 < bytes) values[v] = load_stream(src + at + v * blockDim.x * 16);
    }
#pragma unroll
    for (uint32_t v = 0; v < kVectors; ++v) {
      if (at + v * blockDim.x * 16 < bytes) store_stream(dst + at + v * blockDim.x * 16, values[v]);
    }
  }
}

}  // namespace deepep
