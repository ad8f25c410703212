// Launches: the blocks of a kernel run at once, each on a thread of the operating system.
//
// In: a kernel and its grid. Out: work on a stream, or an error as CUDA would give it. Callers: language.hpp, for the kernels'
// launches.
#pragma once

#include "block.hpp"

namespace emulator {

cudaError_t launch(const void* kernel, Grid grid, cudaStream_t stream);

}  // namespace emulator
