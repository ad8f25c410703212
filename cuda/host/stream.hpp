// Streams and events of the CUDA backend: a stream is a cudaStream_t, anybody's; an event a box for the latest record.
//
// In: streams as 64-bit numbers, which must be alive. Out: Records, points in a stream. Each time an event is recorded it gets
// a new record with a cudaEvent_t of its own, so that who waits for, or is to be told of, what was recorded before is not
// disturbed. Callers: enqueue, the C ABI of streams and events, slots, memory that is freed in stream order.
//
// Captures. A record marked in one orders nodes of its graph and is no node itself: as one it would be a side branch, and CUDA
// runs a graph that branches over several channels, where graphs of ranks that share a device hold each other up. So replays
// say nothing through it, and asking it for anything outside of its capture is an error.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>

#include "../api/statuses.hpp"

namespace deepep {

// A capture in progress on a stream: nothing runs, it is recorded into a graph. 0 = none.
using CaptureId = unsigned long long;

// A point in a stream: pending, then done for good, with the status of the operation that ended there.
class Record {
 public:
  // Takes a cudaEvent_t of the device from a pool. Such an event counts as done until it is recorded. One that keeps the time,
  // for deepep_event_elapsed, costs the caller a microsecond more to record.
  explicit Record(int device, bool timed = false);
  ~Record();
  Record(const Record&) = delete;
  Record& operator=(const Record&) = delete;

  // Marks the present end of the stream; in a capture (`capture` is its number) the end of what was captured so far. Rejects
  // with SYSTEM.
  void mark(cudaStream_t stream, CaptureId capture);
  // Makes later work of the stream, which is in this capture, wait for this point. What was marked outside every replay waits
  // for, unless it is reached already: then answers true, and the record must live as long as the graph. Rejects as
  // check_capture() does, and with SYSTEM.
  bool make_wait(cudaStream_t stream, CaptureId capture);
  // Rejects with INVALID_ARGUMENT what was marked in another capture than this one. The host is in none.
  void check_capture(CaptureId capture) const;

  // Whether the point has been reached. For an operation: whether the buffer has taken note of its end. Rejects as
  // check_capture(0) does.
  bool done();
  // Why the operation failed, or nullptr. Valid once done.
  std::shared_ptr<const Status> failure() const;
  int32_t status() const;

  // The point is the end of an operation of a buffer, which calls complete() when it has taken note of it.
  void belong_to_operation() { is_operation_ = true; }
  void complete(std::shared_ptr<const Status> failure);

  bool is_operation() const { return is_operation_; }
  // That it was marked on, outside of captures; 0 = none. Streams have come to their records in the order of the marks.
  unsigned long long stream() const { return stream_; }
  // Whether it was marked on the stream of that number, as far as the number tells: it may have been another one's before.
  bool is_marked_on(uint64_t stream) const { return stream != 0 && stream_number_ == stream; }
  cudaEvent_t event() const { return event_; }
  bool is_timed() const { return timed_; }

 private:
  const int device_;
  const bool timed_;
  cudaEvent_t event_ = nullptr;
  CaptureId capture_ = 0;          // that it was marked in
  unsigned long long stream_ = 0;  // that it was marked on, outside of captures; 0 = none
  uint64_t stream_number_ = 0;     // the same as a number of the ABI
  bool is_operation_ = false;
  std::atomic<bool> done_{false};
  mutable std::mutex mutex_;
  std::shared_ptr<const Status> failure_;
};

// What deepep_event_create makes: the latest record, or nullptr before the first (it counts as done).
struct Event {
  std::weak_ptr<void> owner;
  uint64_t id = 0;
  int device = 0;

  std::shared_ptr<Record> latest();
  void set(std::shared_ptr<Record> record);

 private:
  std::mutex mutex_;
  std::shared_ptr<Record> latest_;
};

// A number of the caller as a stream; 0 is nullptr. Rejects what cannot be one, with INVALID_ARGUMENT, and a stream of this
// library that was destroyed, with CLOSED.
cudaStream_t stream_of(uint64_t stream, const char* name);
// The capture in progress on the stream. Rejects where CUDA cannot tell because somebody captures beside the legacy stream.
CaptureId capture_of(cudaStream_t stream);

// After a captured stream was made to wait: its next node need not wait for what comes before the rest of what it waits for.
// CUDA keeps such edges, and calls one after another would not be a chain. Best effort: without it the graph is the same.
void drop_passed(cudaStream_t stream) noexcept;

// Streams that this library has made: it takes only these back. `owner` is the buffer.
cudaStream_t make_stream(std::weak_ptr<void> owner);
// The communication stream of a buffer, which deepep_stream_destroy refuses. Its blocks go first where there is a choice.
cudaStream_t make_comm_stream(std::weak_ptr<void> owner);
std::weak_ptr<void> stream_owner(uint64_t stream);
// Ends a stream of make_stream() after its work. Rejects any other.
void destroy_stream(uint64_t stream);
// The same for a buffer's destroy, which has waited for the work: of either kind; not an error when it is gone.
void drop_stream(cudaStream_t stream) noexcept;

// An event for ordering streams only, of the present device.
cudaEvent_t make_order_event();

}  // namespace deepep
