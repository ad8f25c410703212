// Low-latency mode: a half of a call, or both, becomes the params of one kernel.
//
// In: args that api/low_latency.cpp has checked; Buffer::mutex is held. Out: the kernel, enqueued. What a later half needs of
// an earlier one is in device memory (LowLatencyRouting), so captured halves find what their own replay has left there; the
// host keeps only what does not change from replay to replay.

#include "../api/low_latency.hpp"

#include <bit>

#include "../kernels/launch.hpp"
#include "buffer.hpp"
#include "low_latency_slot.hpp"

namespace deepep {
namespace {

LowLatencyRouting routing_of(const Buffer& buffer, uint32_t index, const LowLatencyFacts& facts) {
  LowLatencyRouting routing = buffer.low_latency_routing(index);
  routing.num_tokens = facts.plan.num_tokens;
  routing.num_topk = facts.plan.num_topk;
  return routing;
}

LowLatencyScales scales_of(const LowLatencyLayout& layout) {
  return {.num = layout.scales.num_scales,
          .elem_bytes = layout.scales.elem_bytes,
          .from_elem_stride = layout.scales.from_elem_stride,
          .to_row_stride = layout.scales.to.row,
          .to_elem_stride = layout.scales.to.elem,
          .expert_stride = layout.expert_stride};
}

LowLatencyReceiveParams receive_params(const Buffer& buffer, const CallParams& call, int32_t index,
                                       const LowLatencyFacts& facts, uint64_t wait_stats) {
  const auto slot = static_cast<uint32_t>(index);
  LowLatencyReceiveParams params = {.call = call,
                                    .routing = routing_of(buffer, slot, facts),
                                    .scales = scales_of(facts.layout),
                                    .row_bytes = facts.layout.row_bytes,
                                    .reserved = 0,
                                    .wait_stats = wait_stats};
  params.call.slot = slot;
  return params;
}

// Ranks to and from which scales in columns go as rows, which who receives them turns: a link takes single words, far apart, no
// faster than whole lines. For much that goes over links only, and where the blocks can wait for the rows.
uint64_t turns_scales_of(const Buffer& buffer, const CallParams& call, const deepep_low_latency_dispatch_args& args,
                         const LowLatencyFacts& facts) {
  constexpr uint32_t kFlags = DEEPEP_FLAG_FP8 | DEEPEP_FLAG_SCALES_COLUMN_MAJOR;
  if ((args.flags & kFlags) != kFlags || !facts.received || is_led_dispatch(call)) return 0;
  const uint64_t tokens = uint64_t{facts.plan.num_tokens} * static_cast<uint32_t>(std::popcount(buffer.turned_with));
  return tokens >= uint64_t{buffer.turned_tokens} * buffer.options.num_ranks ? buffer.turned_with : 0;
}

// A plan needs at least one row a token.
uint32_t hops_of(const LowLatencyFacts& facts) { return facts.plan.num_topk > 0 ? facts.plan.num_topk : 1; }

Plan plan_combine(const Buffer& buffer, const LowLatencyFacts& facts, uint32_t flags, int32_t num_sms) {
  return buffer.plan({.op = DEEPEP_OP_LOW_LATENCY_COMBINE,
                      .row_bytes = buffer.options.hidden * 2,
                      .hops = hops_of(facts),
                      .num_sms = num_sms,
                      .num_tokens = facts.plan.num_tokens,
                      .num_experts = buffer.options.num_experts,
                      .fp8 = (flags & DEEPEP_FLAG_FP8) != 0});
}

cudaError_t launch_combine(const Buffer& buffer, const CallParams& call, const LowLatencySlot& slot,
                           const deepep_low_latency_combine_args& args, Halves halves, const Plan& plan, Place place) {
  const auto index = static_cast<uint32_t>(args.slot);
  LowLatencyCombineParams params = {.call = call,
                                    .args = args,
                                    .routing = routing_of(buffer, index, slot),
                                    .sends = halves != Halves::receive ? 1u : 0u,
                                    .receives = halves != Halves::send ? 1u : 0u,
                                    .plan = plan};
  params.call.slot = index;
  return launch_low_latency_combine(params, place);
}

}  // namespace

LowLatencyRouting cut_low_latency_routing(uint8_t* base, const Options& options, uint64_t& bytes) {
  bytes = 0;
  if (options.max_low_latency_tokens_per_rank == 0) return {};
  const uint64_t entries = uint64_t{options.max_low_latency_tokens_per_rank} * options.num_topk;
  const auto cut = [&](uint64_t size) {
    uint8_t* const part = base + bytes;
    bytes = align_up(bytes + size, kRegionAlignment);
    return part;
  };
  LowLatencyRouting routing = {};
  routing.header = reinterpret_cast<LowLatencyHeader*>(cut(sizeof(LowLatencyHeader)));
  routing.rows = reinterpret_cast<uint32_t*>(cut(entries * sizeof(uint32_t)));
  routing.experts = reinterpret_cast<int32_t*>(cut(entries * sizeof(int32_t)));
  routing.kept_experts = reinterpret_cast<int32_t*>(cut(entries * sizeof(int32_t)));
  routing.kept_weights = reinterpret_cast<float*>(cut(entries * sizeof(float)));
  return routing;
}

uint64_t enqueue_dispatch(Buffer& buffer, const deepep_low_latency_dispatch_args& args,
                          const std::shared_ptr<LowLatencySlot>& slot) {
  const Plan plan = buffer.plan({.op = DEEPEP_OP_LOW_LATENCY_DISPATCH,
                                 .row_bytes = args.row_bytes,
                                 .hops = hops_of(*slot),
                                 .num_sms = args.num_sms,
                                 .num_tokens = slot->plan.num_tokens,
                                 .num_experts = buffer.options.num_experts,
                                 .fp8 = (args.flags & DEEPEP_FLAG_FP8) != 0});
  const Halves halves = slot->received ? Halves::both : Halves::send;
  const auto index = static_cast<uint32_t>(args.slot);
  const uint64_t epoch =
      buffer.enqueue(stream_fields(args), {.op = DEEPEP_OP_LOW_LATENCY_DISPATCH, .collective = true, .halves = halves},
                     [&](const CallParams& call, Place place) {
                       LowLatencyDispatchParams params = {.call = call,
                                                          .args = args,
                                                          .routing = routing_of(buffer, index, *slot),
                                                          .scales = scales_of(slot->layout),
                                                          .row_bytes = slot->layout.row_bytes,
                                                          .receives = slot->received ? 1u : 0u,
                                                          .plan = plan,
                                                          .blocks_a_token = 0,
                                                          .place_shift = 0,
                                                          .piece_units = 0,
                                                          .row_pieces = 0,
                                                          .listeners = 0,
                                                          .first_mover = 0,
                                                          .turns_scales_of = turns_scales_of(buffer, call, args, *slot)};
                       params.call.slot = index;
                       return launch_low_latency_dispatch(params, place);
                     });
  slot->dispatch_capture = buffer.present_capture();
  return epoch;
}

void enqueue_dispatch_receive(Buffer& buffer, const deepep_receive_args& args, const std::shared_ptr<LowLatencySlot>& slot) {
  buffer.sms(args.num_sms);
  buffer.enqueue(stream_fields(args),
                 {.op = DEEPEP_OP_LOW_LATENCY_DISPATCH, .halves = Halves::receive, .send_capture = slot->dispatch_capture},
                 [&](const CallParams& call, Place place) {
                   return launch_low_latency_receive(receive_params(buffer, call, args.slot, *slot, slot->wait_stats), place);
                 });
}

uint64_t enqueue_combine(Buffer& buffer, const deepep_low_latency_combine_args& args,
                         const std::shared_ptr<LowLatencySlot>& slot) {
  const Plan plan = plan_combine(buffer, *slot, args.flags, args.num_sms);
  const Halves halves = (args.flags & DEEPEP_FLAG_RECEIVE_HOOK) == 0 ? Halves::both : Halves::send;
  const uint64_t epoch =
      buffer.enqueue(stream_fields(args), {.op = DEEPEP_OP_LOW_LATENCY_COMBINE, .collective = true, .halves = halves},
                     [&](const CallParams& call, Place place) {
                       return launch_combine(buffer, call, *slot, args, halves, plan, place);
                     });
  slot->combine = args;
  slot->combine_capture = buffer.present_capture();
  return epoch;
}

void enqueue_combine_receive(Buffer& buffer, const deepep_receive_args& args, const std::shared_ptr<LowLatencySlot>& slot) {
  const Plan plan = plan_combine(buffer, *slot, slot->combine.flags, args.num_sms);
  buffer.enqueue(stream_fields(args),
                 {.op = DEEPEP_OP_LOW_LATENCY_COMBINE, .halves = Halves::receive, .send_capture = slot->combine_capture},
                 [&](const CallParams& call, Place place) {
                   return launch_combine(buffer, call, *slot, slot->combine, Halves::receive, plan, place);
                 });
}

void enqueue_combine_give_up(Buffer& buffer, int32_t index, const std::shared_ptr<LowLatencySlot>& slot) {
  const CaptureId capture = buffer.present_capture();
  if (capture != 0 && capture != slot->combine_capture) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT,
           "the buffer's calls are being captured, and the receive half of a combine of slot %d is still to come", index);
  }
  buffer.enqueue({}, {.op = DEEPEP_OP_LOW_LATENCY_COMBINE, .halves = Halves::none},
                 [&](const CallParams& call, Place place) {
                   return launch_low_latency_give_up(receive_params(buffer, call, index, *slot, 0), place);
                 });
}

}  // namespace deepep
