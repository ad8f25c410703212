// CUDA itself: is it there, and the devices that it has.
//
// In: a device index. Out: a Device that is set up, or an error that says what is missing and what to do. Also here: how a CUDA
// call is checked, and how a thread selects its device. Callers: everything else in this folder, before its first CUDA call.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <string>

#include "../common/failure.hpp"
#include "../common/plan.hpp"

namespace deepep {

// Ends an API call because a CUDA call did not work: `doing` completes "CUDA could not …". OUT_OF_MEMORY keeps its code.
[[noreturn]] void reject_cuda(cudaError_t error, const char* doing);

// The one macro: checks a CUDA call.
#define DEEPEP_CUDA(doing, call)                                                               \
  do {                                                                                         \
    if (const cudaError_t deepep_error_ = (call); deepep_error_ != cudaSuccess) [[unlikely]] { \
      ::deepep::reject_cuda(deepep_error_, doing);                                             \
    }                                                                                          \
  } while (0)

// Lets the thread make calls that a capture on any stream would forbid it (queries, allocations): none of ours touches a
// stream that is captured.
class Relaxed {
 public:
  Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~Relaxed() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  Relaxed(const Relaxed&) = delete;
  Relaxed& operator=(const Relaxed&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

// Facts about a device. They do not change.
struct Device {
  int index = 0;
  std::string name;
  char uuid[16] = {};
  int32_t num_sms = 0;
  int32_t compute_capability = 0;  // 10 * major + minor
  uint32_t shared_bytes = 0;       // a block can have
  bool mps = false;                // processes share it through CUDA MPS
  bool launches_early = false;     // its kernels can wait for the one before themselves; once prepared

  Topology topology(uint32_t ranks) const { return {num_sms, ranks, compute_capability, shared_bytes}; }
};

// Devices and driver, as far as there are any: rejects with SYSTEM and words when there is no driver, none that is new enough,
// or no GPU.
int num_devices();
int driver_version();  // 1000 * major + 10 * minor
// Rejects an index that does not exist. Does not touch the device's context.
const Device& find_device(uint64_t index);
// The same, with every kernel loaded there: before the first buffer of a device. Rejects with UNSUPPORTED when the library
// has no code for it.
const Device& prepare_device(uint64_t index);

// Selects the device for the calling thread, once.
void use_device(int index);

// "GPU 0 (NVIDIA H100 80GB HBM3)", for messages.
std::string device_name(const Device& device);

}  // namespace deepep
