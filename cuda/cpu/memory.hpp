// Memory of deepep_alloc: aligned to 256, committed when touched, kept for reuse after it was freed.
//
// In: sizes. Out: addresses that only this pool takes back, so a wrong address is an error and not a crash. Freed blocks are
// kept up to a limit, because output tensors of one size come and go with every call and fresh pages cost more than the copy.
// One pool a buffer; the buffer's destroy frees what users left. Both kinds of memory are plain host memory here.
#pragma once

#include <cstdint>
#include <map>
#include <mutex>
#include <unordered_map>

namespace deepep {

class MemoryPool {
 public:
  MemoryPool() = default;
  ~MemoryPool();
  MemoryPool(const MemoryPool&) = delete;
  MemoryPool& operator=(const MemoryPool&) = delete;

  // Rejects with INVALID_ARGUMENT (0 bytes) or OUT_OF_MEMORY.
  void* allocate(uint64_t bytes);
  // First half of a free: the address is no longer the caller's, so that a second free is rejected at once.
  void disown(uint64_t address);
  // Second half, in stream order: the memory may be handed out again.
  void recycle(uint64_t address);

 private:
  struct Block {
    uint64_t bytes;
    bool owned;
  };
  std::mutex mutex_;
  std::unordered_map<uint64_t, Block> blocks_;      // every block that was handed out and not recycled
  std::multimap<uint64_t, void*> cache_;            // recycled blocks by size
  uint64_t cached_bytes_ = 0;
};

}  // namespace deepep
