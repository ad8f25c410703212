// The pool behind deepep_alloc: see memory_pool.hpp.

#include "memory_pool.hpp"

#include "../abi/deepep.h"
#include "../common/failure.hpp"

namespace deepep {
namespace {

constexpr uint64_t kMaxBytes = uint64_t{1} << 46;
constexpr uint64_t kMaxCachedBytes = uint64_t{1} << 30;  // most of it; enough for the outputs of a large prefill call

}  // namespace

MemoryPool::~MemoryPool() {
  for (const auto& [address, block] : blocks_) source_->give(reinterpret_cast<void*>(address), block.bytes);
  drop_cache();
}

void MemoryPool::drop_cache() {
  for (const auto& [bytes, block] : cache_) source_->give(block, bytes);
  cache_.clear();
  cached_bytes_ = 0;
}

void* MemoryPool::allocate(uint64_t bytes) { return allocate_block(bytes, true); }

void* MemoryPool::allocate_own(uint64_t bytes) { return allocate_block(bytes, false); }

void* MemoryPool::allocate_block(uint64_t bytes, bool owned) {
  if (bytes == 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "bytes is 0, at least 1");
  if (bytes > kMaxBytes) {
    reject(DEEPEP_ERROR_OUT_OF_MEMORY, "bytes is %llu, at most %llu", static_cast<unsigned long long>(bytes),
           static_cast<unsigned long long>(kMaxBytes));
  }
  const uint64_t size = source_->block_bytes(bytes);
  const std::lock_guard lock(mutex_);
  void* block = nullptr;
  if (const auto found = cache_.find(size); found != cache_.end()) {
    block = found->second;
    cache_.erase(found);
    cached_bytes_ -= size;
  } else {
    block = source_->take(size);
    if (!block && !cache_.empty()) {
      drop_cache();  // Blocks of other sizes may be what is missing.
      block = source_->take(size);
    }
  }
  if (!block) {
    reject(DEEPEP_ERROR_OUT_OF_MEMORY, "%llu bytes could not be allocated", static_cast<unsigned long long>(bytes));
  }
  blocks_[reinterpret_cast<uint64_t>(block)] = {size, owned};
  return block;
}

bool MemoryPool::owns(uint64_t address) {
  const std::lock_guard lock(mutex_);
  const auto found = blocks_.find(address);
  return found != blocks_.end() && found->second.owned;
}

void MemoryPool::disown(uint64_t address) {
  const std::lock_guard lock(mutex_);
  const auto found = blocks_.find(address);
  if (found == blocks_.end() || !found->second.owned) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "address 0x%llx was not allocated from this buffer, or was freed before",
           static_cast<unsigned long long>(address));
  }
  found->second.owned = false;
}

void MemoryPool::recycle(uint64_t address) {
  const std::lock_guard lock(mutex_);
  const auto found = blocks_.find(address);
  if (found == blocks_.end()) return;
  const uint64_t bytes = found->second.bytes;
  blocks_.erase(found);
  if (cached_bytes_ + bytes > kMaxCachedBytes) return source_->give(reinterpret_cast<void*>(address), bytes);
  cache_.emplace(bytes, reinterpret_cast<void*>(address));
  cached_bytes_ += bytes;
}

}  // namespace deepep
