// Host memory for the pool: see memory.hpp.

#include "memory.hpp"

#include <sys/mman.h>

#include <cstdlib>

namespace deepep {
namespace {

constexpr uint64_t kPage = 4096;
constexpr uint64_t kHugePage = uint64_t{2} << 20;

// Small blocks come from the C library, larger ones from mmap: whole pages, whole huge pages from 1 MiB on.
bool is_mapped(uint64_t bytes) { return bytes >= kPage * 4; }

uint64_t rounded(uint64_t bytes) {
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

class HostSource : public BlockSource {
 public:
  uint64_t block_bytes(uint64_t bytes) const override { return rounded(bytes); }
  void* take(uint64_t bytes) override { return take_block(bytes); }
  void give(void* block, uint64_t bytes) noexcept override { give_block(block, bytes); }
};

}  // namespace

std::unique_ptr<BlockSource> host_memory() { return std::make_unique<HostSource>(); }

}  // namespace deepep
