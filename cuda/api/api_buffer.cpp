// The C ABI, part 2: buffers. Creation, peers, facts, failures, slots and what hangs on them.
//
// In: calls of any thread. Out: see deepep.h, where every function is documented.

#include "border.hpp"
#include "operations.hpp"
#include "options.hpp"

using namespace deepep;

extern "C" {

int32_t deepep_buffer_size(uint64_t device, deepep_buffer_create_args* args, deepep_error* error) {
  return cross("size a buffer", DEEPEP_OP_CREATE, error, [&](Call& call) {
    call.rank = static_cast<int32_t>(check(args).rank);
    fill_sizes(*args, checked_options(device, *args));
    args->buffer = 0;
  });
}

int32_t deepep_buffer_create(uint64_t device, deepep_buffer_create_args* args, deepep_error* error) {
  return cross("create a buffer", DEEPEP_OP_CREATE, error, [&](Call& call) {
    call.rank = static_cast<int32_t>(check(args).rank);
    const auto buffer = Buffer::create(device, *args);
    args->buffer = publish(Kind::buffer, buffer);
  });
}

int32_t deepep_buffer_export(uint64_t handle, deepep_peer_handle* args, deepep_error* error) {
  return cross("export a buffer", DEEPEP_OP_CREATE, error,
               [&](Call& call) { find_buffer(call, handle)->export_handle(check(args)); });
}

int32_t deepep_buffer_import(uint64_t handle, deepep_peer_handle* args, deepep_error* error) {
  return cross("connect", DEEPEP_OP_CREATE, error, [&](Call& call) { find_buffer(call, handle)->import_peer(check(args)); });
}

int32_t deepep_buffer_connect(uint64_t handle, deepep_error* error) {
  return cross("connect", DEEPEP_OP_CREATE, error, [&](Call& call) { find_buffer(call, handle)->connect(); });
}

int32_t deepep_buffer_get_info(uint64_t handle, deepep_buffer_info* args, deepep_error* error) {
  return cross("read a buffer's facts", DEEPEP_OP_NONE, error,
               [&](Call& call) { find_buffer(call, handle)->info(check(args)); });
}

int32_t deepep_buffer_get_stats(uint64_t handle, deepep_buffer_stats* args, deepep_error* error) {
  return cross("read a buffer's counters", DEEPEP_OP_NONE, error,
               [&](Call& call) { find_buffer(call, handle)->stats(check(args)); });
}

int32_t deepep_buffer_recover(uint64_t handle, const deepep_buffer_recover_args* args, deepep_error* error) {
  return cross("recover a buffer", DEEPEP_OP_NONE, error, [&](Call& call) {
    check(args);
    find_buffer(call, handle)->recover(*args);
  });
}

int32_t deepep_buffer_destroy(uint64_t handle, deepep_error* error) {
  return cross("destroy a buffer", DEEPEP_OP_NONE, error, [&](Call& call) {
    const auto buffer = std::static_pointer_cast<Buffer>(retire(Kind::buffer, handle, "buffer"));
    call.rank = static_cast<int32_t>(buffer->rank);
    buffer->destroy();
  });
}

int32_t deepep_mask(uint64_t handle, const deepep_mask_args* args, deepep_error* error) {
  return cross("mask a rank", DEEPEP_OP_NONE, error, [&](Call& call) {
    check(args);
    find_buffer(call, handle)->mask(*args);
  });
}

int32_t deepep_slot_release(uint64_t handle, const deepep_slot_release_args* args, deepep_error* error) {
  return cross("release a slot", DEEPEP_OP_NONE, error, [&](Call& call) {
    check(args);
    const auto buffer = find_buffer(call, handle);
    const std::lock_guard lock(buffer->mutex);
    buffer->enter();
    release_slot(*buffer, *args);
  });
}

int32_t deepep_get_status(uint64_t handle, const deepep_status_args* args, deepep_error* error) {
  std::shared_ptr<const Status> status;
  Call known{nullptr, DEEPEP_OP_NONE};
  const int32_t code = cross("read a status", DEEPEP_OP_NONE, error, [&](Call& call) {
    check(args);
    if (!error) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "the error struct, which takes the record, is missing");
    status = find_buffer(call, handle)->status(args->id);
    known.rank = call.rank;
  });
  if (code != DEEPEP_OK || !status) return code;
  // The record's words are whole: nothing is put in front.
  return report(error, known, status->failure, status->epoch);
}

int32_t deepep_inject(uint64_t handle, const deepep_inject_args* args, deepep_error* error) {
  return cross("inject", DEEPEP_OP_NONE, error, [&](Call& call) {
    check(args);
    const auto buffer = find_buffer(call, handle);
    if (args->action > DEEPEP_INJECT_STALL) {
      reject(DEEPEP_ERROR_INVALID_ARGUMENT, "action is %u, at most %u", args->action, DEEPEP_INJECT_STALL);
    }
    if (args->op < DEEPEP_OP_DISPATCH || args->op > DEEPEP_OP_EXPERT_OUTPUT || args->op == DEEPEP_OP_COPY) {
      reject(DEEPEP_ERROR_INVALID_ARGUMENT, "op is %d, which has no phases", args->op);
    }
    if (args->phase < DEEPEP_PHASE_NOTIFY || args->phase > DEEPEP_PHASE_REDUCE) {
      reject(DEEPEP_ERROR_INVALID_ARGUMENT, "phase is %d, %d … %d", args->phase, DEEPEP_PHASE_NOTIFY, DEEPEP_PHASE_REDUCE);
    }
    buffer->injections.set(*args);
  });
}

}  // extern "C"
