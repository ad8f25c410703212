// The watchdog: see watchdog.hpp.

#include "watchdog.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <mutex>
#include <vector>

#include "../api/thread.hpp"
#include "buffer.hpp"

namespace deepep {
namespace {

constexpr std::chrono::milliseconds kRound{10};   // how late the end of a peer is seen
constexpr std::chrono::milliseconds kRest{1000};  // a safety net only: whoever enqueues wakes it
constexpr std::chrono::seconds kLastRound{1};     // how long the end of the process waits for a round
constexpr int kLingering = 50;  // rounds with nothing to do before it sleeps: to be woken costs the caller microseconds

struct Watchdog {
  std::mutex mutex;
  std::condition_variable wake;
  std::atomic<bool> asleep{false};
  std::condition_variable rested;  // a round has ended
  bool started = false;
  bool looking = false;  // a round runs: buffers are held
  bool ended = false;    // the process ends: CUDA must not be called any more
  std::vector<std::weak_ptr<Buffer>> buffers;
};

Watchdog& watchdog() {
  static Watchdog* const leaked = new Watchdog;
  return *leaked;
}

// Looks after all of them once. True when one wants it again.
bool look(Watchdog& self) {
  std::vector<std::shared_ptr<Buffer>> present;
  {
    const std::lock_guard lock(self.mutex);
    if (self.ended) return false;
    self.looking = true;
    std::erase_if(self.buffers, [](const auto& buffer) { return buffer.expired(); });
    for (const auto& weak : self.buffers) {
      if (auto buffer = weak.lock()) present.push_back(std::move(buffer));
    }
  }
  bool again = false;
  for (const auto& buffer : present) again |= buffer->watch();
  present.clear();
  {
    const std::lock_guard lock(self.mutex);
    self.looking = false;
  }
  self.rested.notify_all();
  return again;
}

// At the process's end, before CUDA's own: what the thread would ask CUDA then, it would ask of what is gone.
void end() {
  Watchdog& self = watchdog();
  std::unique_lock lock(self.mutex);
  self.ended = true;
  self.rested.wait_for(lock, kLastRound, [&self] { return !self.looking; });
}

void run(Watchdog& self) {
  cudaStreamCaptureMode mode = cudaStreamCaptureModeRelaxed;  // for good: this thread captures nothing
  cudaThreadExchangeStreamCaptureMode(&mode);
  for (int idle_rounds = 0;;) {
    // Announced before the last look: either the look finds what was enqueued, or watchdog_wake() finds the announcement.
    if (idle_rounds >= kLingering) self.asleep.store(true, std::memory_order_seq_cst);
    idle_rounds = look(self) ? 0 : idle_rounds + 1;
    std::unique_lock lock(self.mutex);
    if (idle_rounds <= kLingering) {
      self.asleep.store(false, std::memory_order_relaxed);
      self.wake.wait_for(lock, kRound);
    } else {
      // Pairs with watchdog_wake.
      const bool woken = self.wake.wait_for(lock, kRest, [&] { return !self.asleep.load(std::memory_order_relaxed); });
      idle_rounds = woken ? 0 : kLingering;
    }
  }
}

}  // namespace

void watchdog_add(std::weak_ptr<Buffer> buffer) {
  Watchdog& self = watchdog();
  const std::lock_guard lock(self.mutex);
  self.buffers.push_back(std::move(buffer));
  if (self.started) return;
  std::atexit(end);
  start_thread("ep-watchdog", [&self] { run(self); });
  self.started = true;
}

void watchdog_forget(const Buffer* buffer) {
  Watchdog& self = watchdog();
  std::unique_lock lock(self.mutex);
  std::erase_if(self.buffers, [buffer](const auto& weak) {
    const auto known = weak.lock();
    return !known || known.get() == buffer;
  });
  self.rested.wait(lock, [&self] { return !self.looking; });  // Pairs with look().
}

void watchdog_wake() noexcept {
  Watchdog& self = watchdog();
  if (!self.asleep.load(std::memory_order_seq_cst)) return;
  const std::lock_guard lock(self.mutex);
  self.asleep.store(false, std::memory_order_relaxed);
  self.wake.notify_one();
}

}  // namespace deepep
