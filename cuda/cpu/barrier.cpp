// Calls that are nothing but their messages: a barrier, and the refusal of a call that this rank cannot make.
//
// In: deepep_barrier_args, or deepep_refuse_args. Out: a barrier ends when the messages of all ranks are there; a refusal
// fails on every rank, which leaves the buffers good and their epochs equal. Called by the API layer.
#include "exchange.hpp"
#include "operations.hpp"
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
  const bool known = args.op == DEEPEP_OP_DISPATCH || args.op == DEEPEP_OP_COMBINE || args.op == DEEPEP_OP_BARRIER ||
                     args.op == DEEPEP_OP_LOW_LATENCY_DISPATCH || args.op == DEEPEP_OP_LOW_LATENCY_COMBINE;
  if (!known) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "op is %d, which is no collective call", args.op);
  if (args.code <= DEEPEP_OK || args.code > DEEPEP_ERROR_NEEDS_RECOVERY) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "code is %d, it must be a DEEPEP_ERROR_*", args.code);
  }
  buffer.enqueue(args.op, StreamFields{}, true, [code = args.code](Operation& op) {
    op.phase = DEEPEP_PHASE_NOTIFY;
    Draft draft;
    draft.agreed[kAgreedOp] = static_cast<uint32_t>(op.op);
    refuse(op, code, "this rank refused the call");
    PeerWait wait(op);
    Exchange exchanged;
    exchange(op, draft, wait, exchanged);
  });
}

}  // namespace deepep
