// The fields that the args of every enqueued operation share, as one struct.
//
// In: an args struct of the ABI. Out: StreamFields, which a backend's Buffer::enqueue takes. Callers: the operations.
#pragma once

#include <cstdint>

namespace deepep {

struct StreamFields {
  uint64_t stream = 0;
  uint64_t previous_event = 0;
  uint64_t event = 0;
  uint64_t done_id = 0;
  uint32_t flags = 0;
  uint32_t timeout_ms = 0;
  int32_t num_sms = 0;
};

template <class Args>
StreamFields stream_fields(const Args& args) {
  return {args.stream, args.previous_event, args.event, args.done_id, args.flags, args.timeout_ms, args.num_sms};
}

}  // namespace deepep
