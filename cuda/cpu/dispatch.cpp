// Dispatch, normal mode: counts first, then each row straight to its final place on every destination rank.
//
// In: deepep_dispatch_args. Out: the slot taken and the addresses of what will be received there; the work itself, which is
// dispatch_run.cpp's, enqueued. Everything that can be found wrong without the peers is found here, on the caller's thread.
// Called by the API layer.
#include <utility>

#include "dispatch_run.hpp"
#include "layout.hpp"
#include "operations.hpp"
#include "payload.hpp"
#include "scales.hpp"
#include "wait.hpp"

namespace deepep {
namespace {

// The plan of a dispatch that routes by itself.
RoutingPlan plan_routing(const deepep_dispatch_args& args) {
  RoutingPlan plan;
  plan.made = true;
  plan.space = static_cast<RowSpace>(args.layout);
  plan.expert_alignment = args.expert_alignment;
  plan.num_tokens = static_cast<uint32_t>(args.num_tokens);
  plan.num_topk = static_cast<uint32_t>(args.num_topk);
  plan.topk_idx_bytes = args.num_topk > 0 ? args.topk_idx_bytes : 4;
  if (args.num_topk > 0) {
    if (args.is_token_in_rank != 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "topk_idx and is_token_in_rank exclude each other");
    if (args.num_tokens > 0 && args.topk_idx == 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "topk_idx is missing");
    return plan;
  }
  if (args.topk_idx != 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "topk_idx is given, but num_topk is 0");
  if (args.layout != DEEPEP_LAYOUT_RANK) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "the expert layout needs topk_idx");
  if (args.num_tokens > 0 && args.is_token_in_rank == 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "there is neither topk_idx nor is_token_in_rank");
  }
  return plan;
}

// The plan of a cached dispatch: the handle's.
RoutingPlan plan_cached(const Handle* handle, const deepep_dispatch_args& args) {
  if (handle == nullptr || !handle->plan.made) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "a cached dispatch needs a handle that an earlier dispatch filled");
  }
  if (args.topk_idx != 0 || args.is_token_in_rank != 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "a cached dispatch takes its routing from the handle, not from topk_idx or "
                                          "is_token_in_rank");
  }
  RoutingPlan plan = handle->plan;
  if (static_cast<uint32_t>(args.num_tokens) != plan.num_tokens) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "x has %d tokens, the handle %u", args.num_tokens, plan.num_tokens);
  }
  if (args.layout != static_cast<uint32_t>(plan.space) || args.expert_alignment != plan.expert_alignment) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "layout %u with alignment %u is not the handle's: layout %u with alignment %u",
           args.layout, args.expert_alignment, static_cast<uint32_t>(plan.space), plan.expert_alignment);
  }
  if (args.num_topk != 0 && static_cast<uint32_t>(args.num_topk) != plan.num_topk) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "num_topk is %d, the handle has %u", args.num_topk, plan.num_topk);
  }
  if (args.topk_idx_bytes == 4 || args.topk_idx_bytes == 8) plan.topk_idx_bytes = args.topk_idx_bytes;
  return plan;
}

void name_outputs(const Buffer& buffer, const RoutingPlan& plan, deepep_dispatch_args& args) {
  const Regions& regions = buffer.regions;
  const auto base = reinterpret_cast<uint64_t>(buffer.symmetric(buffer.rank) +
                                               slot_offset(regions, static_cast<uint32_t>(args.slot)));
  const ScaleStrides strides = scale_strides(buffer.options.max_recv_tokens, args.num_scales, args.scale_elem_bytes,
                                             (args.flags & DEEPEP_FLAG_SCALES_COLUMN_MAJOR) != 0);
  const bool has_weights = plan.num_topk > 0 && (args.topk_weights != 0 || plan.num_tokens == 0);
  args.max_rows = buffer.options.max_recv_tokens;
  args.recv_x = base + regions.recv_x;
  args.recv_scales = args.num_scales > 0 ? base + regions.recv_scales : 0;
  args.recv_scales_row_stride = strides.row;
  args.recv_scales_elem_stride = strides.elem;
  args.recv_topk_idx = plan.num_topk > 0 && plan.space == RowSpace::rank ? base + regions.recv_topk_idx : 0;
  args.recv_topk_weights = has_weights ? base + regions.recv_topk_weights : 0;
  args.recv_src_idx = base + regions.recv_src_idx;
  args.recv_num_rows = base + regions.counts;
  args.recv_num_tokens_per_expert = args.recv_num_rows + 2 * sizeof(int32_t);
  args.recv_num_tokens_per_rank = args.recv_num_tokens_per_expert + buffer.num_local_experts * sizeof(int32_t);
  args.host_counts = args.recv_num_rows;
}

}  // namespace

void dispatch(Buffer& buffer, deepep_dispatch_args& args) {
  check_routing(buffer, args, buffer.options.max_tokens_per_rank);
  check_payload(buffer, args);
  if (args.layout > DEEPEP_LAYOUT_EXPERT) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "layout is %u", args.layout);
  if (args.expert_alignment == 0 || args.expert_alignment > 65536) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "expert_alignment is %u, it must be 1 … 65536", args.expert_alignment);
  }
  DispatchJob job;
  if (args.handle != 0) job.handle = find_handle(buffer, args.handle);
  job.cached = (args.flags & DEEPEP_FLAG_CACHED) != 0;
  job.plan = job.cached ? plan_cached(job.handle.get(), args) : plan_routing(args);
  if (args.topk_weights != 0 && job.plan.num_topk == 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "topk_weights are given, but the routing has no topk_idx");
  }
  if (job.handle && (job.plan.num_tokens > job.handle->max_tokens || job.plan.num_topk > job.handle->max_topk)) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "x has %u tokens of %u entries, the handle holds %u of %u", job.plan.num_tokens,
           job.plan.num_topk, job.handle->max_tokens, job.handle->max_topk);
  }
  const int32_t slot = buffer.take_slot(args.slot);
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
  buffer.slots[static_cast<size_t>(slot)].dispatch_epoch = epoch;
  if (handle) handle->plan = plan;
  if (handle && plan.epoch == 0) handle->plan.epoch = epoch;
  args = out;
}

}  // namespace deepep
