// Accesses that nothing orders: see races.hpp.

#include "races.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <mutex>

#include "block.hpp"
#include "runtime.hpp"

namespace emulator {
namespace {

// What is kept of accesses to 8 bytes: the latest of each kind. A word is serial of the block 20, thread 10, clock 22, bytes 8
// and kind 3 bits; beside it is where it was.
constexpr uint32_t kSlots = 8;
constexpr uint32_t kCellWords = 2 * kSlots;

struct Seen {
  uint32_t serial, thread, clock, bytes, how;
};
uint64_t pack(const Seen& seen) {
  return uint64_t{seen.serial & 0xfffff} << 43 | uint64_t{seen.thread & 0x3ff} << 33 | uint64_t{seen.clock & 0x3fffff} << 11 |
         seen.bytes << 3 | seen.how;
}
Seen unpack(uint64_t word) {
  return {static_cast<uint32_t>(word >> 43) & 0xfffff, static_cast<uint32_t>(word >> 33) & 0x3ff,
          static_cast<uint32_t>(word >> 11) & 0x3fffff, static_cast<uint32_t>(word >> 3) & 0xff,
          static_cast<uint32_t>(word) & 7};
}

constexpr uint32_t kWrite = static_cast<uint32_t>(Access::write), kAtomic = static_cast<uint32_t>(Access::atomic),
                   kAsync = static_cast<uint32_t>(Access::async);

uint64_t* map_cells(uint64_t bytes) {
  void* const cells = mmap(nullptr, bytes / 8 * kCellWords * sizeof(uint64_t), PROT_READ | PROT_WRITE,
                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (cells == MAP_FAILED) {
    std::perror("emulated device: no memory to note accesses in");
    std::abort();
  }
  return static_cast<uint64_t*>(cells);
}

// Notes of shared memory that no block uses.
struct SharedCells {
  std::mutex mutex;
  std::vector<uint64_t*> free;
};
SharedCells& shared_cells() {
  static SharedCells* const leaked = new SharedCells;
  return *leaked;
}
uint64_t* take_cells(uint64_t bytes) {
  SharedCells& all = shared_cells();
  const std::lock_guard lock(all.mutex);
  if (all.free.empty()) return map_cells(bytes + 8);
  uint64_t* const cells = all.free.back();
  all.free.pop_back();
  return cells;
}

uint64_t* device_cell(uintptr_t address) {
  static const Range device = device_memory();
  static uint64_t* const cells = map_cells(device.bytes);
  return address - device.begin < device.bytes ? cells + (address - device.begin) / 8 * kCellWords : nullptr;
}

bool told = false;

const char* name_of(uint32_t how) {
  switch (how) {
    case 0: return "reads";
    case kWrite: return "writes";
    case kAtomic: return "reads atomically";
    case kAtomic | kWrite: return "writes atomically";
    case kAsync: return "reads by bulk copy";
  }
  return "writes by bulk copy";
}

uint32_t next_serial() {
  static std::atomic<uint32_t> last{0};
  return ++last & 0xfffff;
}

Known joined(const Known& a, const Known& b) {
  if (!a || a == b) return b;
  auto both = std::make_shared<Clocks>(*a);
  for (size_t i = 0; i < both->size(); ++i) (*both)[i] = std::max((*both)[i], (*b)[i]);
  return both;
}

}  // namespace

Known Knowledge::all() const {
  auto known = std::make_shared<Clocks>(*others);
  for (uint32_t i = 0; i < kWarp && first + i < known->size(); ++i) (*known)[first + i] = warp[i];
  return known;
}

bool Knowledge::join(const Known& more) {
  if (!more) return false;
  bool news = false;
  for (uint32_t i = 0; i < more->size() && !news; ++i) news = (*more)[i] > of(i);
  if (!news) return false;
  others = joined(others, more);
  for (uint32_t i = 0; i < kWarp && first + i < more->size(); ++i) warp[i] = std::max(warp[i], (*more)[first + i]);
  return true;
}

bool accesses_are_told() { return told; }

void forget_accesses(const Range& memory) {
  if (told) madvise(device_cell(memory.begin), memory.bytes / 8 * kCellWords * sizeof(uint64_t), MADV_DONTNEED);
}

Races::Races(uint32_t num_threads, const Range& shared)
    : serial_(next_serial()), shared_(shared), cells_(take_cells(shared.bytes)), clocks_(num_threads), fences_(num_threads) {
  const Known none = std::make_shared<Clocks>(num_threads);
  for (uint32_t i = 0; i < num_threads; ++i) {
    clocks_[i].now.others = none;
    clocks_[i].now.first = i / kLanes * kLanes;
    advance(i);
    clocks_[i].fenced = clocks_[i].now;
  }
}

Races::~Races() {
  SharedCells& all = shared_cells();
  const std::lock_guard lock(all.mutex);
  all.free.push_back(cells_);
}

uint64_t* Races::cell_of(uintptr_t address) const {
  if (uint64_t* const cell = device_cell(address)) return cell;
  if (address - shared_.begin < shared_.bytes) return cells_ + (address - shared_.begin) / 8 * kCellWords;
  return nullptr;
}

void Races::advance(uint32_t thread) { clocks_[thread].now.warp[thread % kLanes] += 1; }

void Races::release(uint32_t thread, const void* word, bool replaces) {
  Known& there = words_[word];
  const Known mine = clocks_[thread].now.all();
  there = replaces || !there ? mine : joined(there, mine);
  advance(thread);
}

void Races::release_relaxed(uint32_t thread, const void* word, bool replaces) {
  const Known& mine = clocks_[thread].released;
  if (!mine && !replaces) return;
  Known& there = words_[word];
  there = replaces || !there ? mine : joined(there, mine);
}

void Races::acquire(uint32_t thread, const void* word) {
  if (const auto found = words_.find(word); found != words_.end()) clocks_[thread].now.join(found->second);
}

void Races::acquire_relaxed(uint32_t thread, const void* word) {
  const auto found = words_.find(word);
  if (found == words_.end() || !found->second) return;
  Known& pending = clocks_[thread].to_acquire;
  if (pending != found->second) pending = joined(pending, found->second);
}

void Races::fence(uint32_t thread) {
  Clock& clock = clocks_[thread];
  if (clock.to_acquire) clock.now.join(clock.to_acquire);
  clock.to_acquire = nullptr;
  clock.released = clock.now.all();
  advance(thread);
}

void Races::proxy_fence(uint32_t thread) {
  Clock& clock = clocks_[thread];
  clock.fenced = clock.now;
  auto& fences = fences_[thread];
  std::copy_backward(fences.begin(), fences.end() - 1, fences.end());
  fences[0] = clock.now.of(thread);
  advance(thread);
}

// Whether a proxy fence is between what another thread did at a time of its clock, which this one knows of, and now.
bool Races::is_fenced(uint32_t thread, uint32_t other, uint32_t clock) const {
  const Clock& mine = clocks_[thread];
  if (mine.fenced.of(other) >= clock) return true;
  const auto& fences = fences_[other];
  return std::any_of(fences.begin(), fences.end(),
                     [&](uint32_t fence) { return fence >= clock && fence <= mine.now.of(other); });
}

void Races::look(uint32_t thread, uint64_t* cell, uint32_t mask, uint32_t how, const void* address, const void* at) {
  const Knowledge& now = clocks_[thread].now;
  const uint64_t mine = pack({serial_, thread, now.of(thread), mask, how});
  uint32_t place = kSlots, sibling = kSlots;
  for (uint32_t i = 0; i < kSlots; ++i) {
    uint64_t& slot = cell[2 * i];
    if (slot == mine) return;
    const Seen seen = unpack(slot);
    if (slot == 0 || seen.serial != serial_) {
      place = i;
      continue;
    }
    const bool comes_before = seen.thread == thread || now.of(seen.thread) >= seen.clock;
    if ((seen.bytes & mask) != 0) {
      const bool writes = ((seen.how | how) & kWrite) != 0, both_atomic = (seen.how & how & kAtomic) != 0;
      const char* wrong = nullptr;
      if (writes && !both_atomic && !comes_before)
        wrong = "nothing orders them";
      else if ((how & kAsync) != 0 && (seen.how & kAsync) == 0 && (seen.how & kWrite) != 0 &&
               !is_fenced(thread, seen.thread, seen.clock))
        wrong = "there is no proxy fence between them";
      if (wrong != nullptr) {
        this_block().race({thread, name_of(how), at}, {seen.thread, name_of(seen.how), reinterpret_cast<void*>(cell[2 * i + 1])},
                          address, wrong);
        slot = 0;
        place = i;
        continue;
      }
    }
    // What comes before and is covered need not be kept.
    if (comes_before && (seen.bytes & ~mask) == 0 && ((how & kWrite) != 0 || seen.how == how)) {
      slot = 0;
      place = i;
    }
    if (seen.thread / kLanes == thread / kLanes && seen.how == how) sibling = i;
  }
  // A lane stands for its warp, so that notes of many warps are kept.
  if (place == kSlots) place = sibling != kSlots ? sibling : (thread + now.of(thread)) % kSlots;
  cell[2 * place] = mine;
  cell[2 * place + 1] = reinterpret_cast<uint64_t>(at);
}

void Races::access(uint32_t thread, const void* address, size_t bytes, uint32_t how, const void* at) {
  auto begin = reinterpret_cast<uintptr_t>(address);
  for (const uintptr_t end = begin + bytes; begin < end;) {
    const uintptr_t next = std::min((begin | 7) + 1, end);
    uint64_t* const cell = cell_of(begin);
    if (cell == nullptr) return;
    look(thread, cell, ((1u << (next - begin)) - 1) << begin % 8, how, reinterpret_cast<void*>(begin), at);
    begin = next;
  }
}

void look_at(const void* address, size_t bytes, uint32_t how, const void* at) {
  const auto begin = reinterpret_cast<uintptr_t>(address);
  const auto stack = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
  if ((begin ^ stack) < kStackBytes || !Block::runs()) return;
  Fiber& self = this_fiber();
  if (!self.block->races || self.block->races->cell_of(begin) == nullptr) return;
  if (self.is_early && device_cell(begin) != nullptr) {
    self.block->fail("it is at %p before it has waited for the kernel before, although it was launched early", address);
  }
  self.block->races->access(self.index, address, bytes, how, at);
  self.block->maybe_switch();
}

}  // namespace emulator

// What g++ -fsanitize=thread calls before every access. The atomic ones do the access, too.

#define HERE __builtin_extract_return_addr(__builtin_return_address(0))
#define HOOK extern "C" __attribute__((visibility("hidden"), used))

#define PLAIN(name, bytes, how)                                                    \
  HOOK void __tsan_##name(void* address) { emulator::look_at(address, bytes, how, HERE); }
#define PLAINS(bytes)                            \
  PLAIN(read##bytes, bytes, 0)                   \
  PLAIN(write##bytes, bytes, 1)                  \
  PLAIN(unaligned_read##bytes, bytes, 0)         \
  PLAIN(unaligned_write##bytes, bytes, 1)        \
  PLAIN(volatile_read##bytes, bytes, 0)          \
  PLAIN(volatile_write##bytes, bytes, 1)
PLAINS(1)
PLAINS(2)
PLAINS(4)
PLAINS(8)
PLAINS(16)

HOOK void __tsan_read_range(void* address, uint64_t bytes) { emulator::look_at(address, bytes, 0, HERE); }
HOOK void __tsan_write_range(void* address, uint64_t bytes) { emulator::look_at(address, bytes, 1, HERE); }
HOOK void __tsan_vptr_update(void**, void*) {}
HOOK void __tsan_vptr_read(void**) {}
HOOK void __tsan_init() { emulator::told = true; }
HOOK void __tsan_func_entry(void*) {}
HOOK void __tsan_func_exit() {}

namespace {

bool acquires(int order) { return order != __ATOMIC_RELAXED && order != __ATOMIC_RELEASE; }
bool releases(int order) { return order == __ATOMIC_RELEASE || order == __ATOMIC_ACQ_REL || order == __ATOMIC_SEQ_CST; }

// Before an atomic access, and after it. `replaces`: a store.
void before(const void* word, size_t bytes, uint32_t how, int order, bool replaces, const void* at) {
  emulator::look_at(word, bytes, how | 2, at);
  if (!emulator::Block::runs() || (how & 1) == 0) return;
  emulator::Fiber& self = emulator::this_fiber();
  if (releases(order))
    self.block->races->release(self.index, word, replaces);
  else
    self.block->races->release_relaxed(self.index, word, replaces);
}
void after(const void* word, int order) {
  if (!emulator::Block::runs()) return;
  emulator::Fiber& self = emulator::this_fiber();
  if (acquires(order))
    self.block->races->acquire(self.index, word);
  else
    self.block->races->acquire_relaxed(self.index, word);
}

}  // namespace

#define ATOMICS(bits, T)                                                                                     \
  HOOK T __tsan_atomic##bits##_load(const volatile T* word, int order) {                                      \
    before(const_cast<const T*>(word), sizeof(T), 0, order, false, HERE);                                     \
    const T value = __atomic_load_n(word, __ATOMIC_SEQ_CST);                                                  \
    after(const_cast<const T*>(word), order);                                                                 \
    return value;                                                                                             \
  }                                                                                                           \
  HOOK void __tsan_atomic##bits##_store(volatile T* word, T value, int order) {                               \
    before(const_cast<T*>(word), sizeof(T), 1, order, true, HERE);                                            \
    __atomic_store_n(word, value, __ATOMIC_SEQ_CST);                                                          \
  }                                                                                                           \
  HOOK int __tsan_atomic##bits##_compare_exchange_strong(volatile T* word, T* expected, T desired, int order, int) { \
    before(const_cast<T*>(word), sizeof(T), 1, order, false, HERE);                                           \
    const bool done = __atomic_compare_exchange_n(word, expected, desired, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST); \
    after(const_cast<T*>(word), order);                                                                       \
    return done;                                                                                              \
  }
ATOMICS(8, uint8_t)
ATOMICS(16, uint16_t)
ATOMICS(32, uint32_t)
ATOMICS(64, uint64_t)

#define RMW(bits, T, name)                                                       \
  HOOK T __tsan_atomic##bits##_##name(volatile T* word, T value, int order) {    \
    before(const_cast<T*>(word), sizeof(T), 1, order, false, HERE);              \
    const T old = __atomic_##name(word, value, __ATOMIC_SEQ_CST);                \
    after(const_cast<T*>(word), order);                                          \
    return old;                                                                  \
  }
RMW(32, uint32_t, fetch_add)
RMW(64, uint64_t, fetch_add)
RMW(32, uint32_t, fetch_sub)
RMW(64, uint64_t, fetch_sub)

HOOK void __tsan_atomic_thread_fence(int) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  if (!emulator::Block::runs()) return;
  emulator::Fiber& self = emulator::this_fiber();
  self.block->races->fence(self.index);
}
