// The border: what every exported function does before and after its work.
//
// In: what the caller passed, unchecked. Out: a status code and a filled deepep_error; no exception gets past it. `cross` runs
// the body of an API call; `check` refuses structs of another size and reserved fields that are not 0; `find_*` turn handles
// into objects. Bodies reject with the second half of a message, the border puts "Cannot <doing>: " in front.
#pragma once

#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <type_traits>

#include "../abi/deepep.h"
#include "../common/failure.hpp"
#include "buffer.hpp"
#include "registry.hpp"

namespace deepep {

// What a call is about, for its error: set as it becomes known.
struct Call {
  const char* doing;
  int32_t op;
  int32_t rank = -1;
};

// Appends text to a message and says where it ends now; what does not fit is cut.
inline size_t append(char* message, size_t capacity, size_t at, const char* text) noexcept {
  while (*text && at + 1 < capacity) message[at++] = *text++;
  message[at] = 0;
  return at;
}

// Writes a failure into the caller's struct and returns its code. `error` may be null.
inline int32_t report(deepep_error* error, const Call& call, const Failure& failure, uint64_t epoch = 0) noexcept {
  if (!error) return failure.code;
  error->code = failure.code;
  error->op = failure.op != DEEPEP_OP_NONE ? failure.op : call.op;
  error->phase = failure.phase;
  error->rank = call.rank;
  error->peer = failure.peer;
  error->expected = failure.expected;
  error->seen = failure.seen;
  error->waited_ns = failure.waited_ns;
  error->epoch = epoch;
  size_t at = 0;
  if (call.doing && std::strncmp(failure.message, "Cannot ", 7) != 0) {
    for (const char* part : {"Cannot ", call.doing, ": "}) at = append(error->message, sizeof error->message, at, part);
  }
  append(error->message, sizeof error->message, at, failure.message);
  return failure.code;
}

inline int32_t report(deepep_error* error, const Call& call, int32_t code, const char* words) noexcept {
  Failure failure;
  failure.code = code;
  set_message(failure, "%s", words);
  return report(error, call, failure);
}

// Runs the body of an API call: `doing` completes "Cannot …", `op` is DEEPEP_OP_*.
template <class Body>
int32_t cross(const char* doing, int32_t op, deepep_error* error, Body body) noexcept {
  Call call{doing, op};
  // A struct of another size has no place for the words.
  if (error && error->size != sizeof(deepep_error)) return DEEPEP_ERROR_INVALID_ARGUMENT;
  if (error) error->code = DEEPEP_OK;
  try {
    body(call);
    return DEEPEP_OK;
  } catch (const Rejected& rejected) {
    return report(error, call, rejected.failure);
  } catch (const std::bad_alloc&) {
    return report(error, call, DEEPEP_ERROR_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& e) {
    return report(error, call, DEEPEP_ERROR_INTERNAL, e.what());
  } catch (...) {
    return report(error, call, DEEPEP_ERROR_INTERNAL, "an unknown exception");
  }
}

// The bits of flags that a call has a use for: another one would be a wish that is not fulfilled.
template <class Args>
constexpr uint32_t kFlagsOf = DEEPEP_FLAG_ASYNC_FINISH;
template <>
constexpr uint32_t kFlagsOf<deepep_dispatch_args> = DEEPEP_FLAG_ASYNC_FINISH | DEEPEP_FLAG_CACHED | DEEPEP_FLAG_ZERO_PADDING |
                                                    DEEPEP_FLAG_NO_CPU_SYNC | DEEPEP_FLAG_SCALES_COLUMN_MAJOR;
template <>
constexpr uint32_t kFlagsOf<deepep_low_latency_dispatch_args> =
    DEEPEP_FLAG_ASYNC_FINISH | DEEPEP_FLAG_SCALES_COLUMN_MAJOR | DEEPEP_FLAG_RECEIVE_HOOK | DEEPEP_FLAG_FP8 |
    DEEPEP_FLAG_ROUND_SCALE | DEEPEP_FLAG_UE8M0;
template <>
constexpr uint32_t kFlagsOf<deepep_low_latency_combine_args> =
    DEEPEP_FLAG_ASYNC_FINISH | DEEPEP_FLAG_RECEIVE_HOOK | DEEPEP_FLAG_FP8 | DEEPEP_FLAG_LOGFMT;

// The args, once their size is right and what is reserved is 0.
template <class Args>
Args& check(Args* args) {
  if (!args) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "the args struct is missing");
  if (args->size != sizeof(Args)) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "size of the args struct is %u, the library's is %zu", args->size, sizeof(Args));
  }
  if constexpr (requires { args->reserved; }) {
    if (args->reserved != 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "reserved is %u, must be 0", args->reserved);
  }
  if constexpr (requires { args->reserved_2; }) {
    if (args->reserved_2 != 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "reserved_2 is %u, must be 0", args->reserved_2);
  }
  if constexpr (requires { args->previous_event; }) {
    constexpr uint32_t known = DEEPEP_FLAG_LOGFMT * 2 - 1;  // all bits up to the last
    if (args->flags & ~known) {
      reject(DEEPEP_ERROR_INVALID_ARGUMENT, "flags is 0x%x, known bits are 0x%x", args->flags, known);
    }
    if (args->flags & ~kFlagsOf<std::remove_const_t<Args>>) {
      reject(DEEPEP_ERROR_INVALID_ARGUMENT, "flags is 0x%x, of which this call has no use for 0x%x", args->flags,
             args->flags & ~kFlagsOf<std::remove_const_t<Args>>);
    }
  }
  return *args;
}

inline std::shared_ptr<Buffer> find_buffer(Call& call, uint64_t handle) {
  auto buffer = find<Buffer>(Kind::buffer, handle, "buffer");
  call.rank = static_cast<int32_t>(buffer->rank);
  return buffer;
}

// The rank of the buffer that a stream or an event was made from.
inline void note_owner(Call& call, const std::weak_ptr<void>& owner) {
  if (const auto buffer = std::static_pointer_cast<Buffer>(owner.lock())) call.rank = static_cast<int32_t>(buffer->rank);
}

}  // namespace deepep
