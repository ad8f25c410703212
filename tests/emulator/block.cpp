// The threads of a block: see block.hpp.

#include "block.hpp"

#include <link.h>
#include <sched.h>
#include <sys/mman.h>
#include <time.h>

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <set>

#include "runtime.hpp"

namespace deepep {
// What kernels declare as extern __shared__. The end is looked at when a block is done.
constexpr uint32_t kFence = 256;
alignas(128) thread_local uint8_t dynamic_shared[emulator::kMostShared + kFence];
}  // namespace deepep

extern "C" {
void emulator_switch(void** from, void* to);
[[gnu::visibility("hidden")]] extern const char __ehdr_start;  // where the library begins; the linker says
}

// Keeps what a callee must keep on the stack that it leaves, and the stack pointer in *from; goes on where `to` has left.
asm(".pushsection .text\n"
    ".globl emulator_switch\n"
    ".hidden emulator_switch\n"
    ".type emulator_switch, @function\n"
    "emulator_switch:\n"
    "  push %rbp\n"
    "  push %rbx\n"
    "  push %r12\n"
    "  push %r13\n"
    "  push %r14\n"
    "  push %r15\n"
    "  mov %rsp, (%rdi)\n"
    "  mov %rsi, %rsp\n"
    "  pop %r15\n"
    "  pop %r14\n"
    "  pop %r13\n"
    "  pop %r12\n"
    "  pop %rbx\n"
    "  pop %rbp\n"
    "  ret\n"
    ".size emulator_switch, . - emulator_switch\n"
    ".popsection\n");

namespace emulator {

uintptr_t all_stacks = 0;

namespace {

constexpr uint8_t kGarbage = 0xa5;
constexpr uint64_t kCanary = 0x5ca1ab1e5ca1ab1e;

// Stacks that nobody uses, the latest used first, and where the next new ones are.
struct Stacks {
  std::mutex mutex;
  std::vector<void*> free;
  uintptr_t next = 0;
};

Stacks& stacks() {
  static Stacks* const leaked = new Stacks;
  return *leaked;
}

std::vector<void*> take_stacks(uint32_t count) {
  Stacks& all = stacks();
  const std::lock_guard lock(all.mutex);
  if (all.next == 0) {
    void* const memory = mmap(nullptr, kAllStackBytes + kStackBytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      std::perror("emulated device: no memory for stacks");
      std::abort();
    }
    all_stacks = all.next = (reinterpret_cast<uintptr_t>(memory) + kStackBytes - 1) & ~(kStackBytes - 1);
  }
  for (; all.free.size() < count; all.next += kStackBytes) {
    if (all.next == all_stacks + kAllStackBytes) {
      std::fprintf(stderr, "emulated device: more threads than it has stacks for\n");
      std::abort();
    }
    all.free.push_back(reinterpret_cast<void*>(all.next));
  }
  std::vector<void*> taken(all.free.end() - count, all.free.end());
  all.free.resize(all.free.size() - count);
  return taken;
}

void give_stacks(const std::vector<void*>& given) {
  Stacks& all = stacks();
  const std::lock_guard lock(all.mutex);
  all.free.insert(all.free.end(), given.begin(), given.end());
}

uint32_t seed() {
  static const auto value = static_cast<uint32_t>(setting("EMULATED_SEED", 0));
  return value;
}

// From where to where of it the dynamic shared memory is.
std::pair<uintptr_t, uintptr_t> dynamic_within(const Range& shared) {
  const auto begin = reinterpret_cast<uintptr_t>(deepep::dynamic_shared) - shared.begin;
  return {begin, begin + sizeof deepep::dynamic_shared};
}

Range find_shared() {
  Range range = {};
  // The library's thread_local memory: that of the kernels, and some words that no block uses.
  const auto look = [](dl_phdr_info* info, size_t, void* out) {
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      const auto& part = info->dlpi_phdr[i];
      if (part.p_type != PT_TLS || info->dlpi_tls_data == nullptr) continue;
      const auto begin = reinterpret_cast<uintptr_t>(info->dlpi_tls_data);
      if (reinterpret_cast<uintptr_t>(deepep::dynamic_shared) - begin < part.p_memsz) {
        *static_cast<Range*>(out) = {begin, part.p_memsz};
      }
    }
    return 0;
  };
  dl_iterate_phdr(look, &range);
  if (range.bytes == 0) {
    std::fprintf(stderr, "emulated device: it cannot find its shared memory\n");
    std::abort();
  }
  return range;
}

// The address as addr2line wants it.
uintptr_t within_library(const void* address) {
  return reinterpret_cast<uintptr_t>(address) - reinterpret_cast<uintptr_t>(&__ehdr_start);
}

int32_t as_signed(uint64_t value) { return static_cast<int32_t>(static_cast<uint32_t>(value)); }

uint64_t reduced(Meet kind, uint64_t a, uint64_t b) {
  if (kind == Meet::add) return static_cast<uint32_t>(a + b);
  if (kind == Meet::min) return a < b ? a : b;
  if (kind == Meet::max) return a < b ? b : a;
  if (kind == Meet::min_signed) return as_signed(a) < as_signed(b) ? a : b;
  if (kind == Meet::max_signed) return as_signed(a) < as_signed(b) ? b : a;
  return kind == Meet::bit_and ? a & b : kind == Meet::bit_or ? a | b : a ^ b;
}

}  // namespace

Block::Block(const Grid& launched, uint3 index_)
    : grid(launched),
      index(index_),
      num_threads_(launched.threads.x * launched.threads.y * launched.threads.z),
      num_live_(num_threads_),
      fibers_(num_threads_),
      stacks_(take_stacks(num_threads_)),
      warps_((num_threads_ + kLanes - 1) / kLanes),
      ready_(num_threads_),
      random_(seed() + index_.x) {
  const Range shared = find_shared();
  if (accesses_are_told()) races = std::make_unique<Races>(num_threads_, shared);
  for (uint32_t i = 0; i < num_threads_; ++i) {
    Fiber& fiber = fibers_[i];
    fiber.block = this;
    fiber.is_early = launched.early;
    fiber.index = i;
    fiber.thread = {i % grid.threads.x, i / grid.threads.x % grid.threads.y, i / grid.threads.x / grid.threads.y};
    auto* const words = static_cast<uint64_t*>(stacks_[i]);
    words[0] = kCanary;
    uint64_t* top = words + kStackBytes / sizeof(uint64_t);
    *--top = reinterpret_cast<uint64_t>(&fiber);
    top -= 2 + i % 60 * 8;  // Not all in the same lines of the cache; the two words align begin() as a call would.
    *--top = reinterpret_cast<uint64_t>(&Block::begin);
    top -= 6;
    fiber.stack = top;
    ready(&fiber);
  }
  // Lanes that a last warp does not have.
  for (uint32_t lane = num_threads_ % kLanes; lane != 0 && lane < kLanes; ++lane) warps_.back().gone |= 1u << lane;
  fill_shared(shared);
}

Block::~Block() {
  give_stacks(stacks_);
  const Range shared = find_shared();
  const auto [begin, end] = dynamic_within(shared);
  auto* const memory = reinterpret_cast<uint8_t*>(shared.begin);
  memcpy(memory, unshared_.data(), begin);
  memcpy(memory + end, unshared_.data() + begin, shared.bytes - end);
}

// Kernels find nothing in shared memory that they can rely on, zeros neither.
void Block::fill_shared(const Range& shared) {
  const auto [begin, end] = dynamic_within(shared);
  auto* const memory = reinterpret_cast<uint8_t*>(shared.begin);
  unshared_.assign(memory, memory + begin);
  unshared_.insert(unshared_.end(), memory + end, memory + shared.bytes);
  memset(memory, kGarbage, begin + grid.shared_bytes + deepep::kFence);
  memset(memory + end, kGarbage, shared.bytes - end);
}

void Block::run(const Grid& grid, uint3 index) {
  Block block(grid, index);
  emulator_switch(&block.home_, block.next()->stack);
  for (uint32_t i = 0; i < deepep::kFence; ++i) {
    if (deepep::dynamic_shared[grid.shared_bytes + i] == kGarbage) continue;
    block.report("it has written to shared memory that it does not have, " + std::to_string(i) + " bytes after its end");
  }
}

void Block::begin() {
  this_block().grid.body();
  this_block().end();
}

void Block::await_kernel_before() { this_fiber().is_early = false; }

void Block::end() {
  Fiber& self = this_fiber();
  if (self.is_early) fail("it has not waited for the kernel before, although it was launched early");
  if (!self.stores.empty()) fail("it ends with bulk stores that it has not waited for");
  if (*static_cast<uint64_t*>(stacks_[self.index]) != kCanary) fail("it has used more stack than an emulated thread has");
  if (!barriers_[0].waiting.empty()) fail("it ends while threads wait for it at __syncthreads");
  Warp& warp = warps_[self.index / kLanes];
  const uint32_t bit = 1u << self.index % kLanes;
  for (const Meeting& meeting : warp.meetings) {
    if (meeting.here != 0 && (meeting.mask & bit) != 0) fail("it ends while lanes of its warp wait for it");
  }
  warp.gone |= bit;
  num_live_ -= 1;
  progress();
  void* dropped;
  if (num_live_ == 0) {
    if (!loads.empty()) fail("the block ends with bulk loads that nobody has waited for");
    emulator_switch(&dropped, home_);
  }
  emulator_switch(&dropped, next()->stack);
}

void Block::ready(Fiber* fiber) {
  fiber->waits_for = nullptr;
  uint32_t at = ready_begin_ + num_ready_;
  if (at >= num_threads_) at -= num_threads_;
  ready_[at] = fiber;
  num_ready_ += 1;
}

Fiber* Block::next() {
  if (num_ready_ == 0) report("every thread waits for others");
  if (seed() != 0) {
    uint32_t drawn = ready_begin_ + random_() % num_ready_;
    if (drawn >= num_threads_) drawn -= num_threads_;
    std::swap(ready_[ready_begin_], ready_[drawn]);
  }
  Fiber* const first = ready_[ready_begin_];
  if (++ready_begin_ == num_threads_) ready_begin_ = 0;
  num_ready_ -= 1;
  return first;
}

void Block::note(const void* at) {
  auto& met_at = this_fiber().met_at;
  std::copy_backward(met_at.begin(), met_at.end() - 1, met_at.end());
  met_at[0] = at;
}

// Others go on, unless it is drawn itself.
void Block::yield() {
  Fiber& self = this_fiber();
  ready(&self);
  if (Fiber* const drawn = next(); drawn != &self) emulator_switch(&self.stack, drawn->stack);
}

void Block::maybe_switch() {
  constexpr uint32_t kOften = 8;
  if (seed() == 0 || num_ready_ == 0 || random_() % kOften != 0) return;
  yield();
}

void Block::race(const Deed& now, const Deed& before, const void* address, const char* words) {
  static std::mutex* const mutex = new std::mutex;
  static auto* const told = new std::set<std::pair<const void*, const void*>>;
  char line[384];
  std::snprintf(line, sizeof line, "thread %u %s %p at 0x%zx, which thread %u %s at 0x%zx: %s", now.thread, now.what, address,
                within_library(now.at), before.thread, before.what, within_library(before.at), words);
  static const char* const mode = getenv("EMULATED_RACES");
  if (mode == nullptr || strcmp(mode, "go_on") != 0) report(line);
  const std::lock_guard lock(*mutex);
  if (!told->emplace(now.at, before.at).second) return;
  std::fprintf(stderr, "emulated device: %s, block %u of %u, %s\n", grid.name, index.x, grid.blocks.x, line);
}

void Block::wait(const char* what) {
  Fiber& self = this_fiber();
  self.waits_for = what;
  emulator_switch(&self.stack, next()->stack);
}

void Block::poll() {
  // Everything that could change has been looked at twice: now it is other threads' turn, then other processes'.
  const uint64_t patience = 64 + 2 * num_ready_;
  if (++polls_ > patience && polls_ % (num_ready_ + 1) == 0) {
    if (++naps_ < 100) {
      sched_yield();
    } else {
      const uint64_t doubled = (naps_ - 100) / 16;
      const timespec nap = {0, 20'000L << (doubled < 5 ? doubled : 5)};
      nanosleep(&nap, nullptr);
    }
  }
  if (num_ready_ == 0) return;
  yield();
}

uint64_t Block::synchronize(uint32_t number, uint32_t threads, Vote vote, bool value, const void* at) {
  Fiber& self = this_fiber();
  note(at);
  if (number >= kNumBarriers) fail("there is no barrier %u", number);
  if (number == 0 && num_live_ != num_threads_) fail("it waits at __syncthreads for threads that have ended");
  if (threads == 0 || threads % kLanes != 0) {
    if (number != 0) fail("a barrier of %u threads: it must be whole warps", threads);
  }
  Barrier& barrier = barriers_[number];
  if (barrier.waiting.empty()) {
    barrier.expected = threads;
    barrier.vote = vote;
    barrier.votes = 0;
  } else if (barrier.expected != threads || barrier.vote != vote) {
    fail("it comes to barrier %u of %u threads, where others wait for another one of %u", number, threads, barrier.expected);
  }
  barrier.votes += value ? 1 : 0;
  barrier.waiting.push_back(&self);
  if (barrier.waiting.size() < threads) {
    wait(number == 0 ? "__syncthreads" : "a named barrier");
    return self.result;
  }
  if (races) {
    races->meet([&](auto&& act) {
      for (const Fiber* const fiber : barrier.waiting) act(fiber->index);
    });
  }
  const uint64_t result = vote == Vote::any ? barrier.votes != 0 : vote == Vote::all ? barrier.votes == threads : barrier.votes;
  for (Fiber* const fiber : barrier.waiting) {
    fiber->result = result;
    if (fiber != &self) ready(fiber);
  }
  barrier.waiting.clear();
  progress();
  return result;
}

uint64_t Block::meet(Meet kind, uint32_t mask, uint64_t value, uint32_t argument, const void* at) {
  Fiber& self = this_fiber();
  const uint32_t lane = self.index % kLanes;
  Warp& warp = warps_[self.index / kLanes];
  note(at);
  if ((mask >> lane & 1) == 0) fail("it is not in its own mask 0x%08x", mask);
  if ((mask & warp.gone) != 0) fail("it waits for lanes 0x%08x, which have ended", mask & warp.gone);
  Meeting& meeting = warp.meetings[__builtin_ctz(mask)];
  if (meeting.here == 0) {
    meeting.kind = kind;
    meeting.mask = mask;
  } else if (meeting.kind != kind || meeting.mask != mask) {
    fail("it comes to operation %d with mask 0x%08x, where lanes 0x%08x wait in operation %d with mask 0x%08x",
         static_cast<int>(kind), mask, meeting.here, static_cast<int>(meeting.kind), meeting.mask);
  }
  self.value = value;
  self.argument = argument;
  meeting.here |= 1u << lane;
  if (meeting.here != mask) {
    wait("lanes of its warp");
    return self.result;
  }
  conclude(meeting, &fibers_[self.index - lane]);
  // Votes, shuffles and sums order no accesses: CUDA says so.
  if (races && kind == Meet::sync) {
    const uint32_t first = self.index - lane;
    races->meet([&](auto&& act) {
      for (uint32_t rest = mask; rest != 0; rest &= rest - 1) act(first + static_cast<uint32_t>(__builtin_ctz(rest)));
    });
  }
  meeting.here = 0;
  for (uint32_t rest = mask & ~(1u << lane); rest != 0; rest &= rest - 1) {
    ready(&fibers_[self.index - lane + static_cast<uint32_t>(__builtin_ctz(rest))]);
  }
  return self.result;
}

// Gives every lane of a complete meeting its result.
void Block::conclude(const Meeting& meeting, Fiber* lanes) {
  const auto each = [&](auto&& act) {
    for (uint32_t rest = meeting.mask; rest != 0; rest &= rest - 1) act(static_cast<uint32_t>(__builtin_ctz(rest)));
  };
  const auto from = [&](uint32_t lane, int32_t source, uint32_t width) {
    const auto first = static_cast<int32_t>(lane / width * width);
    if (source < first || source >= first + static_cast<int32_t>(width)) source = static_cast<int32_t>(lane);
    if ((meeting.mask >> source & 1) == 0) fail("lane %u reads lane %d, not in mask 0x%08x", lane, source, meeting.mask);
    lanes[lane].result = lanes[source].value;
  };
  uint32_t yes = 0;
  each([&](uint32_t lane) { yes |= (lanes[lane].value != 0 ? 1u : 0u) << lane; });
  switch (meeting.kind) {
    case Meet::none:
    case Meet::sync: return;
    case Meet::shuffle:
    case Meet::shuffle_up:
    case Meet::shuffle_down:
    case Meet::shuffle_xor:
      each([&](uint32_t lane) {
        const uint32_t width = lanes[lane].argument >> 16;
        const auto by = static_cast<int32_t>(lanes[lane].argument & 0xffff), here = static_cast<int32_t>(lane);
        const int32_t in_segment = static_cast<int32_t>(lane / width * width) + by % static_cast<int32_t>(width);
        from(lane, meeting.kind == Meet::shuffle        ? in_segment
                   : meeting.kind == Meet::shuffle_up   ? here - by
                   : meeting.kind == Meet::shuffle_down ? here + by
                                                        : here ^ by, width);
      });
      return;
    case Meet::ballot: return each([&](uint32_t lane) { lanes[lane].result = yes; });
    case Meet::any: return each([&](uint32_t lane) { lanes[lane].result = yes != 0; });
    case Meet::all: return each([&](uint32_t lane) { lanes[lane].result = yes == meeting.mask; });
    case Meet::match_any:
      each([&](uint32_t lane) {
        uint32_t same = 0;
        each([&](uint32_t other) { same |= (lanes[other].value == lanes[lane].value ? 1u : 0u) << other; });
        lanes[lane].result = same;
      });
      return;
    case Meet::add:
    case Meet::min:
    case Meet::max:
    case Meet::min_signed:
    case Meet::max_signed:
    case Meet::bit_and:
    case Meet::bit_or:
    case Meet::bit_xor: {
      const auto first = static_cast<uint32_t>(__builtin_ctz(meeting.mask));
      uint64_t sum = lanes[first].value;
      each([&](uint32_t lane) { sum = lane == first ? sum : reduced(meeting.kind, sum, lanes[lane].value); });
      each([&](uint32_t lane) { lanes[lane].result = sum; });
    }
  }
}

void Block::fail(const char* format, ...) {
  char words[256];
  va_list args;
  va_start(args, format);
  vsnprintf(words, sizeof words, format, args);
  va_end(args);
  report("thread " + std::to_string(this_fiber().index) + ": " + words);
}

// What is wrong, where all threads are, and where they have last met others, which addr2line turns into lines. Threads that
// have gone the same way are told together.
void Block::report(const std::string& words) {
  static std::mutex* const mutex = new std::mutex;  // The first to report is the only one.
  mutex->lock();
  std::fprintf(stderr, "emulated device: %s, block %u of %u, %s\n", grid.name, index.x, grid.blocks.x, words.c_str());
  const auto gone = [&](uint32_t i) { return (warps_[i / kLanes].gone >> i % kLanes & 1) != 0; };
  const auto same = [&](uint32_t i, uint32_t j) {
    return fibers_[i].waits_for == fibers_[j].waits_for && fibers_[i].met_at == fibers_[j].met_at && gone(i) == gone(j);
  };
  for (uint32_t begin = 0, end; begin < num_threads_; begin = end) {
    for (end = begin + 1; end < num_threads_ && same(begin, end);) ++end;
    const Fiber& fiber = fibers_[begin];
    std::fprintf(stderr, "  threads %u to %u %s%s, met others at", begin, end - 1,
                 gone(begin)       ? "have ended"
                 : fiber.waits_for ? "wait for "
                                   : "run",
                 !gone(begin) && fiber.waits_for ? fiber.waits_for : "");
    for (const void* const at : fiber.met_at) std::fprintf(stderr, " 0x%zx", at ? within_library(at) : 0);
    std::fprintf(stderr, "\n");
  }
  std::abort();
}

}  // namespace emulator
