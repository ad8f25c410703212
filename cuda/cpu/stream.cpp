// Streams and events: see stream.hpp.
//
// Threads are detached and own their stream, so a process may exit at any moment, and a stream may be closed by a caller who
// does not wait. Whoever needs the end waits for it in join().

#include "stream.hpp"

#include <time.h>

#include <atomic>
#include <chrono>
#include <utility>

#include "../abi/deepep.h"
#include "../api/thread.hpp"
#include "../common/failure.hpp"

namespace deepep {

uint64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}
void Record::complete(std::shared_ptr<const Status> failure) {
  std::vector<Watcher> watchers;
  {
    const std::lock_guard lock(mutex_);
    failure_ = std::move(failure);
    ended_ns_ = now_ns();
    done_.store(true, std::memory_order_release);
    watchers.swap(watchers_);
  }
  ended_.notify_all();
  for (const Watcher& watcher : watchers) watcher(*this);
}

void Record::wait() {
  if (done()) return;
  std::unique_lock lock(mutex_);
  // Pairs with the store in complete(); always comes, since the stream that holds the record drains.
  ended_.wait(lock, [this] { return done(); });
}

bool Record::wait_for(uint64_t timeout_ns) {
  if (done()) return true;
  std::unique_lock lock(mutex_);
  return ended_.wait_for(lock, std::chrono::nanoseconds(timeout_ns), [this] { return done(); });
}

void Record::watch(Watcher watcher) {
  {
    const std::lock_guard lock(mutex_);
    if (!done()) {
      watchers_.push_back(std::move(watcher));
      return;
    }
  }
  watcher(*this);
}

bool Stream::idle_locked() {
  // Waits that were enqueued quietly and have been fulfilled since hold nobody up.
  while (!running_ && !entries_.empty() && !entries_.front().task && entries_.front().wait->done()) entries_.pop_front();
  return entries_.empty() && !running_;
}

std::shared_ptr<Stream> Stream::start(const std::string& name) {
  auto stream = std::make_shared<Stream>();
  start_thread(name, [stream] { stream->run(); });
  return stream;
}

void Stream::run() {
  std::unique_lock lock(mutex_);
  for (;;) {
    // Waits that no task follows need no thread: they stay until a task comes, or until they are found fulfilled.
    while (num_tasks_ == 0 && !closed_) {
      asleep_ = true;
      wake_.wait(lock);  // Pairs with push() and close().
      asleep_ = false;
    }
    if (entries_.empty()) break;
    Entry entry = std::move(entries_.front());
    entries_.pop_front();
    if (entry.task) num_tasks_ -= 1;
    running_ = true;
    lock.unlock();
    if (entry.wait) entry.wait->wait();
    try {
      if (entry.task) entry.task();
    } catch (...) {
      // Tasks report their failures themselves; one that could not must not end the process.
    }
    entry = {};  // What the task held may be large: not under the lock.
    lock.lock();
    running_ = false;
  }
  has_ended_ = true;
  // Under the lock: join()'s caller may drop the last other reference as soon as it can see has_ended_.
  ended_.notify_all();
}

bool Stream::push(Task task) {
  bool wake;
  {
    const std::lock_guard lock(mutex_);
    if (closed_) return false;
    entries_.push_back({std::move(task), nullptr});
    num_tasks_ += 1;
    wake = std::exchange(asleep_, false);
  }
  if (wake) wake_.notify_one();
  return true;
}

bool Stream::push_wait(std::shared_ptr<Record> record) {
  if (!record || record->done()) return !closed();
  const std::lock_guard lock(mutex_);
  if (closed_) return false;
  idle_locked();  // drops fulfilled waits, which nothing else may do for long
  // While a record is pending its stream lives, so that no other has its address.
  const Record* const last = entries_.empty() ? nullptr : entries_.back().wait.get();
  if (last && !last->done() && record->ends_on && last->ends_on == record->ends_on) {
    if (record->nth <= last->nth) return true;  // implied by that one
    entries_.pop_back();                        // implied by this one
  }
  entries_.push_back({nullptr, std::move(record)});
  return true;
}

bool Stream::push_record(const std::shared_ptr<Record>& record) {
  std::vector<std::shared_ptr<Record>> waits;
  {
    const std::lock_guard lock(mutex_);
    if (closed_) return false;
    if (!idle_locked()) {
      if (running_ || num_tasks_ > 0) {
        entries_.push_back({[record] { record->complete(); }, nullptr});
        num_tasks_ += 1;
        if (std::exchange(asleep_, false)) wake_.notify_one();
        return true;
      }
      for (const Entry& entry : entries_) waits.push_back(entry.wait);
    }
  }
  if (waits.empty()) {
    record->complete();
    return true;
  }
  // Nothing but waits: the record ends with the last of them. Its status is its own, not that of what was awaited.
  auto num_left = std::make_shared<std::atomic<size_t>>(waits.size());
  for (const auto& wait : waits) {
    wait->watch([record, num_left](const Record&) {
      if (num_left->fetch_sub(1, std::memory_order_acq_rel) == 1) record->complete();
    });
  }
  return true;
}

std::shared_ptr<Record> Stream::record() {
  {
    const std::lock_guard lock(mutex_);
    if (closed_ || idle_locked()) return nullptr;
  }
  auto record = std::make_shared<Record>();
  return push_record(record) ? record : nullptr;
}

void Stream::close() {
  {
    const std::lock_guard lock(mutex_);
    closed_ = true;
  }
  wake_.notify_all();
}

void Stream::join() {
  std::unique_lock lock(mutex_);
  ended_.wait(lock, [this] { return has_ended_; });  // Pairs with the end of run().
}

bool Stream::closed() {
  const std::lock_guard lock(mutex_);
  return closed_;
}

bool Stream::has_ended() {
  const std::lock_guard lock(mutex_);
  return has_ended_;
}

std::shared_ptr<Record> present_work(Stream& stream) {
  if (stream.closed()) reject(DEEPEP_ERROR_CLOSED, "the stream was destroyed");
  return stream.record();
}

void push(Stream& stream, Stream::Task task) {
  if (!stream.push(std::move(task))) reject(DEEPEP_ERROR_CLOSED, "the stream was destroyed");
}

std::shared_ptr<Record> Event::latest() {
  const std::lock_guard lock(mutex_);
  return latest_;
}

void Event::set(std::shared_ptr<Record> record) {
  const std::lock_guard lock(mutex_);
  latest_.swap(record);
}

}  // namespace deepep
