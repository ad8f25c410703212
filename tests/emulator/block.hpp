// A block of a kernel: its threads are fibers, all on one thread of the operating system, so that thread_local memory is the
// block's shared memory.
//
// In: what a thread runs, and calls of the device language and the primitives from within. Out: every thread has run to its
// end, or the process stops with words about what is wrong with the kernel: threads that wait at different barriers, a lane
// that others wait for and that has gone, wrong masks, bulk copies that nobody waits for. A fiber runs until it waits or polls;
// so what is missing between the lanes of a warp shows. EMULATED_SEED in the environment draws their order instead, and in
// libraries for races.hpp they also leave off between accesses. Shared memory is full of garbage when a block begins. Callers:
// grid.cpp, language.hpp, bulk.cpp, races.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "bulk.hpp"
#include "races.hpp"

namespace emulator {

constexpr uint32_t kLanes = 32;
constexpr uint32_t kNumBarriers = 16;
constexpr uint32_t kMostThreads = 1024;
constexpr uint32_t kMostShared = 227 * 1024;       // of a block
constexpr uint32_t kReservedShared = 8 * 1024;     // of that, what kernels are said to declare themselves
constexpr uintptr_t kStackBytes = uintptr_t{32} << 10;  // of a fiber; stacks are aligned to it
constexpr uintptr_t kAllStackBytes = uintptr_t{16} << 30;  // address space
extern uintptr_t all_stacks;                               // where they begin; not 0 once there are any

// What a kernel is launched with.
struct Grid {
  const char* name;  // of its parameters, for messages
  dim3 blocks;
  dim3 threads;
  size_t shared_bytes;
  bool early;                  // it may begin before the kernel before it has ended, and must wait for that itself
  std::function<void()> body;  // of a thread
};

// What the lanes of a warp meet for.
enum class Meet : uint8_t {
  none,
  sync,
  shuffle,
  shuffle_up,
  shuffle_down,
  shuffle_xor,
  ballot,
  any,
  all,
  match_any,
  add,
  min,
  max,
  min_signed,
  max_signed,
  bit_and,
  bit_or,
  bit_xor,
};

// What the threads of a block are asked at a barrier.
enum class Vote : uint8_t { none, any, all, count };

class Block;

struct Fiber {
  void* stack = nullptr;  // where it goes on
  Block* block = nullptr;
  uint3 thread = {};
  uint32_t index = 0;
  const char* waits_for = nullptr;
  bool is_early = false;                   // it has not waited yet for the kernel before
  std::array<const void*, 8> met_at = {};  // addresses in the kernel where it has met others, the latest first
  uint64_t result = 0;             // of a meeting
  // What it brings to a meeting of lanes.
  uint64_t value = 0;
  uint32_t argument = 0;
  uint32_t commits = 0;           // bulk groups so far
  std::vector<BulkStore> stores;  // not complete yet, oldest first
};

// A thread and what it does.
struct Deed {
  uint32_t thread;
  const char* what;
  const void* at;
};

class Block {
 public:
  // On the present thread of the operating system; returns when all threads of the block have ended.
  static void run(const Grid& grid, uint3 index);

  // ---- by the running fiber

  // `barrier` 0 is all threads'. Another one is complete when `threads` have come.
  uint64_t synchronize(uint32_t barrier, uint32_t threads, Vote vote, bool value, const void* at);
  uint64_t meet(Meet kind, uint32_t mask, uint64_t value, uint32_t argument, const void* at);
  // It looks for something that others do. Lets them.
  void poll();
  // Lets others go on, now and then, when EMULATED_SEED says so.
  void maybe_switch();
  // Two threads are at the same memory. Ends the process unless EMULATED_RACES=go_on: then each two places are told once.
  void race(const Deed& now, const Deed& before, const void* address, const char* words);
  // Whether it is a block's thread that asks.
  static bool runs();
  // Now the kernel before has ended.
  void await_kernel_before();
  // The block has done something that others may wait for.
  void progress() { polls_ = 0, naps_ = 0; }
  [[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 2, 3)));

  const Grid& grid;
  const uint3 index;
  struct Load {
    void* to;
    const void* from;
    uint32_t bytes;
    uint64_t* barrier;
  };
  std::vector<Load> loads;  // bulk loads under way
  std::unique_ptr<Races> races;  // where accesses are looked at

 private:
  struct Barrier {
    uint32_t expected = 0;
    Vote vote = Vote::none;
    uint32_t votes = 0;
    std::vector<Fiber*> waiting;
  };
  // Lanes that have come; of a warp, by the first lane of the mask.
  struct Meeting {
    Meet kind = Meet::none;
    uint32_t mask = 0;
    uint32_t here = 0;
  };
  struct Warp {
    uint32_t gone = 0;
    Meeting meetings[kLanes];
  };

  Block(const Grid& grid, uint3 index);
  ~Block();
  static void begin();
  void end();
  void fill_shared(const Range& shared);
  void wait(const char* what);
  void yield();
  void note(const void* at);
  void ready(Fiber* fiber);
  Fiber* next();
  void conclude(const Meeting& meeting, Fiber* lanes);
  [[noreturn]] void report(const std::string& words);

  const uint32_t num_threads_;
  uint32_t num_live_;
  std::vector<Fiber> fibers_;
  std::vector<void*> stacks_;
  std::vector<Warp> warps_;
  Barrier barriers_[kNumBarriers];
  std::vector<Fiber*> ready_;  // a ring
  uint32_t ready_begin_ = 0, num_ready_ = 0;
  std::minstd_rand random_;
  std::vector<uint8_t> unshared_;  // what was where kernels have their static shared memory
  void* home_ = nullptr;  // where run() goes on
  uint64_t polls_ = 0;    // since the last progress
  uint64_t naps_ = 0;
};

// The fiber that runs: the last word of its stack says.
inline Fiber& this_fiber() {
  uintptr_t stack;
  asm("mov %%rsp, %0" : "=r"(stack));
  return **reinterpret_cast<Fiber**>((stack | (kStackBytes - 1)) - 7);
}
inline bool Block::runs() {
  return reinterpret_cast<uintptr_t>(__builtin_frame_address(0)) - all_stacks < kAllStackBytes;
}
inline Block& this_block() { return *this_fiber().block; }

}  // namespace emulator
