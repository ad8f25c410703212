// What the parts of the emulated runtime tell each other.
//
// In: errors, work. Out: the thread's latest error, work in the order of its stream. Callers: the .cpp files of this folder.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>

namespace emulator {

// A part of the address space.
struct Range {
  uintptr_t begin;
  uintptr_t bytes;
};

// Where all memory of the device is, and the host's that it reaches.
Range device_memory();

// Keeps the error for cudaGetLastError, and answers it.
cudaError_t fail(cudaError_t error);

// A number in the environment.
uint64_t setting(const char* name, uint64_t otherwise);

// Puts work at the end of a stream; in a capture, a node of the graph.
cudaError_t enqueue(cudaStream_t stream, std::function<void()> work);

// Waits for everything on every stream, as cudaFree does.
void wait_for_device();

}  // namespace emulator
