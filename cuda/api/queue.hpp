// Completion queues: what native threads hand to the event loop.
//
// In: (id, status) from any thread. Out: deepep_completion entries, taken off by deepep_queue_drain, and optionally one call
// of a callback on a notifier thread. The queues live in cells that are never freed, so a drain of an empty queue is a few
// loads and no lock, and a drain or a push that comes after the destroy finds a cell of another generation instead of freed
// memory. Where nobody pushes by himself, because completions are words that a device writes, a queue has sources: a drain
// polls them first, and so does the notifier while it is armed.
#pragma once

#include <cstdint>
#include <memory>

#include "../abi/deepep.h"

namespace deepep {

// Something that pushes completions when it is asked to.
class Source {
 public:
  virtual ~Source() = default;
  // Pushes what has completed; a few loads when nothing has. From any thread; must not add or remove sources.
  virtual void poll() noexcept = 0;
  // Whether a completion may come without another call.
  virtual bool is_pending() const noexcept = 0;
};

// Makes a queue; the handle is never 0. Rejects with OUT_OF_MEMORY when there are too many.
uint64_t queue_create();
// That a buffer pushes into a queue: meanwhile the queue cannot be destroyed.
class QueueUse {
 public:
  QueueUse() = default;
  ~QueueUse() { end(); }
  QueueUse(const QueueUse&) = delete;
  QueueUse& operator=(const QueueUse&) = delete;
  // Rejects unless `queue` is alive. Once, or again after end().
  void begin(uint64_t queue);
  void end() noexcept;

 private:
  uint64_t queue_ = 0;
};
// Takes up to `capacity` entries off. Answers how many, or minus a DEEPEP_ERROR_* code.
int32_t queue_drain(uint64_t queue, deepep_completion* out, uint32_t capacity) noexcept;
// Appends an entry. A queue that was destroyed swallows it. From any thread; blocks on nothing but the other pushes.
void queue_push(uint64_t queue, uint64_t id, int32_t status);
// From now on a drain polls `source`, which stays alive until it is removed. Rejects unless the queue is alive.
void queue_add_source(uint64_t queue, std::shared_ptr<Source> source);
// When it returns, nobody polls the source any more. Not from poll().
void queue_remove_source(uint64_t queue, const Source* source);
// The notifier: DEEPEP_WAKE_*.
void queue_wake(uint64_t queue, uint32_t action, uint64_t callback);
// Drops what is queued. A notifier that still runs ends without another call of the callback. Rejects while it has users.
void queue_destroy(uint64_t queue);

}  // namespace deepep
