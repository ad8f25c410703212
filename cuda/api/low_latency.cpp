// Low-latency mode on the caller's thread; see low_latency.hpp.

#include "low_latency.hpp"

#include <utility>

#include "buffer.hpp"
#include "low_latency_slot.hpp"
#include "operations.hpp"

namespace deepep {
namespace {

unsigned long long shown(uint64_t value) { return value; }

uint64_t fp8_blocks(const deepep_low_latency_dispatch_args& args) { return ceil_div(args.row_bytes / 2, kFp8BlockChannels); }

void check_fp8(const Buffer& buffer, const deepep_low_latency_dispatch_args& args) {
  const bool fp8 = (args.flags & DEEPEP_FLAG_FP8) != 0;
  const bool round = (args.flags & DEEPEP_FLAG_ROUND_SCALE) != 0;
  const bool ue8m0 = (args.flags & DEEPEP_FLAG_UE8M0) != 0;
  if (!fp8 && (round || ue8m0)) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "ROUND_SCALE and UE8M0 need FP8");
  if (ue8m0 && !round) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "UE8M0 needs ROUND_SCALE");
  if (!fp8) return;
  if (args.num_scales != 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "num_scales is %u, but FP8 makes its own", args.num_scales);
  if (args.row_bytes / 2 % 16 != 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "x has %u channels: rows cast to FP8 must be a multiple of 16 bytes",
           args.row_bytes / 2);
  }
  const uint64_t blocks = fp8_blocks(args);
  const uint64_t bytes = ue8m0 ? align_up(blocks, 4) : blocks * 4;
  if (bytes > buffer.options.max_scale_bytes) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "FP8 makes %llu bytes of scales a row, the buffer holds %u", shown(bytes),
           buffer.options.max_scale_bytes);
  }
}

// A routing of this mode; `args` has num_tokens, num_topk and topk_idx.
template <class Args>
void check_topk(const Buffer& buffer, const Args& args) {
  check_routing(buffer, args, buffer.options.max_low_latency_tokens_per_rank);
  if (args.num_tokens > 0 && args.num_topk > 0 && args.topk_idx == 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "topk_idx is missing");
  }
}

void check_dispatch(const Buffer& buffer, const deepep_low_latency_dispatch_args& args) {
  if (buffer.options.max_low_latency_tokens_per_rank == 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "the buffer has no low-latency mode: max_low_latency_tokens_per_rank is 0");
  }
  check_topk(buffer, args);
  check_payload(buffer, args);
  check_fp8(buffer, args);
}

void check_combine(Buffer& buffer, const deepep_low_latency_combine_args& args, const LowLatencyFacts& facts) {
  check_topk(buffer, args);
  if ((args.flags & DEEPEP_FLAG_LOGFMT) != 0) reject(DEEPEP_ERROR_UNSUPPORTED, "this backend has no LOGFMT");
  if ((args.flags & DEEPEP_FLAG_FP8) != 0 && buffer.options.hidden % 16 != 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "hidden is %u: rows cast to FP8 must be a multiple of 16", buffer.options.hidden);
  }
  if (!facts.received) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "the receive half of the dispatch in slot %d is still to come", args.slot);
  }
  check_no_pending_combine(buffer, args.slot);
  const uint64_t row_bytes = uint64_t{buffer.options.hidden} * 2;
  check_expert_rows(buffer, static_cast<uint32_t>(args.slot), args.x, row_bytes, row_bytes);
  if (static_cast<uint32_t>(args.num_tokens) != facts.plan.num_tokens ||
      static_cast<uint32_t>(args.num_topk) != facts.plan.num_topk) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "topk_idx is [%d, %d], it was [%u, %u] in the dispatch", args.num_tokens,
           args.num_topk, facts.plan.num_tokens, facts.plan.num_topk);
  }
  if (args.num_tokens > 0 && args.out == 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "out is missing");
}

LowLatencyLayout make_layout(const Buffer& buffer, const deepep_low_latency_dispatch_args& args) {
  LowLatencyLayout layout;
  const bool column_major = (args.flags & DEEPEP_FLAG_SCALES_COLUMN_MAJOR) != 0;
  layout.max_rows = buffer.regions.low_latency_rows;
  layout.row_bytes = args.row_bytes;
  ScaleCopy& scales = layout.scales;
  scales.num_scales = args.num_scales;
  scales.elem_bytes = args.num_scales > 0 ? args.scale_elem_bytes : 0;
  scales.from_elem_stride = args.scales_elem_stride;
  if ((args.flags & DEEPEP_FLAG_FP8) != 0) {
    const uint64_t blocks = fp8_blocks(args);
    layout.row_bytes = args.row_bytes / 2;
    scales.num_scales = static_cast<uint32_t>((args.flags & DEEPEP_FLAG_UE8M0) != 0 ? ceil_div(blocks, 4) : blocks);
    scales.elem_bytes = scales.from_elem_stride = 4;
  }
  scales.to = scale_strides(layout.max_rows, scales.num_scales, scales.elem_bytes, column_major);
  layout.expert_stride = column_major ? scales.num_scales * scales.to.elem : layout.max_rows * scales.to.row;
  return layout;
}

void name_outputs(const Buffer& buffer, const LowLatencyLayout& layout, deepep_low_latency_dispatch_args& args) {
  const Regions& regions = buffer.regions;
  const auto base =
      reinterpret_cast<uint64_t>(buffer.symmetric(buffer.rank) + slot_offset(regions, static_cast<uint32_t>(args.slot)));
  args.max_rows = layout.max_rows;
  args.recv_x = base + regions.recv_x;
  args.recv_scales = layout.scales.num_scales > 0 ? base + regions.recv_scales : 0;
  args.recv_scales_expert_stride = layout.expert_stride;
  args.recv_scales_row_stride = layout.scales.to.row;
  args.recv_scales_elem_stride = layout.scales.to.elem;
  args.recv_count = base + regions.counts;
  args.recv_src_info = base + regions.recv_src_idx;
  args.recv_layout_range = base + regions.layout_range;
}

// What a slot knows that a low-latency dispatch holds; rejects otherwise.
std::shared_ptr<LowLatencySlot> low_latency_slot(Buffer& buffer, int32_t slot) {
  const Slot& held = buffer.slots.held(slot);
  if (held.state == nullptr) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "slot %d holds no low-latency dispatch", slot);
  return held.state;
}

bool has_pending_combine(const Buffer& buffer, const LowLatencyFacts& state) {
  return state.combine_epoch != 0 && state.combine_generation == buffer.generation;
}

}  // namespace

void check_no_pending_combine(Buffer& buffer, int32_t slot) {
  const auto& state = buffer.slots.held(slot).state;
  if (state == nullptr || !has_pending_combine(buffer, *state)) return;
  reject(DEEPEP_ERROR_INVALID_ARGUMENT, "the receive half of a combine of slot %d is still to come", slot);
}

void give_up_pending_combine(Buffer& buffer, int32_t slot) {
  const std::shared_ptr<LowLatencySlot> state = buffer.slots.held(slot).state;
  // After a failure nobody waits for it: what ends the failure gives it up as well.
  if (state == nullptr || !has_pending_combine(buffer, *state) || buffer.has_failed()) return;
  enqueue_combine_give_up(buffer, slot, state);
  state->combine_epoch = 0;
}

void low_latency_dispatch(Buffer& buffer, deepep_low_latency_dispatch_args& args) {
  check_dispatch(buffer, args);
  const auto state = std::make_shared<LowLatencySlot>();
  state->plan = {true,
                 RowSpace::region,
                 1,
                 static_cast<uint32_t>(args.num_tokens),
                 static_cast<uint32_t>(args.num_topk),
                 args.topk_idx_bytes};
  state->layout = make_layout(buffer, args);
  state->wait_stats = args.wait_stats;
  state->received = (args.flags & DEEPEP_FLAG_RECEIVE_HOOK) == 0;
  deepep_low_latency_dispatch_args out = args;  // args stays as it was should enqueue reject
  out.slot = buffer.slots.take(args.slot, stream_before(args), buffer.present_capture());
  name_outputs(buffer, state->layout, out);
  state->dispatch_epoch = enqueue_dispatch(buffer, out, state);
  buffer.slots[static_cast<size_t>(out.slot)].state = state;
  args = out;
}

void low_latency_dispatch_receive(Buffer& buffer, const deepep_receive_args& args) {
  const auto state = low_latency_slot(buffer, args.slot);
  if (state->received) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "slot %d awaits no receive half: its dispatch had none, or it came already",
           args.slot);
  }
  if (const uint64_t base = buffer.base_epoch; state->dispatch_epoch <= base) {
    reject(DEEPEP_ERROR_ABORTED, "its send half, epoch %llu, was given up in a recovery at epoch %llu",
           shown(state->dispatch_epoch), shown(base));
  }
  enqueue_dispatch_receive(buffer, args, state);
  state->received = true;
}

void low_latency_combine(Buffer& buffer, const deepep_low_latency_combine_args& args) {
  const auto state = low_latency_slot(buffer, args.slot);
  check_combine(buffer, args, *state);
  const uint64_t epoch = enqueue_combine(buffer, args, state);
  if ((args.flags & DEEPEP_FLAG_RECEIVE_HOOK) == 0) return;
  state->combine_epoch = epoch;
  state->combine_generation = buffer.generation;
}

void low_latency_combine_receive(Buffer& buffer, const deepep_receive_args& args) {
  const auto state = low_latency_slot(buffer, args.slot);
  if (state->combine_epoch == 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "slot %d awaits no receive half of a combine", args.slot);
  }
  if (!has_pending_combine(buffer, *state)) {
    reject(DEEPEP_ERROR_ABORTED,
           "its send half, epoch %llu, was given up in a recovery, or when a rank was masked after a failure",
           shown(state->combine_epoch));
  }
  enqueue_combine_receive(buffer, args, state);
  state->combine_epoch = 0;
}

}  // namespace deepep
