// Dispatch and combine, normal mode: what the caller gave becomes the params of one kernel.
//
// In: deepep_dispatch_args and deepep_combine_args; Buffer::mutex is held. Out: for a dispatch the slot taken and the addresses
// of what will be received there; the kernel, enqueued. Everything that can be found wrong without the peers is found before,
// by the checks that all backends share. Called by the API layer.

#include <utility>

#include "../api/checks.hpp"
#include "../api/low_latency.hpp"
#include "../api/operations.hpp"
#include "../kernels/launch.hpp"
#include "buffer.hpp"
#include "handle.hpp"

namespace deepep {

void dispatch(Buffer& buffer, deepep_dispatch_args& args) {
  std::shared_ptr<Handle> handle;
  if (args.handle != 0) handle = find_handle(buffer, args.handle);
  RoutingPlan routing = check_dispatch(buffer, args, handle.get());
  const uint32_t width = routing.width(buffer.options.num_ranks);
  const Plan plan =
      buffer.plan({.op = DEEPEP_OP_DISPATCH, .row_bytes = args.row_bytes, .hops = width, .num_sms = args.num_sms});
  const int32_t slot = buffer.slots.take(args.slot, stream_before(args), buffer.present_capture());
  deepep_dispatch_args out = args;  // args stays as it was should enqueue reject
  out.slot = slot;
  out.num_topk = static_cast<int32_t>(routing.num_topk);
  out.topk_idx_bytes = routing.topk_idx_bytes;
  name_outputs(buffer, routing, out);
  out.host_counts = reinterpret_cast<uint64_t>(buffer.host_counts(static_cast<uint32_t>(slot)));
  const RoutingParams memory = handle ? handle->memory : buffer.own_routing();
  const uint64_t epoch = buffer.enqueue(
      stream_fields(args),
      {.op = DEEPEP_OP_DISPATCH, .collective = true, .counts_id = args.counts_id, .counts_slot = slot, .needs = handle},
      [&](const CallParams& call, Place place) {
        DispatchParams params = {
            .call = call, .args = out, .routing = routing_for(memory, routing, buffer.options.num_ranks), .plan = plan};
        params.call.slot = static_cast<uint32_t>(slot);
        params.args.host_counts = reinterpret_cast<uint64_t>(buffer.host_count_words(params.call.slot));
        return launch_dispatch(params, place);
      });
  if (routing.epoch == 0) routing.epoch = epoch;
  if (handle) handle->plan = routing;
  out.num_topk = args.num_topk;
  out.topk_idx_bytes = args.topk_idx_bytes;
  args = out;
}

void combine(Buffer& buffer, const deepep_combine_args& args) {
  const std::shared_ptr<Handle> handle = find_handle(buffer, args.handle);
  const RoutingPlan routing = handle->plan;
  check_combine(buffer, args, routing);
  const bool has_slot = args.slot != -1;
  if (has_slot) {
    check_no_pending_combine(buffer, args.slot);
    check_expert_rows(buffer, static_cast<uint32_t>(args.slot), args.x, args.x_stride, uint64_t{args.hidden} * 2);
  }
  const Plan plan = buffer.plan({.op = DEEPEP_OP_COMBINE,
                                 .row_bytes = args.hidden * 2,
                                 .hops = routing.width(buffer.options.num_ranks),
                                 .num_sms = args.num_sms});
  const int32_t borrowed = has_slot ? -1 : buffer.slots.take(-1, stream_before(args));
  const auto slot = static_cast<uint32_t>(has_slot ? args.slot : borrowed);
  buffer.enqueue(stream_fields(args), {.op = DEEPEP_OP_COMBINE, .collective = true, .borrowed_slot = borrowed, .needs = handle},
                 [&](const CallParams& call, Place place) {
                   CombineParams params = {.call = call,
                                           .args = args,
                                           .routing = routing_for(handle->memory, routing, buffer.options.num_ranks),
                                           .has_slot = has_slot ? 1u : 0u,
                                           .reserved = 0,
                                           .plan = plan,
                                           .copy = {}};
                   params.call.slot = slot;
                   return launch_combine(params, place);
                 });
}

}  // namespace deepep
