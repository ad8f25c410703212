// Streams and events of the CUDA backend: a stream is a cudaStream_t, anybody's; an event a box for the latest record.
//
// In: streams as 64-bit numbers, which must be alive. Out: Records, points in a stream. Each time an event is recorded it gets
// a new record with a cudaEvent_t of its own, so that who waits for, or is to be told of, what was recorded before is not
// disturbed. Callers: enqueue, the C ABI of streams and events, slots, memory that is freed in stream order.
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

  // Marks the present end of the stream; in a capture (`capture` is its number) the end of what was captured so far, and every
  // replay marks it anew. Rejects with SYSTEM.
  void mark(cudaStream_t stream, CaptureId capture);
  // Makes later work of the stream wait for this point. In the capture that has marked it this orders nodes of the graph; in
  // another one every replay waits. Nothing to do when it is reached already. Rejects with SYSTEM.
  void make_wait(cudaStream_t stream, CaptureId capture);

  // Whether the point has been reached. For an operation: whether the buffer has taken note of its end.
  bool done();
  // Why the operation failed, or nullptr. Valid once done.
  std::shared_ptr<const Status> failure() const;
  int32_t status() const;

  // The point is the end of an operation of a buffer, which calls complete() when it has taken note of it.
  void belong_to_operation() { is_operation_ = true; }
  void complete(std::shared_ptr<const Status> failure);

  bool is_operation() const { return is_operation_; }
  bool is_captured() const { return capture_ != 0; }
  cudaEvent_t event() const { return event_; }
  bool is_timed() const { return timed_; }

 private:
  const int device_;
  const bool timed_;
  cudaEvent_t event_ = nullptr;
  cudaEvent_t inner_ = nullptr;    // orders nodes within the capture
  CaptureId capture_ = 0;          // that has marked it
  unsigned long long stream_ = 0;  // that it was marked on, outside of captures; 0 = none
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
