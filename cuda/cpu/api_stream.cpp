// The C ABI, part 3: streams, events, memory, copies.
//
// In: calls of any thread. Out: see deepep.h, where every function is documented.

#include <string.h>

#include "../api/border.hpp"
#include "../api/checks.hpp"
#include "../api/queue.hpp"

using namespace deepep;

namespace {

std::shared_ptr<Stream> find_stream(uint64_t handle) { return find<Stream>(Kind::stream, handle, "stream"); }

std::shared_ptr<Event> find_event(Call& call, uint64_t handle) {
  auto event = find<Event>(Kind::event, handle, "event");
  note_owner(call, event->owner);
  return event;
}

// Queues `id` on the buffer's queue when the record's work has ended, with its status, which is kept under this id too.
void notify(const std::shared_ptr<Buffer>& buffer, const std::shared_ptr<Record>& record, uint64_t id) {
  if (!record) return buffer->complete(id, DEEPEP_OK);
  record->watch([weak = std::weak_ptr<Buffer>(buffer), queue = buffer->queue(), id](const Record& ended) {
    const auto& failure = ended.failure();
    // The buffer may be gone; its pending completions are still queued.
    if (const auto owner = weak.lock(); owner && failure) owner->statuses.keep(id, 0, failure);
    queue_push(queue, id, ended.status());
  });
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
    args->address = reinterpret_cast<uint64_t>(buffer->memory.allocate(args->bytes));
  });
}

int32_t deepep_free(uint64_t handle, deepep_alloc_args* args, deepep_error* error) {
  return cross("free memory", DEEPEP_OP_NONE, error, [&](Call& call) {
    check(args);
    const auto buffer = find_buffer(call, handle);
    const uint64_t address = args->address;
    if (args->stream == 0) {
      buffer->memory.disown(address);
      return buffer->memory.recycle(address);
    }
    const auto stream = find_stream(args->stream);
    if (stream->closed()) reject(DEEPEP_ERROR_CLOSED, "the stream was destroyed");
    buffer->memory.disown(address);
    auto record = std::make_shared<Record>();
    record->watch([weak = std::weak_ptr<Buffer>(buffer), address](const Record&) {
      if (const auto owner = weak.lock()) owner->memory.recycle(address);
    });
    // Closed meanwhile: it ends after its work as well, but the block is no longer in its order; the pool frees it at the end.
    stream->push_record(record);
  });
}

int32_t deepep_copy(uint64_t handle, const deepep_copy_args* args, deepep_error* error) {
  return cross("copy", DEEPEP_OP_COPY, error, [&](Call& call) {
    check(args);
    const auto buffer = find_buffer(call, handle);
    const auto stream = find_stream(args->stream);
    check_copy(*args);
    buffer->check_id(args->done_id, "done_id");
    push(*stream, [dst = args->dst, src = args->src, bytes = args->bytes, id = args->done_id, queue = buffer->queue()] {
      if (bytes != 0) memcpy(reinterpret_cast<void*>(dst), reinterpret_cast<const void*>(src), bytes);
      if (id != 0) queue_push(queue, id, DEEPEP_OK);
    });
  });
}

int32_t deepep_fill(uint64_t handle, const deepep_fill_args* args, deepep_error* error) {
  return cross("fill memory", DEEPEP_OP_COPY, error, [&](Call& call) {
    check(args);
    find_buffer(call, handle);
    const auto stream = find_stream(args->stream);
    check_fill(*args);
    push(*stream, [dst = args->dst, value = static_cast<int>(args->value), bytes = args->bytes] {
      if (bytes != 0) memset(reinterpret_cast<void*>(dst), value, bytes);
    });
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
    const auto stream = find_stream(handle);
    note_owner(call, stream->owner);
    const auto record = present_work(*stream);
    if (!record) return;
    // Pairs with the stream's thread, which gets to the record in the end.
    if (args->timeout_ms == 0) return record->wait();
    if (record->wait_for(uint64_t{args->timeout_ms} * 1'000'000)) return;
    Rejected rejected;
    rejected.failure.code = DEEPEP_ERROR_TIMEOUT;
    rejected.failure.waited_ns = int64_t{args->timeout_ms} * 1'000'000;
    set_message(rejected.failure, "its work has not ended within %u ms", args->timeout_ms);
    throw rejected;
  });
}

int32_t deepep_stream_destroy(uint64_t handle, deepep_error* error) {
  return cross("destroy a stream", DEEPEP_OP_NONE, error, [&](Call& call) {
    const auto stream = find_stream(handle);
    note_owner(call, stream->owner);
    if (stream->owned_by_buffer) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "it is the buffer's communication stream");
    retire(Kind::stream, handle, "stream");
    stream->close();
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
    auto record = present_work(*find_stream(args->stream));
    if (!record) {
      record = std::make_shared<Record>();  // An idle stream: the point is reached now, which deepep_event_elapsed asks for.
      record->complete();
    }
    event->set(std::move(record));
  });
}

int32_t deepep_event_wait(uint64_t handle, deepep_event_args* args, deepep_error* error) {
  return cross("wait for an event", DEEPEP_OP_COPY, error, [&](Call& call) {
    check(args);
    const auto event = find_event(call, handle);
    const auto stream = find_stream(args->stream);
    if (!stream->push_wait(event->latest())) reject(DEEPEP_ERROR_CLOSED, "the stream was destroyed");
  });
}

int32_t deepep_event_query(uint64_t handle, deepep_event_args* args, deepep_error* error) {
  return cross("query an event", DEEPEP_OP_COPY, error, [&](Call& call) {
    check(args);
    const auto record = find_event(call, handle)->latest();
    args->done = !record || record->done() ? 1 : 0;
    args->status = record && record->done() ? record->status() : DEEPEP_OK;
  });
}

int32_t deepep_event_notify(uint64_t handle, deepep_event_args* args, deepep_error* error) {
  return cross("be notified of an event", DEEPEP_OP_COPY, error, [&](Call& call) {
    check(args);
    const auto event = find_event(call, handle);
    const auto buffer = std::static_pointer_cast<Buffer>(event->owner.lock());
    if (!buffer) reject(DEEPEP_ERROR_CLOSED, "the buffer was destroyed");
    if (args->done_id == 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "done_id is 0");
    buffer->check_id(args->done_id, "done_id");
    notify(buffer, event->latest(), args->done_id);
  });
}

int32_t deepep_event_elapsed(uint64_t handle, deepep_event_elapsed_args* args, deepep_error* error) {
  return cross("measure between events", DEEPEP_OP_COPY, error, [&](Call& call) {
    check(args);
    const auto until = find_event(call, handle)->latest();
    const auto since = find<Event>(Kind::event, args->since, "since")->latest();
    for (const auto& record : {since, until}) {
      const char* const name = record == since ? "since" : "the event";
      if (!record) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "%s was not recorded yet", name);
      if (record->ends_on) {
        reject(DEEPEP_ERROR_INVALID_ARGUMENT, "%s marks the end of an operation, which keeps no time: record one after it",
               name);
      }
      if (!record->done()) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "what %s has recorded has not ended yet", name);
    }
    args->elapsed_ns = static_cast<int64_t>(until->ended_ns() - since->ended_ns());
  });
}

int32_t deepep_event_destroy(uint64_t handle, deepep_error* error) {
  return cross("destroy an event", DEEPEP_OP_NONE, error, [&](Call& call) {
    const auto event = std::static_pointer_cast<Event>(retire(Kind::event, handle, "event"));
    note_owner(call, event->owner);
    if (const auto buffer = std::static_pointer_cast<Buffer>(event->owner.lock())) buffer->forget_event(handle);
  });
}

}  // extern "C"
