// The watchdog: see watchdog.hpp.

#include "watchdog.hpp"

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <mutex>
#include <vector>

#include "../api/thread.hpp"
#include "buffer.hpp"

namespace deepep {
namespace {

constexpr std::chrono::milliseconds kRound{10};   // how late the end of a peer is seen
constexpr std::chrono::milliseconds kRest{1000};  // a safety net only: whoever enqueues wakes it
constexpr int kLingering = 50;  // rounds with nothing to do before it sleeps: to be woken costs the caller microseconds

struct Watchdog {
  std::mutex mutex;
  std::condition_variable wake;
  std::atomic<bool> asleep{false};
  bool started = false;
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
    std::erase_if(self.buffers, [](const auto& buffer) { return buffer.expired(); });
    for (const auto& weak : self.buffers) {
      if (auto buffer = weak.lock()) present.push_back(std::move(buffer));
    }
  }
  bool again = false;
  for (const auto& buffer : present) again |= buffer->watch();
  return again;
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
  start_thread("ep-watchdog", [&self] { run(self); });
  self.started = true;
}

void watchdog_wake() noexcept {
  Watchdog& self = watchdog();
  if (!self.asleep.load(std::memory_order_seq_cst)) return;
  const std::lock_guard lock(self.mutex);
  self.asleep.store(false, std::memory_order_relaxed);
  self.wake.notify_one();
}

}  // namespace deepep
