// Calls that are nothing but their messages: a barrier, and the refusal of a call that this rank cannot make.
//
// In: deepep_barrier_args, or deepep_refuse_args. Out: a barrier ends when the messages of all ranks are there; a refusal
// fails on every rank, which leaves the buffers good and their epochs equal. Called by the API layer.
#include "../api/checks.hpp"
#include "../api/operations.hpp"
#include "exchange.hpp"
#include "wait.hpp"

namespace deepep {

void barrier(Buffer& buffer, const deepep_barrier_args& args) {
  buffer.enqueue(DEEPEP_OP_BARRIER, stream_fields(args), true, [](Operation& op) {
    if (!inject(op, DEEPEP_PHASE_NOTIFY)) return;
    Draft draft;
    draft.agreed[kAgreedOp] = DEEPEP_OP_BARRIER;
    PeerWait wait(op);
    Exchange exchanged;
    exchange(op, draft, wait, exchanged);
  });
}

void refuse_call(Buffer& buffer, const deepep_refuse_args& args) {
  check_refusal(args);
  buffer.enqueue(args.op, StreamFields{}, true, [code = args.code](Operation& op) {
    op.phase = DEEPEP_PHASE_NOTIFY;
    Draft draft;
    draft.agreed[kAgreedOp] = static_cast<uint32_t>(op.op);
    op.fail({.code = code, .reason = Reason::own_refusal, .agreed = 1, .a = code});
    PeerWait wait(op);
    Exchange exchanged;
    exchange(op, draft, wait, exchanged);
  });
}

}  // namespace deepep
