// Two accesses to the same bytes that nothing orders, by threads of one block.
//
// In: what the threads of a block do to pass something on: __syncwarp, barriers, words that are released and acquired, bulk
// copies; and in libraries of `bun tests/emulator/build.ts --races` every access of the kernels to shared and global memory,
// before which g++ calls a function. Out: the end of the process, with words, when one of two accesses is a write and neither
// comes before the other by anything that the kernel does, so that they come in the order that is meant only as long as lanes
// run in lockstep; or when TMA gets at what was written by plain stores without a proxy fence between. Callers: block.cpp,
// bulk.cpp.
//
// Clocks. A thread counts what it passes on. What it knows is how far every thread of the block was; lanes of a warp mostly
// know the same of other warps, and share it. What passes through other blocks is not followed.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "runtime.hpp"

namespace emulator {

// Whether kernels tell their accesses.
bool accesses_are_told();
// Memory has gone: so have the accesses to it.
void forget_accesses(const Range& memory);

// How far each thread of a block was.
using Clocks = std::vector<uint32_t>;
using Known = std::shared_ptr<const Clocks>;

// What a thread knows.
struct Knowledge {
  static constexpr uint32_t kWarp = 32;
  Known others;                           // of threads of other warps
  std::array<uint32_t, kWarp> warp = {};  // of its own,
  uint32_t first = 0;                     // whose first thread this is

  uint32_t of(uint32_t thread) const { return thread - first < kWarp ? warp[thread - first] : (*others)[thread]; }
  Known all() const;
  // True when it knows more now.
  bool join(const Known& more);
};

struct Clock {
  Knowledge now;
  Knowledge fenced;    // what it knew at its latest proxy fence
  Known to_acquire;    // what relaxed loads have seen since the latest fence
  Known released;      // at the latest fence
};

// Bits.
enum class Access : uint32_t { read = 0, write = 1, atomic = 2, async = 4 };

class Races {
 public:
  Races(uint32_t num_threads, const Range& shared);
  ~Races();

  // Threads meet: each(act) calls act(thread) for all of them.
  template <class Each>
  void meet(Each&& each);
  // A store, which `replaces` what the word passed on, or a change. Relaxed, it passes on what came before a fence.
  void release(uint32_t thread, const void* word, bool replaces);
  void release_relaxed(uint32_t thread, const void* word, bool replaces);
  // Relaxed, it counts from the next fence on.
  void acquire(uint32_t thread, const void* word);
  void acquire_relaxed(uint32_t thread, const void* word);
  void fence(uint32_t thread);
  void proxy_fence(uint32_t thread);

  // Where accesses to 8 bytes are noted, nullptr for memory that is no kernel's.
  uint64_t* cell_of(uintptr_t address) const;
  // `how` of Access, `at` in the kernel.
  void access(uint32_t thread, const void* address, size_t bytes, uint32_t how, const void* at);

 private:
  void advance(uint32_t thread);
  void look(uint32_t thread, uint64_t* cell, uint32_t mask, uint32_t how, const void* address, const void* at);
  bool is_fenced(uint32_t thread, uint32_t other, uint32_t clock) const;

  const uint32_t serial_;
  const Range shared_;
  uint64_t* const cells_;  // of shared memory
  std::vector<Clock> clocks_;
  std::vector<std::array<uint32_t, 4>> fences_;  // of each thread: its clock at its latest proxy fences
  std::unordered_map<const void*, Known> words_;
};

template <class Each>
void Races::meet(Each&& each) {
  // Lanes of one warp mostly know the same of others.
  uint32_t count = 0, first = 0;
  bool same = true;
  each([&](uint32_t thread) {
    if (count++ == 0) first = thread;
    const Knowledge &mine = clocks_[thread].now, &theirs = clocks_[first].now;
    same = same && mine.others == theirs.others && mine.first == theirs.first;
  });
  if (same) {
    auto joined = clocks_[first].now.warp;
    each([&](uint32_t thread) {
      const auto& warp = clocks_[thread].now.warp;
      for (uint32_t i = 0; i < joined.size(); ++i) joined[i] = joined[i] < warp[i] ? warp[i] : joined[i];
    });
    each([&](uint32_t thread) { clocks_[thread].now.warp = joined; });
  } else {
    auto joined = std::make_shared<Clocks>(*clocks_[first].now.others);
    const Clocks* last = nullptr;
    each([&](uint32_t thread) {
      const Knowledge& now = clocks_[thread].now;
      if (now.others.get() != last) {
        last = now.others.get();
        for (size_t i = 0; i < joined->size(); ++i) (*joined)[i] = std::max((*joined)[i], (*last)[i]);
      }
      for (uint32_t i = 0; i < now.warp.size() && now.first + i < joined->size(); ++i) {
        (*joined)[now.first + i] = std::max((*joined)[now.first + i], now.warp[i]);
      }
    });
    const Known known = joined;
    each([&](uint32_t thread) {
      Knowledge& now = clocks_[thread].now;
      now.others = known;
      for (uint32_t i = 0; i < now.warp.size() && now.first + i < known->size(); ++i) now.warp[i] = (*known)[now.first + i];
    });
  }
  each([&](uint32_t thread) { advance(thread); });
}

// The running thread's access, before it happens.
void look_at(const void* address, size_t bytes, uint32_t how, const void* at);

}  // namespace emulator
