// Device and pinned memory: see memory.hpp.

#include "memory.hpp"

#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include "../common/regions.hpp"
#include "device.hpp"

namespace deepep {
namespace {

constexpr uint64_t kUnit = uint64_t{2} << 20;
constexpr uint64_t kChunk = uint64_t{16} << 20;

// What was given up and not freed yet.
struct Kept {
  int device;
  uint8_t* data;
  uint64_t bytes;
  bool reusable;
  bool is_mapping;  // of another process's block
};

struct Store {
  std::mutex mutex;
  std::vector<Kept> kept;
  uint64_t num_buffers = 0;
  std::map<std::string, std::weak_ptr<IpcMapping>> mappings;  // by device and handle
};

Store& store() {
  static Store* const leaked = new Store;
  return *leaked;
}

// Call with the store locked. Waits for the kernels of the devices.
void empty(Store& all) {
  const Relaxed relaxed;
  int before = 0;
  const bool restore = cudaGetDevice(&before) == cudaSuccess;
  for (const Kept& kept : all.kept) {
    if (cudaSetDevice(kept.device) != cudaSuccess) continue;
    if (kept.is_mapping)
      cudaIpcCloseMemHandle(kept.data);
    else
      cudaFree(kept.data);
  }
  all.kept.clear();
  if (restore) cudaSetDevice(before);
  cudaGetLastError();
}

void keep(const Kept& kept) noexcept {
  Store& all = store();
  const std::lock_guard lock(all.mutex);
  try {
    all.kept.push_back(kept);
  } catch (...) {
    // Lost until the process ends: better than a wait here.
  }
}

uint8_t* reuse(int device, uint64_t bytes) {
  Store& all = store();
  const std::lock_guard lock(all.mutex);
  for (size_t i = 0; i < all.kept.size(); ++i) {
    const Kept& kept = all.kept[i];
    if (!kept.reusable || kept.device != device || kept.bytes != bytes) continue;
    uint8_t* const data = kept.data;
    all.kept.erase(all.kept.begin() + static_cast<std::ptrdiff_t>(i));
    return data;
  }
  return nullptr;
}

// nullptr when there is no memory.
uint8_t* malloc_device(int device, uint64_t bytes) {
  use_device(device);
  const Relaxed relaxed;
  void* data = nullptr;
  for (int attempt = 0; attempt < 2; ++attempt) {
    const cudaError_t error = cudaMalloc(&data, bytes);
    if (error == cudaSuccess) return static_cast<uint8_t*>(data);
    if (error != cudaErrorMemoryAllocation) reject_cuda(error, "allocate memory");
    cudaGetLastError();
    // What was kept may be what is missing; this waits for running kernels, but the alternative is to fail.
    Store& all = store();
    const std::lock_guard lock(all.mutex);
    empty(all);
  }
  return nullptr;
}

// ---- deepep_alloc

// The pool of a device, and the stream in whose order it lives: nobody else uses that stream, so to wait for it is to wait for
// allocations only.
struct Heap {
  std::mutex mutex;
  cudaMemPool_t pool = nullptr;
  cudaStream_t stream = nullptr;
  std::set<int> reached_from;
};

Heap& heap_of(int device) {
  static std::mutex* const mutex = new std::mutex;
  static auto* const heaps = new std::map<int, std::unique_ptr<Heap>>;
  const std::lock_guard lock(*mutex);
  auto& heap = (*heaps)[device];
  if (heap) return *heap;
  use_device(device);
  const Relaxed relaxed;
  auto made = std::make_unique<Heap>();
  int supported = 0;
  cudaDeviceGetAttribute(&supported, cudaDevAttrMemoryPoolsSupported, device);
  if (supported) {
    cudaMemPoolProps properties = {};
    properties.allocType = cudaMemAllocationTypePinned;
    properties.location.type = cudaMemLocationTypeDevice;
    properties.location.id = device;
    DEEPEP_CUDA("make a memory pool", cudaMemPoolCreate(&made->pool, &properties));
    uint64_t threshold = UINT64_MAX;
    DEEPEP_CUDA("set up a memory pool", cudaMemPoolSetAttribute(made->pool, cudaMemPoolAttrReleaseThreshold, &threshold));
    DEEPEP_CUDA("make a stream", cudaStreamCreateWithFlags(&made->stream, cudaStreamNonBlocking));
  }
  heap = std::move(made);
  return *heap;
}

class DeviceSource : public BlockSource {
 public:
  explicit DeviceSource(int device) : device_(device), heap_(heap_of(device)) {}

  uint64_t block_bytes(uint64_t bytes) const override { return align_up(bytes, bytes >= kUnit / 2 ? kUnit : 512); }

  void* take(uint64_t bytes) override {
    if (!heap_.pool) {
      uint8_t* const kept = reuse(device_, bytes);
      return kept ? kept : malloc_device(device_, bytes);
    }
    use_device(device_);
    const Relaxed relaxed;
    void* block = nullptr;
    const std::lock_guard lock(heap_.mutex);
    const cudaError_t error = cudaMallocFromPoolAsync(&block, bytes, heap_.pool, heap_.stream);
    if (error == cudaErrorMemoryAllocation) {
      cudaGetLastError();
      return nullptr;
    }
    DEEPEP_CUDA("allocate memory", error);
    // Pairs with nothing but the allocation, and frees of blocks that nobody uses any more.
    DEEPEP_CUDA("allocate memory", cudaStreamSynchronize(heap_.stream));
    return block;
  }

  void give(void* block, uint64_t bytes) noexcept override {
    if (!heap_.pool) return keep({device_, static_cast<uint8_t*>(block), bytes, true, false});
    cudaSetDevice(device_);  // This thread may have none yet, and would set up the first for nothing.
    const Relaxed relaxed;
    const std::lock_guard lock(heap_.mutex);
    if (cudaFreeAsync(block, heap_.stream) != cudaSuccess) cudaGetLastError();
  }

 private:
  int device_;
  Heap& heap_;
};

struct Pinned {
  std::mutex mutex;
  uint8_t* at = nullptr;  // the rest of the newest chunk
  uint64_t left = 0;
  std::multimap<uint64_t, void*> free;
};

Pinned& pinned() {
  static Pinned* const leaked = new Pinned;
  return *leaked;
}

// Call with `all` locked; false when there is no memory.
bool add_chunk(Pinned& all, uint64_t bytes) {
  const Relaxed relaxed;
  void* chunk = nullptr;
  const cudaError_t error = cudaHostAlloc(&chunk, bytes, cudaHostAllocPortable | cudaHostAllocMapped);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();
    return false;
  }
  DEEPEP_CUDA("allocate pinned memory", error);
  memset(chunk, 0, bytes);  // Commits the pages now.
  all.at = static_cast<uint8_t*>(chunk);
  all.left = bytes;
  return true;
}

class PinnedSource : public BlockSource {
 public:
  uint64_t block_bytes(uint64_t bytes) const override {
    return align_up(bytes, bytes >= kUnit / 2 ? kUnit : bytes > 4096 ? 4096 : 256);
  }

  void* take(uint64_t bytes) override {
    Pinned& all = pinned();
    const std::lock_guard lock(all.mutex);
    if (const auto found = all.free.find(bytes); found != all.free.end()) {
      void* const block = found->second;
      all.free.erase(found);
      return block;
    }
    if (all.left < bytes && !add_chunk(all, bytes > kChunk ? bytes : kChunk)) return nullptr;
    void* const block = all.at;
    all.at += bytes;
    all.left -= bytes;
    return block;
  }

  void give(void* block, uint64_t bytes) noexcept override {
    Pinned& all = pinned();
    const std::lock_guard lock(all.mutex);
    try {
      all.free.emplace(bytes, block);
    } catch (...) {
      // Lost until the process ends.
    }
  }
};

}  // namespace

std::shared_ptr<DeviceBlock> DeviceBlock::allocate(int device, uint64_t bytes, const char* what) {
  const uint64_t size = align_up(bytes ? bytes : 1, kUnit);
  uint8_t* data = reuse(device, size);
  if (!data) data = malloc_device(device, size);
  if (!data) {
    size_t free_bytes = 0, total_bytes = 0;
    cudaMemGetInfo(&free_bytes, &total_bytes);
    reject(DEEPEP_ERROR_OUT_OF_MEMORY, "the %llu bytes of its %s are not to be had on GPU %d: %zu of %zu are free",
           static_cast<unsigned long long>(size), what, device, free_bytes, total_bytes);
  }
  return std::shared_ptr<DeviceBlock>(new DeviceBlock(device, data, size));
}

DeviceBlock::~DeviceBlock() { keep({device_, data_, bytes_, reusable_, false}); }

std::shared_ptr<IpcMapping> IpcMapping::open(int device, const cudaIpcMemHandle_t& handle, uint32_t rank) {
  const std::string key = std::to_string(device) + ":" + std::string(handle.reserved, sizeof handle.reserved);
  Store& all = store();
  const std::lock_guard lock(all.mutex);
  if (auto mapping = all.mappings[key].lock()) return mapping;
  use_device(device);
  const Relaxed relaxed;
  void* data = nullptr;
  const cudaError_t error = cudaIpcOpenMemHandle(&data, handle, cudaIpcMemLazyEnablePeerAccess);
  if (error != cudaSuccess) {
    cudaGetLastError();
    reject(
        DEEPEP_ERROR_SYSTEM,
        "the memory of rank %u could not be mapped on GPU %d: %s (%s). Ranks in separate processes need CUDA IPC: one machine "
        "and one container, and GPUs that reach each other (deepep_get_peer_access)",
        rank, device, cudaGetErrorString(error), cudaGetErrorName(error));
  }
  std::shared_ptr<IpcMapping> mapping(new IpcMapping(device, static_cast<uint8_t*>(data)));
  all.mappings[key] = mapping;
  return mapping;
}

IpcMapping::~IpcMapping() { keep({device_, data_, 0, false, true}); }

LiveBuffer::LiveBuffer() {
  Store& all = store();
  const std::lock_guard lock(all.mutex);
  all.num_buffers += 1;
}

LiveBuffer::~LiveBuffer() {
  Store& all = store();
  const std::lock_guard lock(all.mutex);
  if (--all.num_buffers == 0) empty(all);
}

std::unique_ptr<BlockSource> device_memory(int device) { return std::make_unique<DeviceSource>(device); }

void reach_memory(int device, int other) {
  Heap& heap = heap_of(other);
  const std::lock_guard lock(heap.mutex);
  if (!heap.pool || heap.reached_from.contains(device)) return;
  cudaMemAccessDesc access = {};
  access.location.type = cudaMemLocationTypeDevice;
  access.location.id = device;
  access.flags = cudaMemAccessFlagsProtReadWrite;
  DEEPEP_CUDA("reach a memory pool", cudaMemPoolSetAccess(heap.pool, &access, 1));
  heap.reached_from.insert(device);
}

std::unique_ptr<BlockSource> pinned_memory() { return std::make_unique<PinnedSource>(); }

void reserve_pinned() {
  Pinned& all = pinned();
  const std::lock_guard lock(all.mutex);
  if (all.at != nullptr) return;
  if (!add_chunk(all, kChunk)) {
    reject(DEEPEP_ERROR_OUT_OF_MEMORY, "%llu bytes of pinned memory are not to be had",
           static_cast<unsigned long long>(kChunk));
  }
}

}  // namespace deepep
