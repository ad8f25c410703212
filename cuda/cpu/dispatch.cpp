// Dispatch, normal mode: counts first, then each row straight to its final place on every destination rank.
//
// In: deepep_dispatch_args. Out: the slot taken and the addresses of what will be received there; the work itself, which is
// dispatch_run.cpp's, enqueued. Everything that can be found wrong without the peers is found here, on the caller's thread.
// Called by the API layer.
#include <utility>

#include "../api/checks.hpp"
#include "../api/operations.hpp"
#include "dispatch_run.hpp"
#include "wait.hpp"

namespace deepep {
void dispatch(Buffer& buffer, deepep_dispatch_args& args) {
  DispatchJob job;
  if (args.handle != 0) job.handle = find_handle(buffer, args.handle);
  job.cached = (args.flags & DEEPEP_FLAG_CACHED) != 0;
  job.plan = check_dispatch(buffer, args, job.handle.get());
  const int32_t slot = buffer.slots.take(args.slot, stream_before(args));
  deepep_dispatch_args out = args;  // args stays as it was should enqueue reject
  out.slot = slot;
  name_outputs(buffer, job.plan, out);
  job.args = out;
  job.slot = static_cast<uint32_t>(slot);
  const std::shared_ptr<Handle> handle = job.handle;
  const RoutingPlan plan = job.plan;
  const uint64_t epoch = buffer.enqueue(
      DEEPEP_OP_DISPATCH, stream_fields(args), true,
      [job = std::move(job)](Operation& op) { guarded(op, [&] { run_dispatch(op, job); }); },
      args.counts_id);
  if (handle) handle->plan = plan;
  if (handle && plan.epoch == 0) handle->plan.epoch = epoch;
  args = out;
}

}  // namespace deepep
