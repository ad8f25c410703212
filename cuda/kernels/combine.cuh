// Combine: expert outputs are announced, then each rank pulls the rows of its tokens and reduces them. One kernel.
//
// In: CombineParams. Out: bf16 [num_tokens, hidden] and, if asked, the weights brought back. Phases: PUBLISH (wait until
// earlier readers of the region are gone, copy in what the caller has elsewhere, exchange messages), REDUCE (pull). The sum of
// a token is taken in a fixed order in f32 (rows_pull.cuh). Graph-safe. Caller: launch_combine().
#pragma once

#include "rows.cuh"
#include "rows_pull.cuh"
#include "rows_push.cuh"

namespace deepep {

// Where the outputs of a rank lie, as this rank reads them.
struct Source {
  const uint8_t* rows;  // nullptr = the rank takes no part
  uint64_t stride;
  const float* weights;  // beside the rows: what combine brings back
};

struct CombineShared {
  CallShared call;
  RoutingHeader known;     // the handle's
  Readers readers;   // leader: of the slot's region, as the call began
  uint64_t told;     // leader: the ranks that its message goes to
  int32_t said_code; // leader: what that says
  uint64_t pulled;   // leader: rows that this rank has pulled
  Source sources[DEEPEP_MAX_RANKS];
};

// Leader's first warp: waits until no rank reads the expert-output region of this rank's slot any more.
__device__ inline void wait_for_readers(Leader& leader, uint32_t slot, const Readers& readers, int32_t kind) {
  // Readers of a combine before the last recovery have gone with it.
  if (readers.epoch <= leader.s.base_epoch) return;
  // Pairs with end_reading() of the peers, or with the announcement of one that gave up and reads no more.
  leader.wait_for(readers.ranks, {Reason::late_reader, readers.epoch, kind, true},
                  [&](uint32_t peer) { return slot_word_at(own_memory(leader.p), leader.p.regions.pulled, peer, slot); });
}

// The same where nobody knows them yet. One look for all lanes: the leader writes them soon after this, and a lane that looked
// late would wait alone.
__device__ inline void wait_for_readers(Leader& leader, uint32_t slot, int32_t kind) {
  const Readers readers = leader.p.state->readers[slot];
  wait_for_readers(leader, slot,
                   {__shfl_sync(kAllLanes, readers.epoch, 0), __shfl_sync(kAllLanes, readers.ranks, 0)}, kind);
}

// One thread: a combine that has failed on all ranks before any has read is read by none. Those of an earlier one may still
// read: a call that is refused, or copies nothing, has not waited for them.
__device__ inline void forget_readers(const CallParams& p, uint32_t slot, uint64_t epoch, const Readers& earlier = {}) {
  if (p.state->readers[slot].epoch == epoch) p.state->readers[slot] = earlier;
}

// This rank has read all it wants of a combine: tells `rank`.
__device__ inline void end_reading(const CallParams& p, uint32_t rank, uint32_t slot, uint64_t epoch) {
  if (rank == p.rank) return;
  // All reads are over: what they gave has been used before the blocks met. Nothing that was written is told with this, so a
  // fence would only say to the memory model what no GPU can do otherwise: take back a value that it has computed with. Pairs
  // with wait_for_readers() of `rank`.
  store_relaxed_sys(slot_word_at(p.symmetric[rank], p.regions.pulled, p.rank, slot), epoch);
}
// The same for the ranks in a view; one warp.
__device__ inline void end_reading(const CallParams& p, uint64_t view, const uint32_t* slots, uint64_t epoch) {
  for (uint32_t rank = threadIdx.x % kWarpLanes; rank < p.options.num_ranks; rank += kWarpLanes) {
    if (in_view(view, rank)) end_reading(p, rank, slots[rank], epoch);
  }
  __syncwarp();
}

struct Combine {
  const CombineParams& params;
  CombineShared& s;
  uint8_t* shared;

  __device__ const CallParams& p() const { return params.call; }
  __device__ bool by_expert() const { return params.routing.layout == DEEPEP_LAYOUT_EXPERT; }
  __device__ uint64_t row_bytes() const { return uint64_t{params.args.hidden} * 2; }
  __device__ uint8_t* slot(uint32_t rank, uint32_t number) const {
    return p().symmetric[rank] + slot_offset(p().regions, number);
  }
  __device__ uint8_t* region() const { return slot(p().rank, p().slot) + p().regions.expert_output; }
  __device__ const uint8_t* x() const { return reinterpret_cast<const uint8_t*>(params.args.x); }
  __device__ bool copies_rows() const { return params.args.x != 0 && x() != region(); }
  // Whether anything is put into the slot before it is announced.
  __device__ bool copies() const { return copies_rows() || params.args.topk_weights != 0; }
  __device__ uint32_t weights_a_row() const { return by_expert() ? 1 : params.routing.num_topk; }

  // ---- PUBLISH

  // A thread of each block, before call_begin(): its loads are under way together with those there.
  __device__ void read_known() const {
    s.known = *params.routing.header;
    const SlotRows rows = p().state->rows[p().slot];
    if (params.has_slot != 0 && rows.routing == params.routing.name) s.known.view = rows.view;
    if (is_leader()) s.readers = p().state->readers[p().slot];
  }
  __device__ bool is_valid() const { return s.known.valid == params.routing.name; }

  // Whether the number of this rank's rows must be known before anything is said; mostly it has time.
  __device__ bool needs_rows_first() const {
    return copies() || params.routing.num_tokens == 0 || (params.args.x == 0 && params.has_slot == 0);
  }
  __device__ void find_rows() const {
    if (is_valid()) find_row_bases(p(), params.routing, s.known.view, row_tables(p(), shared));
    __syncthreads();
  }

  // One thread: what this rank says of what all must say alike.
  __device__ void agree() const {
    say_routing(s.call, s.known.epoch);
    const bool has_rows = params.routing.num_tokens > 0 || (is_valid() && p().state->num_rows > 0);
    if (params.args.topk_weights == 0 && !has_rows) s.call.said_topk_weights = kNoOpinion;
  }

  // What can only be checked once the handle is filled.
  __device__ void check_content(Leader& leader) const {
    if (!is_valid()) {
      leader.refuse(DEEPEP_ERROR_INVALID_ARGUMENT, Reason::no_routing);
    } else if (params.args.x == 0 && params.has_slot == 0 && p().state->num_rows > 0) {
      Finding finding;
      finding.seen = static_cast<int64_t>(p().state->num_rows);
      leader.refuse(DEEPEP_ERROR_INVALID_ARGUMENT, Reason::no_rows_given, finding);
    } else if (copies() && params.args.num_rows != 0 && p().state->num_rows > params.args.num_rows) {
      Finding finding;
      finding.expected = static_cast<int64_t>(p().state->num_rows);
      finding.seen = params.args.num_rows;
      leader.refuse(DEEPEP_ERROR_INVALID_ARGUMENT, Reason::few_rows_given, finding);
    }
  }

  // The leader's block until it goes, or stops with s.call.code: true when rows may be pulled. The second warp publishes; where
  // nothing is copied it waits for its fence beside what the first does.
  __device__ bool lead() {
    const bool leads = threadIdx.x < kWarpLanes, publishes = threadIdx.x / kWarpLanes == 1;
    Leader leader(p(), s.call);
    if (needs_rows_first()) find_rows();
    if (publishes) {
      if (threadIdx.x == kWarpLanes) agree();
      __syncwarp();
      if (!copies()) fence_to_peers(p());  // The outputs, which are there.
    }
    bool ready = true;
    if (leads) {
      ready = leader.enter(DEEPEP_PHASE_PUBLISH);
      if (ready) check_content(leader);
      if (!leader.failed()) {
        leader.begin_waits();
        wait_for_readers(leader, p().slot, s.readers, 1);
        ready = !leader.failed();
      }
      if (leader.lane == 0) {
        s.told = all_ranks(p()) & ~(s.call.masked | s.call.lost);
        s.said_code = s.call.code;
        if (ready && s.call.code == 0) p().state->readers[p().slot] = {s.call.epoch, s.told};
      }
    }
    // A call that failed half-way says no more; one that is refused says so in its message.
    ready = !__syncthreads_or(leads && !ready);
    if (copies()) {
      if (threadIdx.x == 0) release_blocks(p(), s.call, kStepCounted, ready && s.said_code == 0);
      if (ready && s.said_code == 0) {
        copy_in();
        arrive(p(), kMeetCopied);
        wait_for_blocks(p(), s.call, kMeetCopied, false);
      }
    }
    if (publishes && ready) leader.publish_to(s.told, s.said_code, copies());
    if (!needs_rows_first() && is_valid()) {
      find_row_bases_beside(p(), params.routing, s.known.view, row_tables(p(), shared));
    }
    if (leads && ready) {
      if (leader.gather(1, false)) leader.enter(DEEPEP_PHASE_REDUCE);
      // All ranks found it alike before any has read: the region has no readers after all.
      else if (leader.lane == 0 && p().state->finding.agreed != 0)
        forget_readers(p(), p().slot, s.call.epoch);
    }
    const bool goes = !__syncthreads_or(leads && s.call.code != 0);
    if (threadIdx.x == 0) release_blocks(p(), s.call, kStepGo, goes);
    return goes;
  }

  // Copies what the peers will pull; this rank's own rows are read where they are. All blocks share the rows.
  __device__ void copy_in() {
    const uint64_t num_rows = __ldcg(&p().state->num_rows);
    const TokenRange rows = cut({0, static_cast<uint32_t>(num_rows)}, blockIdx.x, gridDim.x);
    const auto* weights = reinterpret_cast<const float*>(params.args.topk_weights);
    if (weights != nullptr) {
      auto* to = reinterpret_cast<float*>(slot(p().rank, p().slot) + p().regions.expert_weights);
      const uint64_t end = uint64_t{rows.end} * weights_a_row();
      for (uint64_t i = uint64_t{rows.begin} * weights_a_row() + threadIdx.x; i < end; i += blockDim.x) to[i] = weights[i];
    }
    if (!copies_rows()) return;
    uint64_t own_begin = 0, own_end = 0;
    if (!by_expert()) {
      const CountMatrix matrix = matrix_of(p(), params.routing, s.known.view);
      own_begin = tokens_before(matrix, p().rank, p().rank);
      own_end = tokens_before(matrix, p().rank + 1, p().rank);
    }
    if (threadIdx.x / kWarpLanes < params.copy.warps) {
      const PushRows push = {.x = x(),
                             .x_stride = params.args.x_stride,
                             .row_bytes = static_cast<uint32_t>(row_bytes()),
                             .hops = 1,
                             .begin = 0,
                             .end = static_cast<uint32_t>(num_rows),
                             .plan = params.copy,
                             .claims = &p().state->claims[kClaimPush]};
      const auto to = [&](uint32_t row, uint32_t hop) -> uint8_t* {
        return hop != 0 || (row >= own_begin && row < own_end) ? nullptr : region() + row * row_bytes();
      };
      if (params.copy.tma != 0)
        push_rows<true>(push, shared, barriers, to, [](uint32_t) {});
      else
        push_rows<false>(push, shared, barriers, to, [](uint32_t) {});
    }
    __syncthreads();
  }
  uint64_t* barriers;

  // True when rows may be pulled. By all threads.
  __device__ bool publish() {
    if (s.call.skipped) return false;
    if (is_leader()) return lead();
    if (copies()) {
      // A stop is for good: whoever asked again would change the answer that others of the block are reading.
      if (!await_leader(p(), s.call, kStepCounted)) return false;
      copy_in();
      arrive(p(), kMeetCopied);
    }
    return await_leader(p(), s.call, kStepGo);
  }

  // ---- REDUCE

  __device__ void find_sources() {
    const DeviceState& state = *p().state;
    // The leader's block knows it already.
    const uint64_t view = is_leader() ? s.call.view : __ldcg(&state.view);
    if (threadIdx.x == 0 && !is_leader()) s.call.view = view;
    for (uint32_t rank = threadIdx.x; rank < p().options.num_ranks; rank += blockDim.x) {
      Source source = {};
      if (in_view(view, rank) && in_view(s.known.view, rank)) {
        const uint8_t* from = slot(rank, is_leader() ? s.call.peer_slots[rank] : __ldcg(&state.peer_slots[rank]));
        source = {from + p().regions.expert_output, row_bytes(),
                  reinterpret_cast<const float*>(from + p().regions.expert_weights)};
      }
      if (rank == p().rank && params.args.x != 0) source.rows = x(), source.stride = params.args.x_stride;
      s.sources[rank] = source;
    }
    __syncthreads();
  }

  // The row of a hop: nullptr when there is none. `index` = its number on its rank, `rank` likewise.
  __device__ const Source* source_of(uint32_t token, uint32_t hop, uint64_t& row) const {
    if (hop >= params.routing.width) return nullptr;
    const DeviceHop from = params.routing.hops[uint64_t{token} * params.routing.width + hop];
    if (from.key < 0) return nullptr;
    const auto key = static_cast<uint32_t>(from.key);
    const uint32_t rank = by_expert() ? p().partition.rank(key) : key;
    row = uint64_t{__ldcg(row_bases(p()) + key)} + from.index;
    return s.sources[rank].rows != nullptr ? &s.sources[rank] : nullptr;
  }

  // The weights of this block's tokens, summed over their rows in ascending rank, or by entry in the expert layout.
  __device__ void bring_weights_back(TokenRange tokens) const {
    const uint32_t num_topk = params.routing.num_topk;
    auto* out = reinterpret_cast<float*>(params.args.out_topk_weights);
    const uint64_t end = uint64_t{tokens.end} * num_topk;
    for (uint64_t i = uint64_t{tokens.begin} * num_topk + threadIdx.x; i < end; i += blockDim.x) {
      const auto token = static_cast<uint32_t>(i / num_topk), k = static_cast<uint32_t>(i % num_topk);
      float sum = 0.0f;
      uint64_t row = 0;
      if (by_expert()) {
        if (const Source* source = source_of(token, k, row)) sum = source->weights[row];
      } else if (params.routing.experts[i] >= 0) {
        for (uint32_t hop = 0; hop < params.routing.width; ++hop) {
          if (const Source* source = source_of(token, hop, row)) sum = __fadd_rn(sum, source->weights[row * num_topk + k]);
        }
      }
      out[i] = sum;
    }
  }

  template <bool kTma, bool kWeighted>
  __device__ void reduce() {
    const TokenRange tokens = block_tokens(params.routing.num_tokens);
    if (params.args.topk_weights != 0) bring_weights_back(tokens);
    if (threadIdx.x / kWarpLanes >= params.plan.warps) return;
    const auto* weights = reinterpret_cast<const float*>(params.args.weights);
    const PullRows pull = {.hidden = params.args.hidden,
                           .hops = params.routing.width,
                           .begin = 0,
                           .end = params.routing.num_tokens,
                           .bias_0 = reinterpret_cast<const uint16_t*>(params.args.bias_0),
                           .bias_1 = reinterpret_cast<const uint16_t*>(params.args.bias_1),
                           .out = reinterpret_cast<uint16_t*>(params.args.out),
                           .plan = params.plan,
                           .claims = &p().state->claims[kClaimPull]};
    pull_rows<kTma, kWeighted>(pull, shared, barriers, [&](uint32_t token, uint32_t hop, float& weight) -> const uint16_t* {
      uint64_t row = 0;
      const Source* source = source_of(token, hop, row);
      if (source == nullptr) return nullptr;
      if constexpr (kWeighted) weight = weights[uint64_t{token} * params.routing.num_topk + hop];
      return reinterpret_cast<const uint16_t*>(source->rows + row * source->stride);
    });
  }

  // One warp: rows that this rank has pulled.
  __device__ uint64_t rows_pulled() const {
    const uint32_t lane = threadIdx.x % kWarpLanes;
    const uint32_t ranks = p().options.num_ranks, experts = p().options.num_experts;
    const uint32_t columns = by_expert() ? experts : ranks;
    const uint32_t* counts = by_expert() ? params.routing.entries : params.routing.tokens;
    uint64_t sum = 0;
    for (uint32_t i = lane; i < columns; i += kWarpLanes) {
      if (s.sources[by_expert() ? p().partition.rank(i) : i].rows != nullptr) sum += counts[p().rank * columns + i];
    }
    for (uint32_t step = kWarpLanes / 2; step != 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    return sum;
  }

  __device__ void finish(bool went) {
    if (went && threadIdx.x / kWarpLanes == 1) {  // beside the leader, which waits for the blocks
      const uint64_t pulled = rows_pulled();
      if (threadIdx.x == kWarpLanes) s.pulled = pulled;
    }
    wait_for_blocks(p(), s.call, kMeetEnd, false);
    if (threadIdx.x >= kWarpLanes) return;
    Leader leader(p(), s.call);
    if (went && !leader.is_overtaken()) {
      end_reading(p(), s.call.view & ~s.call.lost, p().state->peer_slots, s.call.epoch);
      if (leader.lane == 0) reduce_add_relaxed_gpu(&p().state->rows_pulled, s.pulled);
    }
    call_end(p(), s.call, {true, true, true});
  }
};

// Combine of one rank. Collective; graph-safe. Block 0 leads. kWeighted: rows are multiplied by args.weights (expert layout).
template <bool kTma, bool kWeighted>
__global__ void __launch_bounds__(kMaxBlockThreads, 1) combine_kernel(const __grid_constant__ CombineParams params) {
  extern __shared__ __align__(128) uint8_t dynamic_shared[];
  __shared__ CombineShared s;
  __shared__ uint64_t barriers[kMaxBarriers];
  await_kernel_before();
  Combine combine{params, s, dynamic_shared, barriers};
  if (threadIdx.x == kWarpLanes) combine.read_known();
  call_begin(params.call, s.call, true, true);
  const bool goes = combine.publish();
  if (goes) {
    combine.find_sources();
    combine.template reduce<kTma, kWeighted>();
  }
  arrive(params.call, kMeetEnd);
  if (is_leader()) combine.finish(goes);
}

}  // namespace deepep
