// The watchdog: see watchdog.hpp.

#include "watchdog.hpp"

#include <unistd.h>

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
constexpr std::chrono::seconds kLastRound{1};     // how long the end of the process waits for the thread
constexpr int kLingering = 50;  // rounds with nothing to do before it sleeps: to be woken costs the caller microseconds

struct Watchdog {
  std::mutex mutex;
  std::condition_variable wake;
  std::atomic<bool> asleep{false};
  std::condition_variable rested;  // `held` has changed
  pid_t process = 0;               // that the thread was started in; 0 = it was not
  const Buffer* held = nullptr;    // that is looked after now, as the one buffer that the thread holds
  bool ended = false;              // the process ends: CUDA must not be called any more
  std::vector<std::weak_ptr<Buffer>> buffers;
};

Watchdog& watchdog() {
  static Watchdog* const leaked = new Watchdog;
  return *leaked;
}

// Looks after all of them once, one after another. True when one wants it again.
bool look(Watchdog& self) {
  bool again = false;
  for (size_t i = 0;; ++i) {
    std::shared_ptr<Buffer> buffer;
    {
      const std::lock_guard lock(self.mutex);
      if (i == 0) std::erase_if(self.buffers, [](const auto& known) { return known.expired(); });
      if (self.ended || i >= self.buffers.size()) return again;
      buffer = self.buffers[i].lock();
      self.held = buffer.get();
    }
    if (!buffer) continue;
    again |= buffer->watch();
    buffer = nullptr;
    {
      const std::lock_guard lock(self.mutex);
      self.held = nullptr;
    }
    self.rested.notify_all();
  }
}

// At the process's end, before CUDA's own: what the thread would ask CUDA then, it would ask of what is gone. Not in a child,
// which has no such thread.
void end() {
  Watchdog& self = watchdog();
  if (self.process != getpid()) return;
  std::unique_lock lock(self.mutex);
  self.ended = true;
  self.rested.wait_for(lock, kLastRound, [&self] { return self.held == nullptr; });
}

void run(Watchdog& self) {
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
  if (self.process != 0) return;
  start_thread("ep-watchdog", [&self] { run(self); });
  self.process = getpid();
  std::atexit(end);
}

void watchdog_forget(const std::shared_ptr<Buffer>& buffer) {
  Watchdog& self = watchdog();
  std::unique_lock lock(self.mutex);
  std::erase_if(self.buffers,
                [&buffer](const auto& known) { return !known.owner_before(buffer) && !buffer.owner_before(known); });
  self.rested.wait(lock, [&] { return self.held != buffer.get(); });  // Pairs with look().
}

void watchdog_wake() noexcept {
  Watchdog& self = watchdog();
  if (!self.asleep.load(std::memory_order_seq_cst)) return;
  const std::lock_guard lock(self.mutex);
  self.asleep.store(false, std::memory_order_relaxed);
  self.wake.notify_one();
}

}  // namespace deepep
