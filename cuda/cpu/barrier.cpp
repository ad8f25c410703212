// Barrier: every unmasked rank has reached the same call.
//
// In: deepep_barrier_args. Out: the operation ends when the messages of all ranks are there. Called by the API layer.
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

}  // namespace deepep
