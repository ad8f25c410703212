// The kernels' launches; see launch.hpp. Every kernel of the library is instantiated here, and only here.
#include <algorithm>
#include <iterator>

#include "copy.cuh"
#include "dispatch.cuh"
#include "launch.hpp"
#include "low_latency_combine.cuh"
#include "low_latency_dispatch.cuh"
#include "small.cuh"

namespace deepep {
namespace {

constexpr uint32_t kCopyVectors = 4;

const void* const kKernels[] = {
    reinterpret_cast<const void*>(dispatch_kernel<true>),
    reinterpret_cast<const void*>(dispatch_kernel<false>),
    reinterpret_cast<const void*>(combine_kernel<true, false>),
    reinterpret_cast<const void*>(combine_kernel<true, true>),
    reinterpret_cast<const void*>(combine_kernel<false, false>),
    reinterpret_cast<const void*>(combine_kernel<false, true>),
    reinterpret_cast<const void*>(low_latency_dispatch_kernel<false, false>),
    reinterpret_cast<const void*>(low_latency_dispatch_kernel<true, false>),
    reinterpret_cast<const void*>(low_latency_dispatch_kernel<true, true>),
    reinterpret_cast<const void*>(low_latency_combine_kernel<false, false>),
    reinterpret_cast<const void*>(low_latency_combine_kernel<true, false>),
    reinterpret_cast<const void*>(low_latency_combine_kernel<false, true>),
    reinterpret_cast<const void*>(low_latency_combine_kernel<true, true>),
    reinterpret_cast<const void*>(low_latency_receive_kernel),
    reinterpret_cast<const void*>(low_latency_give_up_kernel),
    reinterpret_cast<const void*>(message_kernel),
    reinterpret_cast<const void*>(readers_kernel),
    reinterpret_cast<const void*>(layout_kernel),
    reinterpret_cast<const void*>(update_kernel),
    reinterpret_cast<const void*>(copy_kernel<kCopyVectors>),
};
constexpr size_t kNumWithDynamicShared = 13;  // the first of them

template <class Params>
cudaError_t launch(void (*kernel)(Params), Params& params, uint32_t blocks, uint32_t threads, uint64_t shared, Place place) {
  params.call.agreed_hash = agreed_hash(params.call.agreed);
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = shared;
  config.stream = place.stream;
  config.attrs = &early;
  config.numAttrs = place.early ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// What all ranks must say alike of a call, the epoch of a known routing left out. `call` has what goes for every call.
void agree(CallParams& call, const DispatchParams& params) {
  const deepep_dispatch_args& args = params.args;
  const RoutingParams& routing = params.routing;
  call.agreed[kAgreedLayout] = routing.layout;
  call.agreed[kAgreedExpertAlignment] = routing.expert_alignment;
  call.agreed[kAgreedRowBytes] = args.row_bytes;
  call.agreed[kAgreedNumScales] = args.num_scales;
  call.agreed[kAgreedScaleElemBytes] = args.num_scales != 0 ? args.scale_elem_bytes : 0;
  call.agreed[kAgreedNumTopk] = routing.num_topk;
  call.agreed[kAgreedTopkIdxBytes] = routing.num_topk > 0 ? routing.topk_idx_bytes : 0;
  call.agreed[kAgreedTopkWeights] = args.topk_weights != 0 ? 1 : routing.num_tokens == 0 ? kNoOpinion : 0;
  call.agreed[kAgreedCached] = (args.flags & DEEPEP_FLAG_CACHED) != 0 ? 1 : 0;
  call.agreed[kAgreedFlags] = args.flags & DEEPEP_FLAG_SCALES_COLUMN_MAJOR;
}
void agree(CallParams& call, const CombineParams& params) {
  call.agreed[kAgreedLayout] = params.routing.layout;
  call.agreed[kAgreedExpertAlignment] = params.routing.expert_alignment;
  call.agreed[kAgreedRowBytes] = params.args.hidden * 2;
  call.agreed[kAgreedNumTopk] = params.routing.num_topk;
  call.agreed[kAgreedTopkWeights] = params.args.topk_weights != 0 ? 1 : 0;
}
void agree(CallParams& call, const LowLatencyDispatchParams& params) {
  constexpr uint32_t kFlags = DEEPEP_FLAG_SCALES_COLUMN_MAJOR | DEEPEP_FLAG_FP8 | DEEPEP_FLAG_ROUND_SCALE | DEEPEP_FLAG_UE8M0;
  const deepep_low_latency_dispatch_args& args = params.args;
  call.agreed[kAgreedRowBytes] = args.row_bytes;
  call.agreed[kAgreedNumScales] = args.num_scales;
  call.agreed[kAgreedScaleElemBytes] = args.num_scales != 0 ? args.scale_elem_bytes : 0;
  call.agreed[kAgreedFlags] = args.flags & kFlags;
}

// Few tokens have a warp for every part, and one is left over: the leader's, which has no time before the others.
void divide_few(DispatchParams& params) {
  const auto blocks = static_cast<uint32_t>(params.plan.sms);
  const uint32_t pieces = push_pieces(params.args.row_bytes), parts = pieces + params.routing.width;
  const uint64_t all = uint64_t{params.routing.num_tokens} * parts;
  const bool is_few = params.routing.width <= kWarpLanes && all < uint64_t{params.plan.warps} * blocks;
  params.few_pieces = pieces;
  params.few_parts = is_few ? parts : 0;
  params.sending_blocks = is_few && all < params.plan.warps ? 1 : blocks;
}

// A block of an operation needs room to count in, or to work out row bases, too.
Plan with_room(Plan plan, uint64_t bytes) {
  plan.block_bytes = std::max(plan.block_bytes, static_cast<uint32_t>(bytes));
  return plan;
}

}  // namespace

cudaError_t load_kernels(bool& launch_early) {
  launch_early = true;
  int device = 0, most = 0;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  if (const cudaError_t error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return error;
  for (size_t i = 0; i < std::size(kKernels); ++i) {
    cudaFuncAttributes attributes;
    if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kKernels[i])) return error;
    launch_early = launch_early && attributes.ptxVersion >= 90 && attributes.binaryVersion >= 90;
    if (i >= kNumWithDynamicShared) continue;
    const int dynamic = most - static_cast<int>(attributes.sharedSizeBytes);
    if (const cudaError_t error = cudaFuncSetAttribute(kKernels[i], cudaFuncAttributeMaxDynamicSharedMemorySize, dynamic)) {
      return error;
    }
  }
  return cudaSuccess;
}

cudaError_t launch_dispatch(DispatchParams& params, Place place) {
  params.plan = with_room(params.plan, count_room(params.call.options));
  divide_few(params);
  agree(params.call, params);
  const auto kernel = params.plan.tma != 0 ? dispatch_kernel<true> : dispatch_kernel<false>;
  return launch(kernel, params, static_cast<uint32_t>(params.plan.sms), (params.plan.warps + kClerks) * kWarpLanes,
                params.plan.block_bytes, place);
}

cudaError_t launch_combine(CombineParams& params, Place place) {
  params.plan = with_room(params.plan, row_tables_bytes(params.call.options));
  agree(params.call, params);
  params.copy = copy_plan(params.plan, params.args.hidden * 2);
  const bool weighted = params.args.weights != 0;
  const auto kernel = params.plan.tma != 0 ? (weighted ? combine_kernel<true, true> : combine_kernel<true, false>)
                                           : (weighted ? combine_kernel<false, true> : combine_kernel<false, false>);
  return launch(kernel, params, static_cast<uint32_t>(params.plan.sms), params.plan.warps * kWarpLanes, params.plan.block_bytes,
                place);
}

cudaError_t launch_low_latency_dispatch(LowLatencyDispatchParams& params, Place place) {
  const deepep_low_latency_dispatch_args& args = params.args;
  agree(params.call, params);
  // Few tokens are spread over all warps; many are cut into pieces that a warp can hold.
  const auto blocks = static_cast<uint32_t>(params.plan.sms), tokens = params.routing.num_tokens;
  const auto units = static_cast<uint32_t>(ceil_div(args.row_bytes, kUnitBytes));
  const TokenBlocks token_blocks = TokenBlocks::of(units, tokens != 0 ? blocks / tokens : 1, params.routing.num_topk);
  params.blocks_a_token = token_blocks.all();
  params.place_shift = token_blocks.place_shift;
  const uint64_t block_tokens = std::max<uint64_t>(1, ceil_div(uint64_t{tokens} * params.blocks_a_token, blocks));
  const DispatchWarps warps = DispatchWarps::of(ceil_div(units * block_tokens, token_blocks.row_blocks),
                                                params.call.options.num_experts, params.call.options.num_ranks);
  const uint32_t pieces = low_latency_pieces(units, params.plan.chunk_bytes / kUnitBytes, block_tokens,
                                             warps.movers * token_blocks.row_blocks);
  params.listeners = warps.listeners;
  params.first_mover = kMaxWarps - warps.movers;
  params.piece_units = static_cast<uint32_t>(ceil_div(units, pieces));
  params.row_pieces = static_cast<uint32_t>(ceil_div(units, params.piece_units));
  const bool casts = (args.flags & DEEPEP_FLAG_FP8) != 0;
  const auto kernel = !casts                       ? low_latency_dispatch_kernel<false, false>
                      : params.turns_scales_of != 0 ? low_latency_dispatch_kernel<true, true>
                                                    : low_latency_dispatch_kernel<true, false>;
  return launch(kernel, params, static_cast<uint32_t>(params.plan.sms), (params.plan.warps + 1) * kWarpLanes,
                params.plan.block_bytes, place);
}

cudaError_t launch_low_latency_receive(LowLatencyReceiveParams params, Place place) {
  return launch(low_latency_receive_kernel, params, 1, kReceiveWarps * kWarpLanes, 0, place);
}

cudaError_t launch_low_latency_combine(LowLatencyCombineParams& params, Place place) {
  const CallParams& call = params.call;
  const auto region =
      reinterpret_cast<uint64_t>(call.symmetric[call.rank]) + slot_offset(call.regions, call.slot) + call.regions.expert_output;
  const bool casts = (params.args.flags & DEEPEP_FLAG_FP8) != 0;
  // To announce what is there takes no more than one block.
  const bool moves = params.receives != 0 || casts || (params.args.x != 0 && params.args.x != region);
  const bool weighted = params.args.topk_weights != 0;
  const auto kernel = casts ? (weighted ? low_latency_combine_kernel<true, true> : low_latency_combine_kernel<false, true>)
                            : (weighted ? low_latency_combine_kernel<true, false> : low_latency_combine_kernel<false, false>);
  return launch(kernel, params, moves ? static_cast<uint32_t>(params.plan.sms) : 1, (params.plan.warps + 1) * kWarpLanes,
                params.plan.block_bytes, place);
}

cudaError_t launch_low_latency_give_up(LowLatencyReceiveParams params, Place place) {
  return launch(low_latency_give_up_kernel, params, 1, kWarpLanes, 0, place);
}

cudaError_t launch_message(MessageParams params, Place place) {
  return launch(message_kernel, params, 1, kSmallThreads, 0, place);
}

cudaError_t launch_readers(ReadersParams params, Place place) {
  return launch(readers_kernel, params, 1, kWarpLanes, 0, place);
}

cudaError_t launch_layout(LayoutParams params, int32_t num_sms, Place place) {
  return launch(layout_kernel, params, static_cast<uint32_t>(num_sms), kMaxBlockThreads, kCountBytes, place);
}

cudaError_t launch_copy(void* dst, const void* src, uint64_t bytes, int32_t num_sms, cudaStream_t stream) {
  void* args[] = {&dst, &src, &bytes};
  return cudaLaunchKernel(copy_kernel<kCopyVectors>, dim3(static_cast<uint32_t>(num_sms)), dim3(kCopyThreads), args, 0, stream);
}

cudaError_t launch_update(UpdateParams params, cudaStream_t stream) {
  void* args[] = {&params};
  return cudaLaunchKernel(update_kernel, dim3(1), dim3(1), args, 0, stream);
}

}  // namespace deepep
