// Words for findings: see describe.hpp.

#include "describe.hpp"

#include "../abi/deepep.h"
#include "protocol.hpp"

namespace deepep {
namespace {

constexpr uint32_t kMostEntries = DEEPEP_MAX_TOKENS * DEEPEP_MAX_TOPK;  // of a rank for one expert

unsigned long long shown(int64_t value) { return static_cast<unsigned long long>(value); }
uint32_t number(int64_t value) { return static_cast<uint32_t>(value); }

const char* code_name(int32_t code) {
  switch (code) {
    case DEEPEP_ERROR_INVALID_ARGUMENT: return "INVALID_ARGUMENT";
    case DEEPEP_ERROR_UNSUPPORTED: return "UNSUPPORTED";
    case DEEPEP_ERROR_OUT_OF_MEMORY: return "OUT_OF_MEMORY";
    case DEEPEP_ERROR_CAPACITY: return "CAPACITY";
    case DEEPEP_ERROR_NO_FREE_SLOT: return "NO_FREE_SLOT";
    case DEEPEP_ERROR_CLOSED: return "CLOSED";
    case DEEPEP_ERROR_SYSTEM: return "SYSTEM";
    case DEEPEP_ERROR_NEEDS_RECOVERY: return "NEEDS_RECOVERY";
  }
  return "INTERNAL";
}

// Why a rank gave another one up, after the other's name.
const char* why_gone(int32_t code) {
  switch (code) {
    case DEEPEP_ERROR_TIMEOUT: return "did not come in time";
    case DEEPEP_ERROR_PEER_LOST: return "has ended";
    case DEEPEP_ERROR_ABORTED: return "gave up";
  }
  return "failed";
}

// What was awaited of a rank; comes before "rank 3".
const char* awaited(Reason reason) {
  return reason == Reason::late_rows     ? "the rows of"
         : reason == Reason::late_view   ? "the view of"
         : reason == Reason::late_reader ? "the end of reading of"
         : reason == Reason::late_output ? "the expert outputs of"
                                         : "the message of";
}

}  // namespace

const char* doing(int32_t op) {
  switch (op) {
    case DEEPEP_OP_LAYOUT: return "count a routing";
    case DEEPEP_OP_DISPATCH: return "dispatch";
    case DEEPEP_OP_COMBINE: return "combine";
    case DEEPEP_OP_LOW_LATENCY_DISPATCH: return "dispatch in low-latency mode";
    case DEEPEP_OP_LOW_LATENCY_COMBINE: return "combine in low-latency mode";
    case DEEPEP_OP_BARRIER: return "pass the barrier";
    case DEEPEP_OP_EXPERT_OUTPUT: return "give the expert-output region";
  }
  return "operate";
}

const char* op_name(int32_t op) {
  switch (op) {
    case DEEPEP_OP_LAYOUT: return "a layout";
    case DEEPEP_OP_DISPATCH: return "a dispatch";
    case DEEPEP_OP_COMBINE: return "a combine";
    case DEEPEP_OP_LOW_LATENCY_DISPATCH: return "a low-latency dispatch";
    case DEEPEP_OP_LOW_LATENCY_COMBINE: return "a low-latency combine";
    case DEEPEP_OP_BARRIER: return "a barrier";
    case DEEPEP_OP_EXPERT_OUTPUT: return "a wait for readers";
  }
  return "an operation";
}

Failure describe(const Finding& f, uint32_t rank) {
  Failure failure;
  failure.code = f.code;
  failure.op = f.op;
  failure.phase = f.phase;
  failure.peer = f.peer;
  failure.expected = f.expected;
  failure.seen = f.seen;
  failure.waited_ns = f.waited_ns;
  const char* const what = doing(f.op);
  const auto call = static_cast<unsigned long long>(f.epoch);
  const uint32_t peer = number(f.peer);
  switch (f.reason) {
    case Reason::none: set_message(failure, "Cannot finish %s: code %d", op_name(f.op), f.code); break;
    case Reason::bad_entry:
      set_message(failure, "Cannot %s: entry %d of token %d is expert %lld, there are %u experts", what, f.b, f.a,
                  static_cast<long long>(f.seen), number(f.expected));
      break;
    case Reason::bad_expert_count:
      set_message(failure, "Cannot %s: num_tokens_per_expert[%d] is %lld, it must be 0 … %u", what, f.a,
                  static_cast<long long>(f.seen), kMostEntries);
      break;
    case Reason::capacity:
      set_message(failure, "Cannot %s: rank %u would receive %llu rows, a buffer holds %u", what, peer, shown(f.seen),
                  number(f.expected));
      break;
    case Reason::expert_capacity:
      set_message(failure, "Cannot %s: rank %u would receive %llu rows for expert %d, a buffer holds %u an expert", what, peer,
                  shown(f.seen), f.a, number(f.expected));
      break;
    case Reason::changed_entry:
      set_message(failure, "Cannot %s: entry %d of token %d is expert %lld, it was %lld in the dispatch", what, f.b, f.a,
                  static_cast<long long>(f.seen), static_cast<long long>(f.expected));
      break;
    case Reason::no_routing: set_message(failure, "Cannot %s: the handle holds no routing: its dispatch failed", what); break;
    case Reason::no_dispatch: set_message(failure, "Cannot %s: the slot's dispatch failed", what); break;
    case Reason::no_send:
      set_message(failure, "Cannot %s: the send half of call %llu did not come to its end", what, shown(f.expected));
      break;
    case Reason::no_rows_given:
      set_message(failure, "Cannot %s: neither x nor a slot is given, but there are %llu rows", what, shown(f.seen));
      break;
    case Reason::few_rows_given:
      set_message(failure, "Cannot %s: x or topk_weights have %llu rows, the dispatch received %llu", what, shown(f.seen),
                  shown(f.expected));
      break;
    case Reason::own_refusal: set_message(failure, "Cannot %s: this rank refused the call", what); break;
    case Reason::late_message:
    case Reason::late_rows:
    case Reason::late_view:
    case Reason::late_reader:
    case Reason::late_output:
      if (f.code == DEEPEP_ERROR_PEER_LOST) {
        set_message(failure, "Cannot %s: rank %u has ended; waited for %s it in call %llu", what, peer, awaited(f.reason),
                    call);
      } else {
        set_message(failure, "Cannot %s: waited %.3f ms for %s rank %u in call %llu", what,
                    static_cast<double>(f.waited_ns) / 1e6, awaited(f.reason), peer, call);
      }
      break;
    case Reason::gave_up:
      set_message(failure, "Cannot %s: rank %d gave up in call %llu because rank %u %s", what, f.a, shown(f.expected), peer,
                  why_gone(f.b));
      break;
    case Reason::elsewhere:
      set_message(failure, "Cannot %s: rank %u wants to %s in call %llu", what, peer, doing(static_cast<int32_t>(f.seen)),
                  call);
      break;
    case Reason::refused:
      set_message(failure, "Cannot %s: rank %u refused call %llu because of its own arguments (its error: %s)", what, peer,
                  call, code_name(f.a));
      break;
    case Reason::left_out:
      set_message(failure, "Cannot %s: rank %d goes on without this rank, %u, which came too late in call %llu", what, f.a,
                  rank, call);
      break;
    case Reason::other_call:
      set_message(failure, "Cannot %s: this is call %lld of this rank, but rank %u is at call %lld", what,
                  static_cast<long long>(f.expected), peer, static_cast<long long>(f.seen));
      break;
    case Reason::disagreement: {
      if (f.a < 0 || f.a >= static_cast<int32_t>(kNumAgreed)) {
        set_message(failure, "Cannot %s: rank %u gives other arguments than this rank %u in call %llu", what, peer, rank, call);
        break;
      }
      const uint32_t of = f.b > 0 ? static_cast<uint32_t>(f.b) - 1 : rank;
      set_message(failure, "Cannot %s: ranks disagree about %s: %u on %srank %u, %u on rank %u", what, kAgreedNames[f.a],
                  number(f.expected), of == rank ? "this " : "", of, number(f.seen), peer);
      break;
    }
    case Reason::torn_view:
      set_message(failure, "Cannot %s: rank %u takes part for rank %d, but not for rank %d", what, peer, f.a, f.b);
      break;
    case Reason::no_room:
      set_message(failure, "Cannot %s: only %lld of its %lld blocks were running after %.3f ms: other work fills the device",
                  what, static_cast<long long>(f.seen), static_cast<long long>(f.expected),
                  static_cast<double>(f.waited_ns) / 1e6);
      break;
    case Reason::needs_recovery:
      set_message(failure, "Cannot %s: an earlier call failed half-way; recover the buffer", what);
      break;
    case Reason::stalled:
      set_message(failure, "This rank was silent for %llu ms, as deepep_inject told it", shown(f.waited_ns / 1'000'000));
      break;
  }
  return failure;
}

Failure needs_recovery(const Failure& first, uint32_t rank) {
  Failure failure = first;
  failure.code = DEEPEP_ERROR_NEEDS_RECOVERY;
  const bool other = first.peer >= 0 && first.peer != static_cast<int32_t>(rank);
  set_message(failure, "An earlier call failed half-way; recover the buffer%s. %s", other ? " or mask the rank" : "",
              first.message);
  return failure;
}

}  // namespace deepep
