// Memory of the emulated device.
//
// In: sizes. Out: memory full of garbage, that ends where no access is allowed; what is freed is not there any more. So who
// reads what nobody has written, writes beyond an end, or uses what was freed, fails. There are EMULATED_MEMORY_MB (8192).

#include <sys/mman.h>

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <mutex>

#include "races.hpp"
#include "runtime.hpp"

namespace emulator {
namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kAlignment = 256;  // CUDA's
constexpr int kGarbage = 0xa5;
constexpr uint64_t kSpaceBytes = uint64_t{1} << 40;  // addresses, which are used again late

struct Mapped {
  void* begin;
  uint64_t bytes;
};

struct Memory {
  std::mutex mutex;
  std::map<void*, Mapped> blocks;
  uint64_t used_bytes = 0;
  uint64_t next = 0;  // where there is room, from the beginning of all addresses
};

Memory& memory() {
  static Memory* const leaked = new Memory;
  return *leaked;
}

uint64_t total_bytes() { return setting("EMULATED_MEMORY_MB", 8192) << 20; }

// Addresses for `bytes` that are not in use.
uint8_t* find_room(Memory& all, uint64_t bytes) {
  auto* const space = reinterpret_cast<uint8_t*>(device_memory().begin);
  for (;;) {
    if (all.next + bytes > kSpaceBytes) all.next = 0;
    uint8_t* const begin = space + all.next;
    all.next += bytes;
    const auto after = all.blocks.lower_bound(begin);
    if (after != all.blocks.end() && static_cast<uint8_t*>(after->second.begin) < begin + bytes) continue;
    if (after == all.blocks.begin()) return begin;
    const Mapped& before = std::prev(after)->second;
    if (static_cast<uint8_t*>(before.begin) + before.bytes + kPage <= begin) return begin;
  }
}

cudaError_t allocate(void** out, uint64_t bytes) {
  const uint64_t aligned = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const uint64_t pages = (aligned + kPage - 1) / kPage * kPage;
  Memory& all = memory();
  const std::lock_guard lock(all.mutex);
  if (bytes > total_bytes() || all.used_bytes + pages > total_bytes()) return fail(cudaErrorMemoryAllocation);
  uint8_t* const begin = find_room(all, pages + kPage);
  if (mprotect(begin, pages, PROT_READ | PROT_WRITE) != 0) return fail(cudaErrorMemoryAllocation);
  *out = begin + (pages - aligned);
  memset(begin, kGarbage, pages);
  all.blocks[*out] = {begin, pages};
  all.used_bytes += pages;
  return cudaSuccess;
}

cudaError_t release(void* address) {
  if (!address) return cudaSuccess;
  Memory& all = memory();
  const std::lock_guard lock(all.mutex);
  const auto found = all.blocks.find(address);
  if (found == all.blocks.end()) return fail(cudaErrorInvalidValue);
  // Nothing is there any more.
  mmap(found->second.begin, found->second.bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  forget_accesses({reinterpret_cast<uintptr_t>(found->second.begin), found->second.bytes});
  all.used_bytes -= found->second.bytes;
  all.blocks.erase(found);
  return cudaSuccess;
}

}  // namespace

Range device_memory() {
  static void* const space = mmap(nullptr, kSpaceBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (space == MAP_FAILED) {
    std::perror("emulated device: no addresses");
    std::abort();
  }
  return {reinterpret_cast<uintptr_t>(space), kSpaceBytes};
}

}  // namespace emulator

cudaError_t cudaMalloc(void** memory, size_t bytes) { return emulator::allocate(memory, bytes); }

cudaError_t cudaFree(void* memory) {
  emulator::wait_for_device();
  return emulator::release(memory);
}

cudaError_t cudaHostAlloc(void** memory, size_t bytes, unsigned) { return emulator::allocate(memory, bytes); }

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  emulator::Memory& all = emulator::memory();
  const std::lock_guard lock(all.mutex);
  *total_bytes = emulator::total_bytes();
  *free_bytes = *total_bytes - all.used_bytes;
  return cudaSuccess;
}

cudaError_t cudaMemPoolCreate(cudaMemPool_t* pool, const cudaMemPoolProps*) {
  static char only;
  *pool = reinterpret_cast<cudaMemPool_t>(&only);
  return cudaSuccess;
}

cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }

cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) { return cudaSuccess; }

cudaError_t cudaMallocFromPoolAsync(void** memory, size_t bytes, cudaMemPool_t, cudaStream_t) {
  return emulator::allocate(memory, bytes);
}

cudaError_t cudaFreeAsync(void* memory, cudaStream_t stream) {
  return emulator::enqueue(stream, [memory] { emulator::release(memory); });
}

cudaError_t cudaMemcpyAsync(void* dst, const void* src, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  return emulator::enqueue(stream, [=] { memcpy(dst, src, bytes); });
}

cudaError_t cudaMemsetAsync(void* dst, int value, size_t bytes, cudaStream_t stream) {
  return emulator::enqueue(stream, [=] { memset(dst, value, bytes); });
}
