// What can be found wrong with an operation's args: see checks.hpp.

#include "checks.hpp"

#include <string>

#include "../common/protocol.hpp"

namespace deepep {
namespace {

unsigned long long shown(uint64_t value) { return value; }

uint64_t slot_base(const Buffer& buffer, uint32_t slot) {
  return reinterpret_cast<uint64_t>(buffer.symmetric(buffer.rank)) + slot_offset(buffer.regions, slot);
}

// No address that a program can have is beyond, with five levels of page tables either.
constexpr uint64_t kAddressEnd = uint64_t{1} << 57;

[[noreturn]] void reject_span(const char* name, uint64_t address, const char* what) {
  reject(DEEPEP_ERROR_INVALID_ARGUMENT, "%s is at address 0x%llx, from where %s go past the end of the address space", name,
         shown(address), what);
}

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
RoutingPlan plan_cached(const deepep_dispatch_args& args, const HandleFacts* handle) {
  if (handle == nullptr || !handle->plan.made) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "a cached dispatch needs a handle that an earlier dispatch filled");
  }
  if (args.topk_idx != 0 || args.is_token_in_rank != 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT,
           "a cached dispatch takes its routing from the handle, not from topk_idx or "
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

}  // namespace

void check_span(const char* name, uint64_t address, uint64_t bytes) {
  uint64_t end;
  if (bytes != 0 && address == 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "%s is 0", name);
  if (bytes == 0 || (!__builtin_add_overflow(address, bytes, &end) && end <= kAddressEnd)) return;
  reject_span(name, address, (std::to_string(bytes) + " bytes").c_str());
}

void check_rows(const char* name, uint64_t address, uint64_t count, uint64_t stride, uint64_t row_bytes) {
  uint64_t last, end;
  if (count == 0 || address == 0) return;
  if (!__builtin_mul_overflow(count - 1, stride, &last) && !__builtin_add_overflow(last, row_bytes, &end) &&
      !__builtin_add_overflow(address, end, &end) && end <= kAddressEnd) {
    return;
  }
  reject_span(name, address, (std::to_string(count) + " rows, " + std::to_string(stride) + " bytes apart,").c_str());
}

void check_copy(const deepep_copy_args& args) {
  check_span("dst", args.dst, args.bytes);
  check_span("src", args.src, args.bytes);
  if (args.dst < args.src + args.bytes && args.src < args.dst + args.bytes) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "%llu bytes from 0x%llx overlap as many from 0x%llx", shown(args.bytes),
           shown(args.src), shown(args.dst));
  }
}

void check_fill(const deepep_fill_args& args) {
  check_span("dst", args.dst, args.bytes);
  if (args.value > 255) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "value is %u, at most 255", args.value);
}

ScaleStrides scale_strides(uint32_t max_rows, uint32_t num_scales, uint32_t elem_bytes, bool column_major) {
  if (num_scales == 0) return {};
  if (!column_major) return {uint64_t{num_scales} * elem_bytes, elem_bytes};
  return {elem_bytes, align_up(max_rows, 16 / elem_bytes) * elem_bytes};
}

RoutingPlan check_dispatch(const Buffer& buffer, const deepep_dispatch_args& args, const HandleFacts* handle) {
  check_routing(buffer, args, buffer.options.max_tokens_per_rank);
  check_payload(buffer, args);
  check_address("num_tokens_per_expert", args.num_tokens_per_expert, sizeof(int32_t));
  if (args.layout > DEEPEP_LAYOUT_EXPERT) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "layout is %u", args.layout);
  if (args.expert_alignment == 0 || args.expert_alignment > 65536) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "expert_alignment is %u, it must be 1 … 65536", args.expert_alignment);
  }
  if ((args.flags & DEEPEP_FLAG_ZERO_PADDING) != 0 && args.layout != DEEPEP_LAYOUT_EXPERT) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "ZERO_PADDING belongs to the expert layout, layout is %u", args.layout);
  }
  if ((args.flags & DEEPEP_FLAG_NO_CPU_SYNC) != 0 && args.counts_id != 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "counts_id is %llu, but NO_CPU_SYNC leaves the counts on the device",
           shown(args.counts_id));
  }
  const bool cached = (args.flags & DEEPEP_FLAG_CACHED) != 0;
  const RoutingPlan plan = cached ? plan_cached(args, handle) : plan_routing(args);
  if (args.topk_weights != 0 && plan.num_topk == 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "topk_weights are given, but the routing has no topk_idx");
  }
  if (handle && (plan.num_tokens > handle->max_tokens || plan.num_topk > handle->max_topk)) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "x has %u tokens of %u entries, the handle holds %u of %u", plan.num_tokens,
           plan.num_topk, handle->max_tokens, handle->max_topk);
  }
  return plan;
}

void name_outputs(const Buffer& buffer, const RoutingPlan& plan, deepep_dispatch_args& args) {
  const Regions& regions = buffer.regions;
  const uint64_t base = slot_base(buffer, static_cast<uint32_t>(args.slot));
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

void check_combine(const Buffer& buffer, const deepep_combine_args& args, const RoutingPlan& plan) {
  if (!plan.made) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "the handle holds no routing: no dispatch has filled it");
  if (args.hidden == 0 || args.hidden % 8 != 0 || args.hidden > buffer.options.hidden) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "hidden is %u, it must be a multiple of 8 up to the buffer's %u", args.hidden,
           buffer.options.hidden);
  }
  if (args.x != 0 && (args.x_stride % 16 != 0 || args.x_stride < uint64_t{args.hidden} * 2)) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "x_stride is %llu, it must be a multiple of 16 and at least %u", shown(args.x_stride),
           args.hidden * 2);
  }
  const uint32_t most = buffer.options.max_recv_tokens;
  check_rows("x", args.x, args.num_rows != 0 && args.num_rows < most ? args.num_rows : most, args.x_stride,
             uint64_t{args.hidden} * 2);
  if (args.weights != 0 && plan.space != RowSpace::expert) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "weights need a handle of the expert layout");
  }
  if (args.topk_weights != 0 && plan.num_topk == 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "topk_weights are given, but the handle's routing has no topk_idx");
  }
  if (args.topk_weights != 0 && plan.num_tokens > 0 && args.out_topk_weights == 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "topk_weights are given without out_topk_weights");
  }
  if (plan.num_tokens > 0 && args.out == 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "out is missing");
  check_address("x", args.x, 16);
  check_address("bias_0", args.bias_0, 16);
  check_address("bias_1", args.bias_1, 16);
  check_address("out", args.out, 16);
  check_address("topk_weights", args.topk_weights, sizeof(float));
  check_address("weights", args.weights, sizeof(float));
  check_address("out_topk_weights", args.out_topk_weights, sizeof(float));
}

void check_expert_rows(const Buffer& buffer, uint32_t slot, uint64_t x, uint64_t x_stride, uint64_t row_bytes) {
  const uint64_t region = slot_base(buffer, slot) + buffer.regions.expert_output;
  if (x < region || x >= region + buffer.regions.expert_output_bytes) return;
  if (x == region && x_stride == row_bytes) return;
  reject(DEEPEP_ERROR_INVALID_ARGUMENT,
         "x lies in the slot's expert-output region, but does not begin with it or has another stride (%llu) than it (%llu)",
         shown(x_stride), shown(row_bytes));
}

void check_layout(const Buffer& buffer, const deepep_dispatch_layout_args& args) {
  check_routing(
      buffer, args,
      static_cast<uint32_t>(larger(buffer.options.max_tokens_per_rank, buffer.options.max_low_latency_tokens_per_rank)));
  if (args.topk_idx == 0 && args.num_tokens > 0 && args.num_topk > 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "topk_idx is missing");
  }
  if (args.num_tokens_per_rank == 0 || args.num_tokens_per_expert == 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "num_tokens_per_rank or num_tokens_per_expert is missing");
  }
  if (args.is_token_in_rank == 0 && args.num_tokens > 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "is_token_in_rank is missing");
  }
  check_address("num_tokens_per_rank", args.num_tokens_per_rank, sizeof(int32_t));
  check_address("num_tokens_per_expert", args.num_tokens_per_expert, sizeof(int32_t));
}

void check_refusal(const deepep_refuse_args& args) {
  const bool known = args.op == DEEPEP_OP_DISPATCH || args.op == DEEPEP_OP_COMBINE || args.op == DEEPEP_OP_BARRIER ||
                     args.op == DEEPEP_OP_LOW_LATENCY_DISPATCH || args.op == DEEPEP_OP_LOW_LATENCY_COMBINE;
  if (!known) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "op is %d, which is no collective call", args.op);
  if (args.code <= DEEPEP_OK || args.code > DEEPEP_ERROR_NEEDS_RECOVERY) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "code is %d, it must be a DEEPEP_ERROR_*", args.code);
  }
}

void check_recovery(const Buffer& buffer, const deepep_buffer_recover_args& args, uint64_t epoch, uint64_t num_pending) {
  const uint32_t num_ranks = buffer.options.num_ranks;
  const uint64_t ranks = num_ranks == 64 ? ~uint64_t{0} : (uint64_t{1} << num_ranks) - 1;
  if (args.masked_ranks & ~ranks) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "masked_ranks is 0x%llx, there are %u ranks", shown(args.masked_ranks), num_ranks);
  }
  if (args.masked_ranks >> buffer.rank & 1) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "masked_ranks is 0x%llx, it names this rank, %u", shown(args.masked_ranks),
           buffer.rank);
  }
  if (args.epoch < epoch) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "epoch is %llu, this rank has enqueued %llu already", shown(args.epoch),
           shown(epoch));
  }
  if (args.epoch > kMaxBaseEpoch) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "epoch is %llu, at most %llu", shown(args.epoch), shown(kMaxBaseEpoch));
  }
  const uint64_t step = args.epoch - epoch + kEpochMargin;
  if (step >> 32 != 0 && static_cast<uint32_t>(step) < 2 * kEpochMargin) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT,
           "epoch is %llu, about a multiple of 2^32 above the %llu of this rank: give all ranks one that is %llu larger",
           shown(args.epoch), shown(epoch), shown(2 * kEpochMargin));
  }
  if (num_pending != 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "%llu operations have not ended yet", shown(num_pending));
  }
}

void check_mask(const Buffer& buffer, const deepep_mask_args& args) {
  if (args.masked > 1) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "masked is %u, at most 1", args.masked);
  if (args.rank >= buffer.options.num_ranks) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "rank is %u, num_ranks %u", args.rank, buffer.options.num_ranks);
  }
  if (args.rank == buffer.rank) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "rank is %u, which is this rank", args.rank);
}

}  // namespace deepep
