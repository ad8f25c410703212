// Launches: see grid.hpp.

#include "grid.hpp"

#include <atomic>
#include <chrono>
#include <map>
#include <memory>
#include <mutex>
#include <thread>

#include "runtime.hpp"
#include "threads.hpp"

namespace emulator {
namespace {

constexpr uint32_t kSharedUnasked = 48 * 1024;  // dynamic shared memory of a kernel that was not given leave for more

struct Kernels {
  std::mutex mutex;
  std::map<const void*, uint32_t> most_shared;
};

Kernels& kernels() {
  static Kernels* const leaked = new Kernels;
  return *leaked;
}

void run(const Grid& grid) {
  const uint32_t count = grid.blocks.x;
  const auto left = std::make_shared<std::atomic<uint32_t>>(count - 1);
  for (uint32_t i = 1; i < count; ++i) {
    run_elsewhere([&grid, i, left] {
      std::this_thread::sleep_for(std::chrono::milliseconds(setting("EMULATED_LATE_MS", 0)));
      Block::run(grid, {i, 0, 0});
      if (left->fetch_sub(1) == 1) left->notify_one();
    });
  }
  Block::run(grid, {0, 0, 0});
  for (uint32_t now = left->load(); now != 0; now = left->load()) left->wait(now);
}

}  // namespace

cudaError_t launch(const void* kernel, Grid grid, cudaStream_t stream) {
  const uint64_t threads = uint64_t{grid.threads.x} * grid.threads.y * grid.threads.z;
  if (grid.blocks.x == 0 || grid.blocks.y != 1 || grid.blocks.z != 1 || threads == 0 || threads > kMostThreads) {
    return fail(cudaErrorInvalidConfiguration);
  }
  {
    Kernels& all = kernels();
    const std::lock_guard lock(all.mutex);
    const auto found = all.most_shared.find(kernel);
    const uint32_t most = found == all.most_shared.end() ? kSharedUnasked : found->second;
    if (grid.shared_bytes > most) return fail(cudaErrorInvalidValue);
  }
  return enqueue(stream, [grid = std::move(grid)] { run(grid); });
}

}  // namespace emulator

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  if (emulator::setting("EMULATED_COMPUTE_CAPABILITY", 90) < 80) return emulator::fail(cudaErrorNoKernelImageForDevice);
  attributes->sharedSizeBytes = emulator::kReservedShared;
  attributes->ptxVersion = attributes->binaryVersion = 90;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int value) {
  if (value < 0 || static_cast<uint32_t>(value) > emulator::kMostShared - emulator::kReservedShared) {
    return emulator::fail(cudaErrorInvalidValue);
  }
  emulator::Kernels& all = emulator::kernels();
  const std::lock_guard lock(all.mutex);
  all.most_shared[kernel] = static_cast<uint32_t>(value);
  return cudaSuccess;
}
