// The small kernels: a barrier or a refusal, the wait before expert outputs are overwritten, the counting of a routing, and
// changes of the state in stream order.
//
// In: their params. Out: see deepep.h. One block each, but for the counting. Callers: launch.hpp's functions.
#pragma once

#include "combine.cuh"

namespace deepep {

constexpr uint32_t kSmallThreads = 256;

// A barrier of all unmasked ranks, or this rank's refusal of a call. Collective; graph-safe.
__global__ void __launch_bounds__(kSmallThreads, 1) message_kernel(const __grid_constant__ MessageParams params) {
  __shared__ CallShared s;
  await_kernel_before();
  const CallParams& p = params.call;
  call_begin(p, s, true, true);
  if (threadIdx.x < kWarpLanes) {
    Leader leader(p, s);
    if (!s.skipped && leader.enter(DEEPEP_PHASE_NOTIFY)) {
      if (params.refusal != 0) {
        Finding finding;
        finding.a = params.refusal;
        leader.refuse(params.refusal, Reason::own_refusal, finding);
      }
      leader.publish_all();
      leader.gather(-1, false);
    }
  }
  arrive(p, kMeetEnd);
  if (threadIdx.x < kWarpLanes) call_end(p, s, {true, true, false});
}

// Waits until nobody reads the expert-output region of a slot. Not collective; graph-safe.
__global__ void __launch_bounds__(kWarpLanes, 1) readers_kernel(const __grid_constant__ ReadersParams params) {
  __shared__ CallShared s;
  await_kernel_before();
  const CallParams& p = params.call;
  call_begin(p, s, false, true);
  Leader leader(p, s);
  if (!s.skipped && leader.enter(DEEPEP_PHASE_PUBLISH)) {
    leader.begin_waits();
    wait_for_readers(leader, p.slot, 1);
  }
  arrive(p, kMeetEnd);
  call_end(p, s, {false, true, false});
}

// The ranks that a token goes to.
__device__ inline uint64_t ranks_of_token(const CallParams& p, const RoutingInput& input, uint32_t token) {
  uint64_t ranks = 0;
  for (uint32_t k = 0; k < input.num_topk; ++k) {
    const int32_t expert = expert_of_entry(p, input, uint64_t{token} * input.num_topk + k);
    if (expert >= 0) ranks |= rank_bit(p.partition.rank(static_cast<uint32_t>(expert)));
  }
  return ranks;
}

// Counts a routing for the user. Not collective; graph-safe.
__global__ void __launch_bounds__(kMaxBlockThreads, 1) layout_kernel(const __grid_constant__ LayoutParams params) {
  extern __shared__ __align__(128) uint8_t dynamic_shared[];
  __shared__ CallShared s;
  await_kernel_before();
  const CallParams& p = params.call;
  const deepep_dispatch_layout_args& args = params.args;
  const auto num_tokens = static_cast<uint32_t>(args.num_tokens);
  const RoutingInput input = {reinterpret_cast<const void*>(args.topk_idx), nullptr, args.topk_idx_bytes, num_tokens,
                              static_cast<uint32_t>(args.num_topk)};
  call_begin(p, s, false, false);
  // Without entries, which is without topk_idx, no token goes anywhere.
  const TokenRange tokens = block_tokens(num_tokens);
  auto* in_rank = reinterpret_cast<uint8_t*>(args.is_token_in_rank);
  for (uint32_t token = tokens.begin + threadIdx.x; token < tokens.end; token += blockDim.x) {
    const uint64_t ranks = ranks_of_token(p, input, token);
    for (uint32_t rank = 0; rank < p.options.num_ranks; ++rank) {
      in_rank[uint64_t{token} * p.options.num_ranks + rank] = in_view(ranks, rank) ? 1 : 0;
    }
  }
  RoutingInput counted = input;
  if (input.num_topk == 0) counted.num_tokens = 0;
  const CountTables tables = count_tables(p, dynamic_shared, kCountBytes, false);
  count_block(p, counted, block_tokens(counted.num_tokens), tables, false, nullptr);
  arrive(p, kMeetEnd);
  if (!is_leader()) return;
  wait_for_blocks(p, s, kMeetEnd, false);
  const uint64_t bad = load_relaxed_gpu(&p.state->bad_entry);
  if (bad != 0 && threadIdx.x < kWarpLanes) {
    Leader leader(p, s);
    Finding finding;
    finding.a = static_cast<int32_t>(~bad / input.num_topk);
    finding.b = static_cast<int32_t>(~bad % input.num_topk);
    finding.expected = p.options.num_experts;
    finding.seen = input.raw(~bad);
    leader.refuse(DEEPEP_ERROR_INVALID_ARGUMENT, Reason::bad_entry, finding);
  }
  const uint32_t ranks = p.options.num_ranks;
  for (uint32_t i = threadIdx.x; bad == 0 && i < ranks + p.options.num_experts; i += blockDim.x) {
    const auto sum = static_cast<int32_t>(counted_before(p, gridDim.x, i));
    if (i < ranks)
      reinterpret_cast<int32_t*>(args.num_tokens_per_rank)[i] = sum;
    else
      reinterpret_cast<int32_t*>(args.num_tokens_per_expert)[i - ranks] = sum;
  }
  __syncthreads();
  if (threadIdx.x < kWarpLanes) call_end(p, s, {false, false, false});
}

// Masks, unmasks, recovers. Graph-safe, but of no use in one.
__global__ void update_kernel(const __grid_constant__ UpdateParams params) {
  const CallParams& p = params.call;
  DeviceState& state = *p.state;
  if (params.recover != 0) {
    state.masked = params.mask;
    state.epoch = state.base_epoch = params.epoch;
    state.failed = 0;
    // Nobody reads what earlier combines left in the slots: no survivor has work enqueued.
    for (Readers& readers : state.readers) readers = {};
  } else {
    state.masked = (state.masked | params.mask) & ~params.unmask;
    if (params.clear_failed != 0) {
      state.failed = 0;
      // Since the failure this rank has skipped its calls, and what it has yet to receive of earlier ones it will not.
      const uint64_t gone = p.lost | state.lost | rank_bit(p.rank);
      for (uint32_t peer = 0; peer < p.options.num_ranks; ++peer) {
        for (uint32_t slot = 0; slot < p.options.num_slots && !in_view(gone, peer); ++slot) {
          end_reading(p, peer, slot, state.epoch);
        }
      }
    }
  }
  p.host->masked = state.masked;
  store_release_sys(&p.host->epoch, state.epoch);
}

}  // namespace deepep
