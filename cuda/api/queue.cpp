// Completion queues: see queue.hpp.
//
// A cell's `handle` says which queue lives in it and `num_ready` whether a drain has anything to do; both are read without the
// lock. The notifier is a thread that sleeps until it is armed and something is ready; it calls the callback with no lock held.

#include "queue.hpp"

#include <sys/prctl.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <vector>

#include "../common/failure.hpp"
#include "registry.hpp"
#include "thread.hpp"

namespace deepep {
namespace {

using Callback = void (*)(uint32_t kind);

// The thread that calls back. Shared with that thread, which may outlive the queue.
struct Notifier {
  std::mutex mutex;
  std::condition_variable wake;   // the thread sleeps here; arm, ready and stop wake it
  std::condition_variable ended;  // JOIN sleeps here; the thread's end wakes it
  Callback callback = nullptr;
  bool armed = false;
  bool ready = false;
  bool stop = false;
  bool silent = false;  // end without the last call
  bool has_ended = false;
};

struct Cell {
  std::atomic<uint64_t> handle{0};     // of the queue that lives here; 0 = free
  std::atomic<uint32_t> num_ready{0};  // entries; stored under the mutex
  std::mutex mutex;
  uint64_t generation = 0;
  uint32_t num_users = 0;  // without users there are no sources
  std::deque<deepep_completion> entries;
  std::shared_ptr<Notifier> notifier;

  std::atomic<uint32_t> num_sources{0};  // stored under sources_mutex, which is locked before any other
  std::mutex sources_mutex;
  std::vector<std::shared_ptr<Source>> sources;
};

// How long the armed notifier sleeps between two polls of the sources: while something is pending, and otherwise.
constexpr std::chrono::microseconds kPollPause{50};
constexpr std::chrono::microseconds kIdlePause{500};

// Cells come in chunks that stay where they are, so that a handle leads to its cell without a lock.
constexpr uint64_t kChunk = 64;
constexpr uint64_t kMaxChunks = 1024;
constexpr uint32_t kIndexBits = 24;

struct Cells {
  std::mutex mutex;
  std::atomic<Cell*> chunks[kMaxChunks] = {};
  uint64_t num_cells = 0;
  std::vector<uint32_t> free;
};

Cells& cells() {
  static Cells* const leaked = new Cells;
  return *leaked;
}

// nullptr when the handle cannot be one of a queue. Pairs with the release in queue_create.
Cell* cell_of(uint64_t queue) {
  const uint64_t index = queue & ((uint64_t{1} << kIndexBits) - 1);
  if (queue >> 56 != static_cast<uint64_t>(Kind::queue) || index >= kChunk * kMaxChunks) return nullptr;
  Cell* const chunk = cells().chunks[index / kChunk].load(std::memory_order_acquire);
  return chunk ? &chunk[index % kChunk] : nullptr;
}

// The cell of a queue that lives; the caller looks again once it has locked it.
Cell& living_cell(uint64_t queue) {
  Cell* const cell = cell_of(queue);
  const auto shown = static_cast<unsigned long long>(queue);
  if (!cell) {
    const uint64_t kind = queue >> 56;
    if (kind >= 1 && kind <= static_cast<uint64_t>(kLastKind) && kind != static_cast<uint64_t>(Kind::queue)) {
      reject(DEEPEP_ERROR_INVALID_ARGUMENT, "queue 0x%llx is the handle of something else (%s)", shown,
             kind_name(static_cast<Kind>(kind)));
    }
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "queue 0x%llx is no queue of this library", shown);
  }
  if (cell->handle.load(std::memory_order_acquire) == queue) return *cell;
  const std::lock_guard lock(cell->mutex);
  const uint64_t generation = queue << 8 >> (8 + kIndexBits);
  if (generation == 0 || generation > cell->generation) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "queue 0x%llx is no queue of this library", shown);
  }
  reject(DEEPEP_ERROR_CLOSED, "queue 0x%llx was destroyed", shown);
}

// Polls what pushes into the cell's queue. True when a completion may come without another call.
bool poll_sources(Cell& cell) {
  const std::lock_guard lock(cell.sources_mutex);
  bool pending = false;
  for (const auto& source : cell.sources) {
    source->poll();
    pending |= source->is_pending();
  }
  return pending;
}

bool has_sources(const Cell& cell) { return cell.num_sources.load(std::memory_order_relaxed) != 0; }

// Sleeps until there is something to call back for. `lock` holds the notifier's mutex, which is released meanwhile.
void notifier_wait(Notifier& self, Cell& cell, std::unique_lock<std::mutex>& lock) {
  const auto has_work = [&] { return self.stop || (self.armed && self.ready); };
  while (!has_work()) {
    // Pairs with queue_push (ready), ARM (armed), STOP and queue_destroy (stop).
    if (!self.armed || !has_sources(cell)) {
      self.wake.wait(lock, [&] { return has_work() || (self.armed && has_sources(cell)); });
      continue;
    }
    lock.unlock();
    const bool pending = poll_sources(cell);
    lock.lock();
    self.wake.wait_for(lock, pending ? kPollPause : kIdlePause, has_work);
  }
}

void notifier_run(const std::shared_ptr<Notifier>& self, Cell& cell) {
  prctl(PR_SET_TIMERSLACK, 1000UL);  // The kernel may draw a pause out by so many nanoseconds; by default by 50 µs.
  std::unique_lock lock(self->mutex);
  for (;;) {
    notifier_wait(*self, cell, lock);
    const bool last = self->stop;
    self->armed = false;
    if (!(last && self->silent)) {
      lock.unlock();
      self->callback(last ? 1 : 0);
      lock.lock();
    }
    if (last) break;
  }
  self->has_ended = true;
  self->ended.notify_all();
}

void start_notifier(Cell& cell, uint64_t callback) {
  if (cell.notifier) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "the notifier was started already");
  if (callback == 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "callback is 0");
  auto notifier = std::make_shared<Notifier>();
  notifier->callback = reinterpret_cast<Callback>(callback);
  notifier->ready = !cell.entries.empty();
  start_thread("ep-notify", [notifier, &cell] { notifier_run(notifier, cell); });
  cell.notifier = std::move(notifier);
}

// Sets one of the notifier's conditions, and wakes it if it has something to do, which includes to poll sources.
void tell(const std::shared_ptr<Notifier>& notifier, bool Notifier::* what, bool polls = false) {
  bool wake;
  {
    const std::lock_guard lock(notifier->mutex);
    notifier.get()->*what = true;
    wake = notifier->stop || (notifier->armed && (notifier->ready || polls));
  }
  if (wake) notifier->wake.notify_one();
}

std::shared_ptr<Notifier> notifier_of(const Cell& cell) {
  if (!cell.notifier) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "the notifier was not started");
  return cell.notifier;
}

void join_notifier(uint64_t queue, const std::shared_ptr<Notifier>& notifier) {
  {
    std::unique_lock lock(notifier->mutex);
    if (!notifier->stop) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "the notifier was not told to STOP");
    notifier->ended.wait(lock, [&] { return notifier->has_ended; });  // Pairs with the end of notifier_run.
  }
  Cell& cell = living_cell(queue);
  const std::lock_guard lock(cell.mutex);
  if (cell.notifier == notifier) cell.notifier = nullptr;
}

// Rejects when the queue has gone since its cell was found.
std::unique_lock<std::mutex> lock_living(Cell& cell, uint64_t queue) {
  std::unique_lock lock(cell.mutex);
  if (cell.handle.load(std::memory_order_relaxed) != queue) reject(DEEPEP_ERROR_CLOSED, "the queue was destroyed meanwhile");
  return lock;
}

}  // namespace

uint64_t queue_create() {
  Cells& all = cells();
  const std::lock_guard lock(all.mutex);
  if (all.free.empty()) {
    const uint64_t chunk = all.num_cells / kChunk;
    if (chunk == kMaxChunks) {
      reject(DEEPEP_ERROR_OUT_OF_MEMORY, "%llu queues exist already", static_cast<unsigned long long>(all.num_cells));
    }
    all.free.reserve(all.num_cells + kChunk);  // so that queue_destroy never allocates
    all.chunks[chunk].store(new Cell[kChunk], std::memory_order_release);
    for (uint64_t i = kChunk; i-- > 0;) all.free.push_back(static_cast<uint32_t>(all.num_cells + i));
    all.num_cells += kChunk;
  }
  const uint32_t index = all.free.back();
  all.free.pop_back();
  Cell& cell = all.chunks[index / kChunk].load(std::memory_order_relaxed)[index % kChunk];
  const std::lock_guard cell_lock(cell.mutex);
  cell.generation += 1;
  const uint64_t generation = cell.generation & 0xFFFFFFFF;
  const uint64_t handle = static_cast<uint64_t>(Kind::queue) << 56 | generation << kIndexBits | index;
  cell.handle.store(handle, std::memory_order_release);
  return handle;
}

void QueueUse::begin(uint64_t queue) {
  Cell& cell = living_cell(queue);
  const auto lock = lock_living(cell, queue);
  cell.num_users += 1;
  queue_ = queue;
}

void QueueUse::end() noexcept {
  Cell* const cell = queue_ != 0 ? cell_of(queue_) : nullptr;
  if (!cell) return;
  const std::lock_guard lock(cell->mutex);
  cell->num_users -= 1;
  queue_ = 0;
}

int32_t queue_drain(uint64_t queue, deepep_completion* out, uint32_t capacity) noexcept {
  Cell* const cell = cell_of(queue);
  if (!cell) return -DEEPEP_ERROR_INVALID_ARGUMENT;
  if (cell->handle.load(std::memory_order_relaxed) != queue) return -DEEPEP_ERROR_CLOSED;
  if (has_sources(*cell)) poll_sources(*cell);
  if (cell->num_ready.load(std::memory_order_relaxed) == 0) return 0;
  if (!out) return capacity == 0 ? 0 : -DEEPEP_ERROR_INVALID_ARGUMENT;
  // The mutex pairs with queue_push: what was done before the push is seen by the caller.
  const std::lock_guard lock(cell->mutex);
  if (cell->handle.load(std::memory_order_relaxed) != queue) return -DEEPEP_ERROR_CLOSED;
  uint32_t taken = 0;
  while (taken < capacity && taken < INT32_MAX && !cell->entries.empty()) {
    out[taken++] = cell->entries.front();
    cell->entries.pop_front();
  }
  cell->num_ready.store(static_cast<uint32_t>(cell->entries.size()), std::memory_order_relaxed);
  if (cell->notifier && cell->entries.empty()) {
    const std::lock_guard notifier_lock(cell->notifier->mutex);
    cell->notifier->ready = false;
  }
  return static_cast<int32_t>(taken);
}

void queue_push(uint64_t queue, uint64_t id, int32_t status) {
  Cell* const cell = cell_of(queue);
  if (!cell) return;
  const std::lock_guard lock(cell->mutex);
  if (cell->handle.load(std::memory_order_relaxed) != queue) return;
  cell->entries.push_back({id, status, 0});
  cell->num_ready.store(static_cast<uint32_t>(cell->entries.size()), std::memory_order_relaxed);
  if (cell->notifier) tell(cell->notifier, &Notifier::ready);
}

void queue_add_source(uint64_t queue, std::shared_ptr<Source> source) {
  Cell& cell = living_cell(queue);
  const std::lock_guard sources_lock(cell.sources_mutex);
  const auto lock = lock_living(cell, queue);
  cell.sources.push_back(std::move(source));
  cell.num_sources.store(static_cast<uint32_t>(cell.sources.size()), std::memory_order_relaxed);
}

void queue_remove_source(uint64_t queue, const Source* source) {
  Cell* const cell = cell_of(queue);
  if (!cell) return;
  // Of whatever queue lives in the cell now: the source is in none, or in the one it was added to.
  const std::lock_guard lock(cell->sources_mutex);
  std::erase_if(cell->sources, [&](const auto& kept) { return kept.get() == source; });
  cell->num_sources.store(static_cast<uint32_t>(cell->sources.size()), std::memory_order_relaxed);
}

void queue_wake(uint64_t queue, uint32_t action, uint64_t callback) {
  Cell& cell = living_cell(queue);
  std::unique_lock lock(cell.mutex);
  switch (action) {
    case DEEPEP_WAKE_START: return start_notifier(cell, callback);
    case DEEPEP_WAKE_ARM: return tell(notifier_of(cell), &Notifier::armed, has_sources(cell));
    case DEEPEP_WAKE_STOP: return tell(notifier_of(cell), &Notifier::stop);
    case DEEPEP_WAKE_JOIN: {
      const auto notifier = notifier_of(cell);
      lock.unlock();
      return join_notifier(queue, notifier);
    }
  }
  reject(DEEPEP_ERROR_INVALID_ARGUMENT, "action is %u, at most %u", action, DEEPEP_WAKE_JOIN);
}

void queue_destroy(uint64_t queue) {
  Cell& cell = living_cell(queue);
  std::shared_ptr<Notifier> notifier;
  {
    const std::lock_guard lock(cell.mutex);
    if (cell.handle.load(std::memory_order_relaxed) == queue && cell.num_users != 0) {
      reject(DEEPEP_ERROR_INVALID_ARGUMENT, "%u buffers use the queue: destroy them first", cell.num_users);
    }
    uint64_t expected = queue;
    if (!cell.handle.compare_exchange_strong(expected, 0)) reject(DEEPEP_ERROR_CLOSED, "the queue was destroyed meanwhile");
    cell.entries.clear();
    cell.num_ready.store(0, std::memory_order_relaxed);
    notifier.swap(cell.notifier);
  }
  if (notifier) {
    tell(notifier, &Notifier::silent);
    tell(notifier, &Notifier::stop);
  }
  Cells& all = cells();
  const std::lock_guard lock(all.mutex);
  all.free.push_back(static_cast<uint32_t>(queue & ((uint64_t{1} << kIndexBits) - 1)));
}

}  // namespace deepep
