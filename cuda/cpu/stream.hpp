// Streams and events of the CPU backend: a stream is a thread with a queue, an event a box for the latest record.
//
// In: tasks, in the order in which they were pushed. Out: they run one after another on the stream's own thread. A Record
// marks a point of a stream; waiting for one blocks only the stream that waits. As in CUDA, a wait refers to the record that
// was the event's latest when the wait was enqueued. Records complete always, because streams drain before they end, and a
// wait can only name a record that was enqueued before it: so waits between streams cannot form a ring.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "../api/statuses.hpp"

namespace deepep {

// Nanoseconds of a clock that only goes forward.
uint64_t now_ns();

// A point in a stream: pending, then done for good, with the status of the operation that ended there.
class Record {
 public:
  using Watcher = std::function<void(const Record&)>;

  // Cheap; pairs with the release in complete().
  bool done() const { return done_.load(std::memory_order_acquire); }
  // Where asking costs something, this tells whether the point lies on a stream.
  bool is_marked_on(uint64_t /*stream*/) const { return false; }
  // Why the operation failed, or nullptr. Valid once done.
  const std::shared_ptr<const Status>& failure() const { return failure_; }
  int32_t status() const { return failure_ ? failure_->failure.code : 0; }
  // When it ended, by now_ns(). Valid once done.
  uint64_t ended_ns() const { return ended_ns_; }

  // Ends the record, once: wakes those who wait and calls the watchers on this thread.
  void complete(std::shared_ptr<const Status> failure = nullptr);
  // Blocks until complete() is called by the stream that the record was enqueued to.
  void wait();
  // The same with a limit; false when it passed first.
  bool wait_for(uint64_t timeout_ns);
  // Calls `watcher` once: now when the record is done, else from complete(). It must neither throw nor block.
  void watch(Watcher watcher);

  // The stream whose work ends here, if it is known, and the how many-th of its records this is: they complete in this order,
  // so who waits for a later one need not wait for the earlier ones. Set before the record is shared.
  const void* ends_on = nullptr;
  uint64_t nth = 0;

 private:
  std::atomic<bool> done_{false};
  std::shared_ptr<const Status> failure_;
  uint64_t ended_ns_ = 0;
  std::mutex mutex_;
  std::condition_variable ended_;
  std::vector<Watcher> watchers_;
};

// A thread with a queue.
class Stream : public std::enable_shared_from_this<Stream> {
 public:
  using Task = std::function<void()>;

  // Starts the thread; `name` is cut to 15 characters. Throws Rejected(SYSTEM) when no thread can be had.
  static std::shared_ptr<Stream> start(const std::string& name);

  // Enqueues a task; false when the stream was closed. Never blocks on tasks. What a task throws is swallowed.
  bool push(Task task);
  // Makes later tasks wait for `record`. Does not wake the thread: nothing can depend on a wait that no task follows.
  bool push_wait(std::shared_ptr<Record> record);
  // A record of the present work; nullptr when there is none (it counts as done).
  std::shared_ptr<Record> record();
  // Enqueues the completion of a record; false when the stream was closed. Completes it at once when the stream is idle, and
  // from whoever ends the last awaited record when nothing but waits is enqueued: no thread has to wake for either.
  bool push_record(const std::shared_ptr<Record>& record);

  // No more tasks are taken; the thread ends after those it has.
  void close();
  // Blocks until the thread of a closed stream has run its last task.
  void join();
  bool closed();
  bool has_ended();

  uint64_t id = 0;                 // handle in the registry
  std::weak_ptr<void> owner;       // the Buffer it was made from
  bool owned_by_buffer = false;    // the communication stream: deepep_stream_destroy refuses it

 private:
  struct Entry {
    Task task;
    std::shared_ptr<Record> wait;
  };
  void run();
  bool idle_locked();

  std::mutex mutex_;
  std::condition_variable wake_;   // run() sleeps here; push() and close() wake it
  std::condition_variable ended_;  // join() sleeps here; the end of run() wakes it
  std::deque<Entry> entries_;
  size_t num_tasks_ = 0;           // entries that are no waits
  bool running_ = false;
  bool asleep_ = false;
  bool closed_ = false;
  bool has_ended_ = false;
};

// The present work of a stream, or nullptr; rejects one that was destroyed meanwhile.
std::shared_ptr<Record> present_work(Stream& stream);
// Enqueues a task, with the same rejection.
void push(Stream& stream, Stream::Task task);

// What deepep_event_create makes: the latest record, or nullptr before the first (it counts as done).
struct Event {
  std::weak_ptr<void> owner;
  uint64_t id = 0;

  std::shared_ptr<Record> latest();
  void set(std::shared_ptr<Record> record);

 private:
  std::mutex mutex_;
  std::shared_ptr<Record> latest_;
};

}  // namespace deepep
