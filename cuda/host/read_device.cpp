// A look at device memory; see read_device.hpp.

#include "read_device.hpp"

#include <cuda_runtime_api.h>

#include <chrono>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

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

[[noreturn]] void reject_late() {
  reject(DEEPEP_ERROR_SYSTEM, "the device has not been read within %lld ms: other copies to the host hold it up",
         static_cast<long long>(kPatience.count()));
}

// Pairs with the copies before, which wait for nothing.
void await_idle(cudaStream_t stream, std::chrono::steady_clock::time_point deadline) {
  for (;;) {
    const cudaError_t status = cudaStreamQuery(stream);
    if (status == cudaSuccess) return;
    if (status != cudaErrorNotReady) reject_cuda(status, "read the device");
    cudaGetLastError();
    if (std::chrono::steady_clock::now() >= deadline) reject_late();
  }
}

}  // namespace

void prepare_reads(int device) { glass_of(device); }

void read_device(int device, void* dst, const void* src, uint64_t bytes) {
  use_device(device);
  const Relaxed relaxed;
  Glass& glass = glass_of(device);
  const auto deadline = std::chrono::steady_clock::now() + kPatience;
  // A mutex that is waited for until then would need a newer C library.
  std::unique_lock lock(glass.mutex, std::try_to_lock);
  while (!lock && std::chrono::steady_clock::now() < deadline) {
    std::this_thread::sleep_for(std::chrono::microseconds(20));
    lock.try_lock();
  }
  if (!lock) reject_late();
  await_idle(glass.stream, deadline);
  DEEPEP_CUDA("read the device", cudaMemcpyAsync(glass.landing, src, bytes, cudaMemcpyDeviceToHost, glass.stream));
  await_idle(glass.stream, deadline);
  std::memcpy(dst, glass.landing, bytes);
}

}  // namespace deepep
