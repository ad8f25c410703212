// What went wrong, as a value and as an exception.
//
// In: a code of DEEPEP_ERROR_* and what was seen. Out: a Failure, which an operation leaves behind when it ends badly and
// which becomes a deepep_error at the border. Checks inside an API call throw Rejected, which never crosses the C ABI.
// Used by every backend: nothing here depends on threads, CUDA or the ABI header.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>

namespace deepep {

// The record of a failure. The fields are those of deepep_error; `peer` is -1 when no rank is to blame.
struct Failure {
  int32_t code = 0;
  int32_t op = 0;
  int32_t phase = 0;
  int32_t peer = -1;
  int64_t expected = 0;
  int64_t seen = 0;
  int64_t waited_ns = 0;
  char message[448] = {};
};

// Thrown by a check inside an API call.
struct Rejected {
  Failure failure;
};

// Writes the message; what does not fit is cut.
[[gnu::format(printf, 2, 3)]] inline void set_message(Failure& failure, const char* format, ...) {
  va_list list;
  va_start(list, format);
  std::vsnprintf(failure.message, sizeof failure.message, format, list);
  va_end(list);
}

// Ends an API call with `code`. The message is whole ("Cannot dispatch: x has 4097 tokens, the buffer holds 4096 a rank")
// or only its second half ("stream 0x2 was destroyed"): the border puts "Cannot <call>: " in front where it is missing.
[[noreturn, gnu::format(printf, 2, 3)]] inline void reject(int32_t code, const char* format, ...) {
  Rejected rejected;
  rejected.failure.code = code;
  va_list list;
  va_start(list, format);
  std::vsnprintf(rejected.failure.message, sizeof rejected.failure.message, format, list);
  va_end(list);
  throw rejected;
}

}  // namespace deepep
