// What an operation found wrong, as numbers: device code fills it, host code makes words of it (describe).
//
// In: the place in a protocol where something failed. Out: a plain struct of fixed size, small enough for pinned memory. The
// kernels write one when a call ends badly; host code turns it into a Failure with the same words that the CPU backend has.
#pragma once

#include <cstdint>

#include "../abi/deepep.h"

namespace deepep {

// Why. `a` and `b` of a Finding mean what stands beside each.
enum class Reason : int32_t {
  none,
  bad_entry,         // topk_idx: a = token, b = k, seen = the value, expected = num_experts
  bad_expert_count,  // num_tokens_per_expert: a = expert, seen = the value
  capacity,          // peer = the rank that would receive too much, seen = rows needed, expected = rows it holds
  expert_capacity,   // low latency: peer = the rank, a = its expert that would receive too much; seen and expected likewise
  changed_entry,     // low-latency combine's topk_idx: a = token, b = k, seen = the value, expected = that of the dispatch
  no_routing,        // the handle's dispatch has failed
  no_dispatch,       // the slot's has
  no_send,           // a receive half whose send half did not come to its end: expected = its epoch
  no_rows_given,     // combine: neither x nor a slot; seen = rows
  few_rows_given,    // combine: seen = rows given, expected = rows needed
  own_refusal,       // deepep_refuse: a = the code that was given
  late_message,      // the waits that can time out (code TIMEOUT) or lose their peer (PEER_LOST); peer
  late_rows,
  late_view,
  late_reader,
  late_output,     // low-latency combine
  gave_up,         // peer = the culprit, a = the rank that gave up, b = its code, expected = its epoch
  elsewhere,       // peer makes another call: seen = its op
  refused,         // peer refused the call: a = its code
  left_out,        // a = the rank that goes on without this one
  other_call,      // peer is at another epoch: expected, seen
  disagreement,    // a = index into kAgreedNames, expected = ours, seen = peer's
  torn_view,       // peer takes part for rank a, but not for rank b
  no_room,         // the blocks of the call were not all running within the deadline: expected, seen = blocks
  needs_recovery,  // an earlier call failed half-way: nothing was done
  stalled,         // deepep_inject: the rank was silent; waited_ns
};

struct Finding {
  uint64_t seq = 0;  // of the operation among those of its buffer; 0 = captured in a graph
  uint64_t epoch = 0;
  int32_t code = 0;  // DEEPEP_ERROR_*; 0 = nothing
  int32_t op = 0;
  int32_t phase = 0;
  int32_t peer = -1;
  Reason reason = Reason::none;
  int32_t agreed = 0;  // every rank finds it alike, before any data moved: the buffer stays good
  int32_t a = 0;
  int32_t b = 0;
  int64_t expected = 0;
  int64_t seen = 0;
  int64_t waited_ns = 0;
};

// True when the code alone says that nothing was left half-way. Finding::agreed says it for the others.
constexpr bool is_harmless(int32_t code) {
  return code == DEEPEP_ERROR_INVALID_ARGUMENT || code == DEEPEP_ERROR_UNSUPPORTED || code == DEEPEP_ERROR_CAPACITY ||
         code == DEEPEP_ERROR_MISMATCH || code == DEEPEP_ERROR_NEEDS_RECOVERY;
}

}  // namespace deepep
