// The pool behind deepep_alloc: see memory.hpp.

#include "memory.hpp"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

#include "../abi/deepep.h"
#include "../common/failure.hpp"

namespace deepep {
namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kHugePage = uint64_t{2} << 20;
constexpr uint64_t kMaxBytes = uint64_t{1} << 46;
constexpr uint64_t kMaxCachedBytes = uint64_t{1} << 30;  // most of it; enough for the outputs of a large prefill call

// Small blocks come from the C library, larger ones from mmap: whole pages, whole huge pages from 1 MiB on.
bool is_mapped(uint64_t bytes) { return bytes >= kPage * 4; }

uint64_t block_bytes(uint64_t bytes) {
  const uint64_t unit = bytes >= kHugePage / 2 ? kHugePage : is_mapped(bytes) ? kPage : 256;
  return (bytes + unit - 1) / unit * unit;
}

void* take_block(uint64_t bytes) {
  if (!is_mapped(bytes)) return std::aligned_alloc(256, bytes);
  // For huge pages the block must begin at a multiple of one: map more, and give the ends back.
  const uint64_t slack = bytes >= kHugePage ? kHugePage - kPage : 0;
  void* const mapped =
      mmap(nullptr, bytes + slack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  if (!slack) return mapped;
  auto* const begin = static_cast<uint8_t*>(mapped);
  auto* const block = reinterpret_cast<uint8_t*>((reinterpret_cast<uint64_t>(mapped) + kHugePage - 1) / kHugePage * kHugePage);
  if (block != begin) munmap(begin, static_cast<size_t>(block - begin));
  const uint64_t after = slack - static_cast<uint64_t>(block - begin);
  if (after) munmap(block + bytes, after);
  madvise(block, bytes, MADV_HUGEPAGE);
  return block;
}

void give_block(void* block, uint64_t bytes) {
  if (is_mapped(bytes)) {
    munmap(block, bytes);
  } else {
    std::free(block);
  }
}

}  // namespace

MemoryPool::~MemoryPool() {
  for (const auto& [address, block] : blocks_) give_block(reinterpret_cast<void*>(address), block.bytes);
  for (const auto& [bytes, block] : cache_) give_block(block, bytes);
}

void* MemoryPool::allocate(uint64_t bytes) {
  if (bytes == 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "bytes is 0, at least 1");
  if (bytes > kMaxBytes) {
    reject(DEEPEP_ERROR_OUT_OF_MEMORY, "bytes is %llu, at most %llu", static_cast<unsigned long long>(bytes),
           static_cast<unsigned long long>(kMaxBytes));
  }
  const uint64_t size = block_bytes(bytes);
  const std::lock_guard lock(mutex_);
  void* block = nullptr;
  if (const auto found = cache_.find(size); found != cache_.end()) {
    block = found->second;
    cache_.erase(found);
    cached_bytes_ -= size;
  } else {
    block = take_block(size);
  }
  if (!block) {
    reject(DEEPEP_ERROR_OUT_OF_MEMORY, "%llu bytes could not be allocated", static_cast<unsigned long long>(bytes));
  }
  blocks_[reinterpret_cast<uint64_t>(block)] = {size, true};
  return block;
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
  if (cached_bytes_ + bytes > kMaxCachedBytes) return give_block(reinterpret_cast<void*>(address), bytes);
  cache_.emplace(bytes, reinterpret_cast<void*>(address));
  cached_bytes_ += bytes;
}

}  // namespace deepep
