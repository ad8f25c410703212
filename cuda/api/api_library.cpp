// The C ABI, part 1: the library itself, its devices, host memory and completion queues.
//
// In: calls of any thread. Out: facts about this machine, copies, queues. Documentation is in deepep.h.

#include <string.h>

#include "border.hpp"
#include "operations.hpp"
#include "queue.hpp"

using namespace deepep;

namespace {

// Copies `bytes`; 0 of them are nothing, from anywhere but address 0.
int32_t copy_host(uint64_t address, void* dst, const void* src, uint64_t bytes) {
  if (address == 0) return DEEPEP_ERROR_INVALID_ARGUMENT;
  if (bytes == 0) return DEEPEP_OK;
  if (!dst || !src) return DEEPEP_ERROR_INVALID_ARGUMENT;
  memcpy(dst, src, bytes);
  return DEEPEP_OK;
}

}  // namespace

extern "C" {

uint32_t deepep_abi_version(void) { return DEEPEP_ABI_VERSION; }

int32_t deepep_get_capabilities(uint64_t device, deepep_capabilities* args, deepep_error* error) {
  return cross("read the capabilities", DEEPEP_OP_NONE, error, [&](Call&) {
    check(args);
    check_device(device);
    fill_capabilities(device, *args);
  });
}

int32_t deepep_get_peer_access(uint64_t device, deepep_peer_access_args* args, deepep_error* error) {
  return cross("look at the access between devices", DEEPEP_OP_NONE, error, [&](Call&) {
    check(args);
    check_device(device);
    get_peer_access(device, *args);
  });
}

int32_t deepep_measure_copy(uint64_t device, deepep_measure_copy_args* args, deepep_error* error) {
  return cross("measure copies", DEEPEP_OP_COPY, error, [&](Call&) {
    check(args);
    check_device(device);
    if (args->bytes == 0 || args->bytes % 16 != 0) {
      reject(DEEPEP_ERROR_INVALID_ARGUMENT, "bytes is %llu, it must be a multiple of 16",
             static_cast<unsigned long long>(args->bytes));
    }
    if (args->repeats == 0 || args->repeats > 1000) {
      reject(DEEPEP_ERROR_INVALID_ARGUMENT, "repeats is %u, it must be 1 … 1000", args->repeats);
    }
    measure_copy(device, *args);
  });
}

int32_t deepep_plan(uint64_t handle, deepep_plan_args* args, deepep_error* error) {
  return cross("plan an operation", DEEPEP_OP_NONE, error, [&](Call& call) {
    check(args);
    const auto buffer = handle != 0 ? find_buffer(call, handle) : nullptr;
    const bool has_plan = args->op == DEEPEP_OP_DISPATCH || args->op == DEEPEP_OP_COMBINE ||
                          args->op == DEEPEP_OP_LOW_LATENCY_DISPATCH || args->op == DEEPEP_OP_LOW_LATENCY_COMBINE;
    if (!has_plan) {
      reject(DEEPEP_ERROR_INVALID_ARGUMENT, "op is %d, which has no plan", args->op);
    }
    plan_operation(buffer.get(), *args);
  });
}

int32_t deepep_host_read(uint64_t address, void* dst, uint64_t bytes) {
  return copy_host(address, dst, reinterpret_cast<const void*>(address), bytes);
}

int32_t deepep_host_write(uint64_t address, const void* src, uint64_t bytes) {
  return copy_host(address, reinterpret_cast<void*>(address), src, bytes);
}

int32_t deepep_queue_create(uint64_t, deepep_queue_create_args* args, deepep_error* error) {
  return cross("create a queue", DEEPEP_OP_CREATE, error, [&](Call&) { check(args).queue = queue_create(); });
}

int32_t deepep_queue_drain(uint64_t queue, void* out, uint32_t capacity) {
  return queue_drain(queue, static_cast<deepep_completion*>(out), capacity);
}

int32_t deepep_queue_wake(uint64_t queue, const deepep_queue_wake_args* args, deepep_error* error) {
  return cross("set up the wake-up of a queue", DEEPEP_OP_NONE, error, [&](Call&) {
    check(args);
    queue_wake(queue, args->action, args->callback);
  });
}

int32_t deepep_queue_destroy(uint64_t queue, deepep_error* error) {
  return cross("destroy a queue", DEEPEP_OP_NONE, error, [&](Call&) { queue_destroy(queue); });
}

}  // extern "C"
