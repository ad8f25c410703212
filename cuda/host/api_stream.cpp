// The C ABI, part 3, over CUDA: streams, events, memory, copies.
//
// In: calls of any thread. Out: see deepep.h, where every function is documented. A stream is a cudaStream_t as a number, and
// may be anybody's.

#include <chrono>
#include <thread>

#include "../api/border.hpp"
#include "../api/checks.hpp"
#include "buffer.hpp"

using namespace deepep;

namespace {

std::shared_ptr<Event> find_event(Call& call, uint64_t handle) {
  auto event = find<Event>(Kind::event, handle, "event");
  note_owner(call, event->owner);
  use_device(event->device);
  return event;
}

// The stream of a copy: 0 is refused, so that nothing comes to be on the legacy default stream unasked.
cudaStream_t given_stream(uint64_t stream) {
  if (stream == 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "stream is 0");
  return stream_of(stream, "stream");
}

// Takes note of what the buffer's operations have come to.
void reap(const std::shared_ptr<Buffer>& buffer) {
  if (buffer) buffer->poll();
}

std::shared_ptr<Buffer> owner_of(const std::weak_ptr<void>& owner) { return std::static_pointer_cast<Buffer>(owner.lock()); }

// A communication stream, of whichever buffer, stands for all operations, also those that ran on another stream: what is put
// on it comes after them, and before those that come.
void settle_if_comm(cudaStream_t stream) {
  const auto buffer = owner_of(stream_owner(reinterpret_cast<uint64_t>(stream)));
  if (!buffer || stream != buffer->comm()) return;
  const std::lock_guard lock(buffer->mutex);
  if (buffer->present_capture() == 0) buffer->settle();
}

}  // namespace

extern "C" {

int32_t deepep_alloc(uint64_t handle, deepep_alloc_args* args, deepep_error* error) {
  return cross("allocate memory", DEEPEP_OP_NONE, error, [&](Call& call) {
    check(args);
    const auto buffer = find_buffer(call, handle);
    if (args->kind > DEEPEP_MEMORY_HOST) {
      reject(DEEPEP_ERROR_INVALID_ARGUMENT, "kind is %u, at most %u", args->kind, DEEPEP_MEMORY_HOST);
    }
    use_device(buffer->device->index);
    buffer->poll();  // Blocks whose streams have come so far can be used again.
    MemoryPool& pool = args->kind == DEEPEP_MEMORY_HOST ? *buffer->pinned_pool : *buffer->device_pool;
    args->address = reinterpret_cast<uint64_t>(pool.allocate(args->bytes));
  });
}

int32_t deepep_free(uint64_t handle, deepep_alloc_args* args, deepep_error* error) {
  return cross("free memory", DEEPEP_OP_NONE, error, [&](Call& call) {
    check(args);
    const auto buffer = find_buffer(call, handle);
    const uint64_t address = args->address;
    MemoryPool& pool = buffer->pinned_pool->owns(address) ? *buffer->pinned_pool : *buffer->device_pool;
    if (args->stream == 0) {
      pool.disown(address);
      return pool.recycle(address);
    }
    use_device(buffer->device->index);
    const cudaStream_t stream = stream_of(args->stream, "stream");
    settle_if_comm(stream);
    const CaptureId capture = capture_of(stream);
    const std::lock_guard lock(buffer->mutex);
    buffer->check_open();
    std::shared_ptr<Record> record;
    if (capture == 0) {
      record = std::make_shared<Record>(buffer->device->index);
      record->mark(stream, 0);
    }
    pool.disown(address);
    // What a graph uses stays taken: its replays will use it again.
    if (record) buffer->call_when_done(std::move(record), [&pool, address] { pool.recycle(address); });
  });
}

int32_t deepep_copy(uint64_t handle, const deepep_copy_args* args, deepep_error* error) {
  return cross("copy", DEEPEP_OP_COPY, error, [&](Call& call) {
    check(args);
    const auto buffer = find_buffer(call, handle);
    use_device(buffer->device->index);
    const cudaStream_t stream = given_stream(args->stream);
    check_copy(*args);
    buffer->check_id(args->done_id, "done_id");
    if (args->done_id != 0 && capture_of(stream) != 0) {
      reject(DEEPEP_ERROR_INVALID_ARGUMENT, "a captured call has no done_id: a replay completes none");
    }
    if (args->bytes != 0) {
      settle_if_comm(stream);
      // Both addresses are pinned or the device's, so the copy does not wait; unified addresses tell the direction.
      DEEPEP_CUDA("copy", cudaMemcpyAsync(reinterpret_cast<void*>(args->dst), reinterpret_cast<const void*>(args->src),
                                          args->bytes, cudaMemcpyDefault, stream));
    }
    if (args->done_id == 0) return;
    auto record = std::make_shared<Record>(buffer->device->index);
    record->mark(stream, 0);
    const std::lock_guard lock(buffer->mutex);
    buffer->check_open();
    buffer->complete_when_done(std::move(record), args->done_id);
  });
}

int32_t deepep_fill(uint64_t handle, const deepep_fill_args* args, deepep_error* error) {
  return cross("fill memory", DEEPEP_OP_COPY, error, [&](Call& call) {
    check(args);
    const auto buffer = find_buffer(call, handle);
    use_device(buffer->device->index);
    const cudaStream_t stream = given_stream(args->stream);
    check_fill(*args);
    if (args->bytes == 0) return;
    settle_if_comm(stream);
    DEEPEP_CUDA("fill memory",
                cudaMemsetAsync(reinterpret_cast<void*>(args->dst), static_cast<int>(args->value), args->bytes, stream));
  });
}

int32_t deepep_stream_create(uint64_t handle, deepep_stream_create_args* args, deepep_error* error) {
  return cross("create a stream", DEEPEP_OP_CREATE, error, [&](Call& call) {
    check(args);
    args->stream = find_buffer(call, handle)->create_stream();
  });
}

int32_t deepep_stream_synchronize(uint64_t handle, const deepep_stream_sync_args* args, deepep_error* error) {
  return cross("synchronize a stream", DEEPEP_OP_COPY, error, [&](Call& call) {
    check(args);
    const cudaStream_t stream = given_stream(handle);
    const auto owner = owner_of(stream_owner(handle));
    if (owner) {
      call.rank = static_cast<int32_t>(owner->rank);
      use_device(owner->device->index);
    }
    settle_if_comm(stream);
    const Relaxed relaxed;
    const auto begin = std::chrono::steady_clock::now();
    const auto limit = std::chrono::milliseconds(args->timeout_ms);
    // Pairs with the end of the stream's work. Asked again and again, and not slept upon, since ends must be noted meanwhile.
    for (;;) {
      const cudaError_t status = cudaStreamQuery(stream);
      reap(owner);
      if (status == cudaSuccess) return;
      if (status != cudaErrorNotReady) reject_cuda(status, "synchronize the stream");
      cudaGetLastError();
      if (args->timeout_ms != 0 && std::chrono::steady_clock::now() - begin >= limit) break;
      std::this_thread::sleep_for(std::chrono::microseconds(20));
    }
    Rejected rejected;
    rejected.failure.code = DEEPEP_ERROR_TIMEOUT;
    rejected.failure.waited_ns = int64_t{args->timeout_ms} * 1'000'000;
    set_message(rejected.failure, "its work has not ended within %u ms", args->timeout_ms);
    throw rejected;
  });
}

int32_t deepep_stream_destroy(uint64_t handle, deepep_error* error) {
  return cross("destroy a stream", DEEPEP_OP_NONE, error, [&](Call& call) {
    const auto owner = owner_of(stream_owner(handle));
    if (owner) {
      call.rank = static_cast<int32_t>(owner->rank);
      use_device(owner->device->index);
    }
    if (owner)
      owner->end_stream(handle);
    else
      destroy_stream(handle);
  });
}

int32_t deepep_event_create(uint64_t handle, deepep_event_create_args* args, deepep_error* error) {
  return cross("create an event", DEEPEP_OP_CREATE, error, [&](Call& call) {
    check(args);
    args->event = find_buffer(call, handle)->create_event(args->done_id);
  });
}

int32_t deepep_event_record(uint64_t handle, deepep_event_args* args, deepep_error* error) {
  return cross("record an event", DEEPEP_OP_COPY, error, [&](Call& call) {
    check(args);
    const auto event = find_event(call, handle);
    const cudaStream_t stream = given_stream(args->stream);
    settle_if_comm(stream);
    auto record = std::make_shared<Record>(event->device, true);
    record->mark(stream, capture_of(stream));
    event->set(std::move(record));
  });
}

int32_t deepep_event_wait(uint64_t handle, deepep_event_args* args, deepep_error* error) {
  return cross("wait for an event", DEEPEP_OP_COPY, error, [&](Call& call) {
    check(args);
    const auto event = find_event(call, handle);
    const cudaStream_t stream = given_stream(args->stream);
    const auto record = event->latest();
    if (!record) return;
    settle_if_comm(stream);
    const bool by_replays = record->make_wait(stream, capture_of(stream));
    const auto owner = owner_of(event->owner);
    if (!by_replays || !owner) return;
    const std::lock_guard lock(owner->mutex);
    owner->keep_for_capture(record);
  });
}

int32_t deepep_event_query(uint64_t handle, deepep_event_args* args, deepep_error* error) {
  return cross("query an event", DEEPEP_OP_COPY, error, [&](Call& call) {
    check(args);
    const auto event = find_event(call, handle);
    const auto owner = owner_of(event->owner);
    reap(owner);
    const auto record = event->latest();
    args->done = !record || record->done() ? 1 : 0;
    if (record && args->done && !record->is_operation()) reap(owner);  // How a replay has ended is noted after its end.
    args->status = record && args->done ? record->status() : DEEPEP_OK;
  });
}

int32_t deepep_event_notify(uint64_t handle, deepep_event_args* args, deepep_error* error) {
  return cross("be notified of an event", DEEPEP_OP_COPY, error, [&](Call& call) {
    check(args);
    const auto event = find_event(call, handle);
    const auto buffer = owner_of(event->owner);
    if (!buffer) reject(DEEPEP_ERROR_CLOSED, "the buffer was destroyed");
    if (args->done_id == 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "done_id is 0");
    buffer->check_id(args->done_id, "done_id");
    const auto record = event->latest();
    if (record) record->check_capture(0);
    const std::lock_guard lock(buffer->mutex);
    buffer->check_open();
    if (record)
      buffer->complete_when_done(record, args->done_id);
    else
      buffer->complete(args->done_id, DEEPEP_OK);
  });
}

int32_t deepep_event_destroy(uint64_t handle, deepep_error* error) {
  return cross("destroy an event", DEEPEP_OP_NONE, error, [&](Call& call) {
    const auto event = std::static_pointer_cast<Event>(retire(Kind::event, handle, "event"));
    note_owner(call, event->owner);
    if (const auto buffer = owner_of(event->owner)) buffer->forget_event(handle);
  });
}

int32_t deepep_event_elapsed(uint64_t handle, deepep_event_elapsed_args* args, deepep_error* error) {
  return cross("measure between events", DEEPEP_OP_COPY, error, [&](Call& call) {
    check(args);
    const auto event = find_event(call, handle);
    use_device(event->device);
    const auto until = event->latest();
    const auto since = find<Event>(Kind::event, args->since, "since")->latest();
    const Relaxed relaxed;
    for (const auto& record : {since, until}) {
      const char* const name = record == since ? "since" : "the event";
      if (!record) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "%s was not recorded yet", name);
      record->check_capture(0);
      if (!record->is_timed()) {
        reject(DEEPEP_ERROR_INVALID_ARGUMENT, "%s marks the end of an operation, which keeps no time: record one after it",
               name);
      }
      if (cudaEventQuery(record->event()) != cudaSuccess) {
        cudaGetLastError();
        reject(DEEPEP_ERROR_INVALID_ARGUMENT, "what %s has recorded has not ended yet", name);
      }
    }
    float ms = 0;
    DEEPEP_CUDA("measure between the events", cudaEventElapsedTime(&ms, since->event(), until->event()));
    args->elapsed_ns = static_cast<int64_t>(double{ms} * 1e6);
  });
}

}  // extern "C"
