// Bulk copies and their barriers: see bulk.hpp.

#include "bulk.hpp"

#include <algorithm>
#include <cstring>

#include "block.hpp"

namespace deepep {
extern thread_local uint8_t dynamic_shared[];
}

namespace emulator {
namespace {

constexpr uint32_t kMostGroups = 32;  // of a thread, that have been read and not written: the oldest are, then

// A barrier in shared memory.
struct Barrier {
  uint32_t magic : 9;
  uint32_t phase : 1;
  uint32_t pending : 11;
  uint32_t expected : 11;
  int32_t bytes;
};
static_assert(sizeof(Barrier) == sizeof(uint64_t));
constexpr uint32_t kMagic = 0x1b7;

Barrier& barrier_at(uint64_t* word) {
  auto& barrier = *reinterpret_cast<Barrier*>(word);
  if (barrier.magic != kMagic) this_block().fail("there is no initialized barrier at %p", static_cast<void*>(word));
  return barrier;
}

void turn_when_complete(Barrier& barrier) {
  if (barrier.pending != 0 || barrier.bytes != 0) return;
  barrier.phase ^= 1;
  barrier.pending = barrier.expected;
  this_block().progress();
}

void check_copy(const void* shared, const void* global, uint32_t bytes) {
  Block& block = this_block();
  const uint64_t all = reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global) | bytes;
  if (all % 16 != 0) block.fail("a bulk copy of %u bytes between %p and %p: not by 16", bytes, shared, global);
  const auto* const at = static_cast<const uint8_t*>(shared);
  if (at < deepep::dynamic_shared || at + bytes > deepep::dynamic_shared + block.grid.shared_bytes) {
    block.fail("a bulk copy of %u bytes at %p, which is not in dynamic shared memory", bytes, shared);
  }
}

constexpr auto kBulkRead = static_cast<uint32_t>(Access::async);
constexpr auto kBulkWrite = kBulkRead | static_cast<uint32_t>(Access::write);

void read(BulkStore& store) {
  if (!store.read.empty()) return;
  look_at(store.from, store.bytes, kBulkRead, store.at);
  const auto* const from = static_cast<const uint8_t*>(store.from);
  store.read.assign(from, from + store.bytes);
}

}  // namespace

void bulk_load(void* to_shared, const void* from, uint32_t bytes, uint64_t* barrier) {
  check_copy(to_shared, from, bytes);
  barrier_at(barrier);
  const void* const at = __builtin_return_address(0);
  look_at(from, bytes, kBulkRead, at);
  look_at(to_shared, bytes, kBulkWrite, at);
  // Its bytes arrive.
  Block& block = this_block();
  if (block.races) block.races->release(this_fiber().index, barrier, false);
  memset(to_shared, 0xa5, bytes);
  this_block().loads.push_back({to_shared, from, bytes, barrier});
  this_block().progress();
}

void bulk_store(void* to, const void* from_shared, uint32_t bytes) {
  check_copy(from_shared, to, bytes);
  Fiber& self = this_fiber();
  self.stores.push_back({to, from_shared, bytes, self.commits, __builtin_return_address(0), {}});
  this_block().progress();
}

void bulk_commit() { this_fiber().commits += 1; }

void bulk_wait(uint32_t pending, bool wholly) {
  Fiber& self = this_fiber();
  // Those that were not committed belong to group `commits`, which no wait is for.
  const auto is_before = [&](const BulkStore& store, uint32_t most) { return store.group + most < self.commits; };
  auto first = self.stores.begin();
  for (; first != self.stores.end() && is_before(*first, pending); ++first) read(*first);
  const auto complete = std::find_if_not(self.stores.begin(), self.stores.end(), [&](const BulkStore& store) {
    return is_before(store, wholly ? pending : std::max(pending, kMostGroups));
  });
  for (auto store = self.stores.begin(); store != complete; ++store) {
    look_at(store->to, store->bytes, kBulkWrite, store->at);
    memcpy(store->to, store->read.data(), store->bytes);
  }
  self.stores.erase(self.stores.begin(), complete);
  this_block().progress();
}

void barrier_init(uint64_t* word, uint32_t arrivals) {
  auto& barrier = *reinterpret_cast<Barrier*>(word);
  if (arrivals == 0 || arrivals > kMostThreads) this_block().fail("a barrier of %u arrivals", arrivals);
  barrier = {kMagic, 0, arrivals, arrivals, 0};
}

void barrier_invalidate(uint64_t* word) {
  barrier_at(word);
  for (const Block::Load& load : this_block().loads) {
    if (load.barrier == word) this_block().fail("it invalidates a barrier that a bulk load will arrive at");
  }
  *word = 0;
}

void barrier_arrive(uint64_t* word, uint32_t expected_bytes) {
  Barrier& barrier = barrier_at(word);
  if (barrier.pending == 0) this_block().fail("more arrive at a barrier than it is for");
  if (Block& block = this_block(); block.races) block.races->release(this_fiber().index, word, false);
  barrier.bytes += static_cast<int32_t>(expected_bytes);
  barrier.pending -= 1;
  turn_when_complete(barrier);
}

// Looks at a barrier: what was to arrive there does.
bool has_turned(uint64_t* word, uint32_t parity) {
  if (barrier_at(word).phase != parity) return true;
  auto& loads = this_block().loads;
  for (size_t i = 0; i < loads.size();) {
    if (loads[i].barrier != word) {
      ++i;
      continue;
    }
    const Block::Load load = loads[i];
    loads.erase(loads.begin() + static_cast<std::ptrdiff_t>(i));
    memcpy(load.to, load.from, load.bytes);
    Barrier& barrier = barrier_at(word);
    barrier.bytes -= static_cast<int32_t>(load.bytes);
    turn_when_complete(barrier);
  }
  if (barrier_at(word).phase != parity) return true;
  this_block().poll();
  return barrier_at(word).phase != parity;
}

bool barrier_try_wait(uint64_t* word, uint32_t parity) {
  const bool done = has_turned(word, parity);
  if (Block& block = this_block(); done && block.races) block.races->acquire(this_fiber().index, word);
  return done;
}

void proxy_fence() {
  if (Block& block = this_block(); block.races) block.races->proxy_fence(this_fiber().index);
}

}  // namespace emulator
