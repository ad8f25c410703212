// Memory of deepep_alloc: kept for reuse after it was freed.
//
// In: sizes. Out: addresses that only this pool takes back, so a wrong address is an error and not a crash. Freed blocks are
// kept up to a limit, because output tensors of one size come and go with every call and fresh memory costs more than the copy.
// A buffer has one for each kind of memory; the buffer's destroy frees what users left. Where blocks come from is the
// backend's: a BlockSource.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <unordered_map>

namespace deepep {

// Where blocks come from.
class BlockSource {
 public:
  virtual ~BlockSource() = default;
  // The size that is really taken for `bytes`: equal sizes can replace each other.
  virtual uint64_t block_bytes(uint64_t bytes) const = 0;
  // A block of such a size, aligned to 256; nullptr when there is no memory.
  virtual void* take(uint64_t bytes) = 0;
  virtual void give(void* block, uint64_t bytes) noexcept = 0;
};

class MemoryPool {
 public:
  explicit MemoryPool(std::unique_ptr<BlockSource> source) : source_(std::move(source)) {}
  ~MemoryPool();
  MemoryPool(const MemoryPool&) = delete;
  MemoryPool& operator=(const MemoryPool&) = delete;

  // Rejects with INVALID_ARGUMENT (0 bytes) or OUT_OF_MEMORY.
  void* allocate(uint64_t bytes);
  // The same for the library's own use: owned by the pool, but not by the caller of the ABI, so that deepep_free cannot take
  // it.
  void* allocate_own(uint64_t bytes);
  // Whether the address is one of this pool's that disown() would take.
  bool owns(uint64_t address);
  // First half of a free: the address is no longer the caller's, so that a second free is rejected at once.
  void disown(uint64_t address);
  // Second half, in stream order: the memory may be handed out again.
  void recycle(uint64_t address);

 private:
  struct Block {
    uint64_t bytes;
    bool owned;
  };
  void* allocate_block(uint64_t bytes, bool owned);
  void drop_cache();

  std::unique_ptr<BlockSource> source_;
  std::mutex mutex_;
  std::unordered_map<uint64_t, Block> blocks_;  // every block that was handed out and not recycled
  std::multimap<uint64_t, void*> cache_;        // recycled blocks by size
  uint64_t cached_bytes_ = 0;
};

}  // namespace deepep
