// A look at device memory; see read_device.hpp.

#include "read_device.hpp"

#include <cuda_runtime_api.h>

#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>

#include "device.hpp"
#include "memory.hpp"

namespace deepep {
namespace {

constexpr auto kPatience = std::chrono::milliseconds(100);

// Of a device: one stream for all buffers, since streams beyond the device's connections wait for each other.
struct Glass {
  std::mutex mutex;
  cudaStream_t stream = nullptr;
  void* landing = nullptr;  // pinned; a copy that comes too late lands here and nowhere else
};

Glass& glass_of(int device) {
  static std::mutex* const mutex = new std::mutex;
  static auto* const glasses = new std::map<int, std::unique_ptr<Glass>>;
  const std::lock_guard lock(*mutex);
  auto& glass = (*glasses)[device];
  if (glass) return *glass;
  auto made = std::make_unique<Glass>();
  made->landing = pinned_memory()->take(kMostRead);
  if (!made->landing) reject(DEEPEP_ERROR_OUT_OF_MEMORY, "there is no pinned memory");
  DEEPEP_CUDA("make a stream", cudaStreamCreateWithFlags(&made->stream, cudaStreamNonBlocking));
  glass = std::move(made);
  return *glass;
}

// Pairs with the copies before, which wait for nothing.
bool is_idle(cudaStream_t stream) {
  const auto end = std::chrono::steady_clock::now() + kPatience;
  for (;;) {
    const cudaError_t status = cudaStreamQuery(stream);
    if (status == cudaSuccess) return true;
    if (status != cudaErrorNotReady || std::chrono::steady_clock::now() >= end) return false;
  }
}

}  // namespace

bool read_device(int device, void* dst, const void* src, uint64_t bytes) noexcept {
  const Relaxed relaxed;
  try {
    use_device(device);
    Glass& glass = glass_of(device);
    const std::lock_guard lock(glass.mutex);
    const bool done = is_idle(glass.stream) &&
                      cudaMemcpyAsync(glass.landing, src, bytes, cudaMemcpyDeviceToHost, glass.stream) == cudaSuccess &&
                      is_idle(glass.stream);
    if (done) std::memcpy(dst, glass.landing, bytes);
    cudaGetLastError();
    return done;
  } catch (...) {
    return false;
  }
}

}  // namespace deepep
