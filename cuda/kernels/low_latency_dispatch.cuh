// Low-latency dispatch: rows go straight into the region of their expert, cast to FP8 on the way if asked. One kernel for the
// send half, or for both halves; the receive half alone is another.
//
// In: LowLatencyDispatchParams. Out: [num_local_experts, max_rows, row bytes] packed from 0 for each expert in the peers' slots
// and in this rank's, with counts, source tokens and ranges. Phases: NOTIFY (count, exchange counts), SEND (cast and push),
// ARRIVE (wait for everyone's rows). Graph-safe. Callers: launch_low_latency_dispatch(), launch_low_latency_receive().
//
// Nobody waits for a leader. Every block counts for itself, and pushes as soon as it has the counts of all ranks; every block
// says to every peer that its rows are there (`row_flags`). Beside that, the last warp of block 0 leads as in normal mode: it
// exchanges messages, and only when they tell of a failure, or a deadline passes, does it stop the others. That a block may
// then have pushed already does no harm: whoever has sent counts has given its slot. Only where ranks may be left out, and
// where deepep_inject wants something, do the blocks go by the leader's word.
#pragma once

#include "low_latency_count.cuh"
#include "pushed.cuh"
#include "rows_cast.cuh"
#include "rows_push.cuh"
#include "scales.cuh"

namespace deepep {

// Where a low-latency slot keeps what it received.
struct ExpertRegions {
  const LowLatencyScales& scales;
  uint32_t row_bytes;
  uint32_t max_rows;  // of an expert

  struct Row {
    uint8_t* x;
    uint8_t* scales;
    int32_t* src_idx;
  };
  __device__ Row row(const Regions& regions, uint8_t* slot, uint32_t local_expert, uint32_t row) const {
    const uint64_t at = uint64_t{local_expert} * max_rows + row;
    return {slot + regions.recv_x + at * row_bytes,
            slot + regions.recv_scales + local_expert * scales.expert_stride + row * scales.to_row_stride,
            reinterpret_cast<int32_t*>(slot + regions.recv_src_idx) + at};
  }
};

// ---- ARRIVE, in either kernel: the leader's warp ----

// A rank that died between its counts and its rows: the places of its rows become zeros without a source, the others stay where
// they are, because every rank has computed with them.
__device__ inline void forget_expert_rows_of(const CallParams& p, const ExpertRegions& regions, uint32_t src) {
  const uint32_t lane = threadIdx.x % kWarpLanes;
  uint8_t* slot = own_memory(p) + slot_offset(p.regions, p.slot);
  auto* ranges = reinterpret_cast<int64_t*>(slot + p.regions.layout_range);
  for (uint32_t local = 0; local < p.num_local_experts; ++local) {
    int64_t& range = ranges[local * p.options.num_ranks + src];
    const auto begin = static_cast<uint32_t>(range >> 32), count = static_cast<uint32_t>(range);
    for (uint32_t i = begin; i < begin + count; ++i) {
      const ExpertRegions::Row row = regions.row(p.regions, slot, local, i);
      for (uint32_t at = lane * 16; at < regions.row_bytes; at += kWarpLanes * 16) store_stream(row.x + at, {0, 0, 0, 0});
      for (uint32_t scale = lane; scale < regions.scales.num; scale += kWarpLanes) {
        for (uint32_t byte = 0; byte < regions.scales.elem_bytes; ++byte) {
          row.scales[scale * regions.scales.to_elem_stride + byte] = 0;
        }
      }
      if (lane == 0) *row.src_idx = -1;
    }
    __syncwarp();
    if (lane == 0) range = static_cast<int64_t>(begin) << 32;
  }
}

// Waits for everyone's rows. False when the call has failed.
__device__ inline bool receive_rows(Leader& leader, const LowLatencyRouting& routing, const ExpertRegions& regions) {
  const CallParams& p = leader.p;
  const uint64_t view = routing.header->view;
  if (p.mask_on_timeout != 0) {
    for (uint64_t rest = wait_pushed(leader, view); rest != 0; rest &= rest - 1) {
      forget_expert_rows_of(p, regions, static_cast<uint32_t>(__ffsll(static_cast<long long>(rest)) - 1));
    }
    return !leader.failed();
  }
  if (!leader.enter(DEEPEP_PHASE_ARRIVE)) return false;
  leader.begin_waits();
  const uint64_t epoch = leader.s.epoch;
  const uint32_t* blocks = routing.header->peer_blocks;
  const auto flags = [&](uint32_t src) { return row_flags_at(own_memory(p), p.regions, src); };
  // Pairs with announce_block() of each block of each rank. Their words are under way together, hence acquired together, below.
  const auto come = [&](uint64_t pending) {
    uint64_t came = 0;
#pragma unroll 8
    for (uint32_t src = 0; src < p.options.num_ranks; ++src) {
      bool has_come = in_view(pending, src);
      for (uint32_t block = leader.lane; has_come && block < blocks[src]; block += kWarpLanes) {
        has_come = load_relaxed_sys(flags(src) + block) >= epoch;
      }
      if (__all_sync(kAllLanes, has_come)) came |= rank_bit(src);
    }
    return came;
  };
  const auto seen = [&](uint32_t src) {
    uint64_t least = epoch;
    for (uint32_t block = 0; block < blocks[src]; ++block) {
      const uint64_t flag = load_relaxed_sys(flags(src) + block);
      least = flag < least ? flag : least;
    }
    return least;
  };
  leader.wait_until(view, {Reason::late_rows, epoch, 0, false}, come, seen);
  fence_acq_rel_sys();
  return !leader.failed();
}

// ---- the send half ----

struct LowLatencyShared {
  CallShared call;
  CountFindings found;
  uint64_t to;    // ranks that the workers tell their counts; the leader learns of more that are lost meanwhile
  uint64_t view;  // ranks that the workers count in
  uint8_t* slots[DEEPEP_MAX_RANKS];
};

struct LowLatencyDispatch {
  const LowLatencyDispatchParams& params;
  LowLatencyShared& s;
  uint8_t* shared;
  uint64_t* barriers;  // of bulk copies
  RoutingInput input;
  LowLatencyTables tables;

  __device__ LowLatencyDispatch(const LowLatencyDispatchParams& given, LowLatencyShared& own, uint8_t* dynamic_shared,
                                uint64_t* own_barriers)
      : params(given),
        s(own),
        shared(dynamic_shared),
        barriers(own_barriers),
        input{reinterpret_cast<const void*>(given.args.topk_idx), nullptr, given.args.topk_idx_bytes, given.routing.num_tokens,
              given.args.topk_idx != 0 ? given.routing.num_topk : 0},
        tables(dynamic_shared, given.call.options.num_experts, given.routing.num_topk) {}

  __device__ const CallParams& p() const { return params.call; }
  __device__ LowLatencyCount counting() { return {p(), input, tables, s.found}; }
  __device__ uint8_t* stages() const {
    return shared + low_latency_table_bytes(p().options.num_experts, params.routing.num_topk);
  }
  __device__ ExpertRegions regions() const { return {params.scales, params.row_bytes, p().regions.low_latency_rows}; }
  __device__ bool casts() const { return (params.args.flags & DEEPEP_FLAG_FP8) != 0; }

  // Whether the blocks go by the leader's word. The same on every block.
  __device__ bool is_led() const {
    return p().mask_on_timeout != 0 || p().inject[DEEPEP_PHASE_NOTIFY].wanted != 0 || p().inject[DEEPEP_PHASE_SEND].wanted != 0;
  }

  __device__ void agree(uint32_t (&agreed)[kNumAgreed]) const {
    constexpr uint32_t kFlags = DEEPEP_FLAG_SCALES_COLUMN_MAJOR | DEEPEP_FLAG_FP8 | DEEPEP_FLAG_ROUND_SCALE | DEEPEP_FLAG_UE8M0;
    for (uint32_t& value : agreed) value = 0;
    agreed[kAgreedOp] = DEEPEP_OP_LOW_LATENCY_DISPATCH;
    agreed[kAgreedRowBytes] = params.args.row_bytes;
    agreed[kAgreedNumScales] = params.args.num_scales;
    agreed[kAgreedScaleElemBytes] = params.args.num_scales != 0 ? params.args.scale_elem_bytes : 0;
    agreed[kAgreedFlags] = params.args.flags & kFlags;
    agreed[kAgreedMaskOnTimeout] = p().mask_on_timeout;
  }

  // ---- workers ----

  template <bool kTma, bool kCast>
  __device__ void work() {
    const TokenRange own = block_tokens(params.routing.num_tokens);
    counting().count(own);
    __syncthreads();  // The leader's warp has read the state.
    if (!s.call.skipped && exchange<kTma, kCast>(own)) send<kTma, kCast>(own);
    workers_arrive(p(), kMeetEnd);
  }

  // True when rows may be pushed: then the first round is cast, and has its places.
  template <bool kTma, bool kCast>
  __device__ bool exchange(TokenRange own) {
    const bool led = is_led();
    if (led && !workers_await_leader(p(), s.call, kStepCounted)) return false;
    uint32_t agreed[kNumAgreed];
    agree(agreed);
    const uint32_t hash = agreed_hash(agreed);
    counting().publish(s.call.epoch, s.to, hash, {p().slot, gridDim.x, s.found.bad != 0});
    if (led) workers_arrive(p(), kMeetCounted);
    prepare<kTma, kCast>(first_round(own));
    if (led && !workers_await_leader(p(), s.call, kStepGo)) return false;
    if (s.found.bad != 0) return false;
    const uint64_t view = led ? __ldcg(&p().state->view) : all_ranks(p()) & ~s.call.masked;
    if (threadIdx.x == 0) s.view = view;
    const bool came = counting().take(s.call, view, hash, [&](uint32_t rank, uint32_t slot) {
      s.slots[rank] = p().symmetric[rank] + slot_offset(p().regions, slot);
    });
    if (!came) atomicOr(&s.found.stop, 1u);
    workers_meet();
    counting().check_regions(view);
    workers_meet();
    if (came && threadIdx.x == 0) store_release_block(&s.found.counted, 1);
    return s.found.stop == 0 && s.found.overfull == 0;
  }

  // Tokens whose places fit into the tables, and whose rows fit into the stages where they are cast.
  template <bool kCast>
  __device__ uint32_t round_tokens() const {
    return kCast ? min(params.plan.stages, kRoundTokens) : kRoundTokens;
  }
  __device__ TokenRange first_round(TokenRange own) const { return round_at(own, own.begin); }
  __device__ TokenRange round_at(TokenRange own, uint32_t begin) const {
    const uint32_t most = casts() ? round_tokens<true>() : round_tokens<false>();
    return {begin, min(own.end, begin + most)};
  }

  // What can be done for a round before the counts are there.
  template <bool kTma, bool kCast>
  __device__ void prepare(TokenRange round) {
    counting().load_round(round);
    if constexpr (kCast) {
      const CastRows rows = {.channels = params.row_bytes,
                             .round = (params.args.flags & DEEPEP_FLAG_ROUND_SCALE) != 0,
                             .ue8m0 = (params.args.flags & DEEPEP_FLAG_UE8M0) != 0};
      const auto* x = reinterpret_cast<const uint8_t*>(params.args.x);
      cast_rows(rows, stages(), params.plan.chunk_bytes, round.end - round.begin, num_workers() / kWarpLanes,
                [&](uint32_t nth) { return x + uint64_t{round.begin + nth} * params.args.x_stride; });
      if constexpr (kTma && kHasTma) fence_proxy_async_shared();
    }
    workers_meet();
    if (threadIdx.x < kWarpLanes) counting().find_places(round);
    workers_meet();
  }

  // From places to rows in the experts' regions: `base` is known now. Combine will want them.
  __device__ void keep_rows(TokenRange round) {
    const uint32_t first = round.begin * input.num_topk, count = (round.end - round.begin) * input.num_topk;
    for (uint32_t i = threadIdx.x; i < count; i += num_workers()) {
      const int32_t expert = tables.experts[i];
      if (expert >= 0) tables.places[i] += tables.base[expert];
      params.routing.experts[first + i] = expert;
      params.routing.rows[first + i] = tables.places[i];
    }
    workers_meet();
  }

  template <bool kTma, bool kCast>
  __device__ void send(TokenRange own) {
    bool stopped = false;
    for (TokenRange round = first_round(own);;) {
      keep_rows(round);
      stopped = stopped || (p().mask_on_timeout != 0 && must_stop(p(), s.call, s.view));
      if (!stopped) {
        if constexpr (kCast)
          push_cast<kTma>(round);
        else
          push<kTma>(round);
      }
      round = round_at(own, round.end);
      if (round.begin >= own.end) break;
      workers_meet();
      prepare<kTma, kCast>(round);
    }
    if constexpr (kCast && kTma && kHasTma) finish_stores();
    if (p().mask_on_timeout == 0) announce_block();
  }

  // The row that an entry of the round becomes; x is nullptr when there is none.
  __device__ ExpertRegions::Row row_of(uint32_t i) const {
    const int32_t expert = tables.experts[i];
    if (expert < 0) return {};
    const auto key = static_cast<uint32_t>(expert);
    const uint32_t rank = expert_rank(key, p().options.num_experts, p().options.num_ranks);
    if (!in_view(s.view, rank)) return {};
    const uint32_t local = key - local_experts(p().options.num_experts, p().options.num_ranks, rank).first;
    return regions().row(p().regions, s.slots[rank], local, tables.places[i]);
  }

  // One warp: what lies beside a row.
  __device__ void put_beside(const ExpertRegions::Row& row, uint32_t token, const uint8_t* scales,
                             const ScaleUnits& units) const {
    const uint32_t lane = threadIdx.x % kWarpLanes;
    if (lane == 0) *row.src_idx = static_cast<int32_t>(token);
    for (uint32_t unit = lane; unit < units.count; unit += kWarpLanes) {
      store_unit(row.scales + units.to(unit), load_unit(scales + units.from(unit), units.bytes), units.bytes);
    }
  }

  __device__ ScaleUnits units(uint64_t alignment) const {
    const LowLatencyScales& scales = params.scales;
    return scale_units(ScaleRows{scales.num, scales.elem_bytes, scales.from_elem_stride, scales.to_elem_stride,
                                 alignment | scales.to_row_stride | scales.expert_stride});
  }

  // Rows that were cast: each entry's is copied out of shared memory by one warp.
  template <bool kTma>
  __device__ void push_cast(TokenRange round) {
    const uint32_t lane = threadIdx.x % kWarpLanes, warps = num_workers() / kWarpLanes;
    const uint32_t count = (round.end - round.begin) * input.num_topk;
    const ScaleUnits scale_units = units(0);
    for (uint32_t i = threadIdx.x / kWarpLanes; i < count; i += warps) {
      const ExpertRegions::Row row = row_of(i);
      if (row.x == nullptr) continue;
      const uint32_t nth = i / input.num_topk;
      const uint8_t* stage = stages() + nth * params.plan.chunk_bytes;
      if constexpr (kTma && kHasTma) {
        if (lane == 0) bulk_store(row.x, stage, params.row_bytes);
      } else {
        for (uint32_t at = lane * 16; at < params.row_bytes; at += kWarpLanes * 16) {
          store_stream(row.x + at, *reinterpret_cast<const uint4*>(stage + at));
        }
      }
      put_beside(row, round.begin + nth, stage + CastRows::scales_offset(params.row_bytes), scale_units);
    }
    if constexpr (kTma && kHasTma) {
      if (lane == 0) {
        bulk_commit();
        bulk_wait_read<0>();  // The stages are free for the next round.
      }
      __syncwarp();
    }
  }

  __device__ void finish_stores() const {
    if (threadIdx.x % kWarpLanes != 0) return;
    // The whole groups, not their reads alone: what was written is published next.
    bulk_wait<0>();
    fence_proxy_async();
  }

  // Rows as the caller has them.
  template <bool kTma>
  __device__ void push(TokenRange round) {
    const PushRows rows = {.x = reinterpret_cast<const uint8_t*>(params.args.x),
                           .x_stride = params.args.x_stride,
                           .row_bytes = params.row_bytes,
                           .hops = input.num_topk,
                           .begin = round.begin,
                           .end = round.end,
                           .plan = params.plan};
    const auto to = [&](uint32_t token, uint32_t hop) -> uint8_t* {
      return hop < input.num_topk ? row_of((token - round.begin) * input.num_topk + hop).x : nullptr;
    };
    const ScaleUnits scale_units = units(params.args.scales | params.args.scales_row_stride);
    push_rows<kTma>(rows, stages(), barriers, to, [&](uint32_t token) {
      const auto* scales = reinterpret_cast<const uint8_t*>(params.args.scales) + token * params.args.scales_row_stride;
      for (uint32_t hop = 0; hop < input.num_topk; ++hop) {
        const ExpertRegions::Row row = row_of((token - round.begin) * input.num_topk + hop);
        if (row.x != nullptr) put_beside(row, token, scales, scale_units);
      }
    });
  }

  // This block's rows are in place, which every peer is told.
  __device__ void announce_block() const {
    workers_meet();
    for (uint32_t dst = threadIdx.x; dst < p().options.num_ranks; dst += num_workers()) {
      if (dst == p().rank || !in_view(s.view, dst)) continue;
      // Pairs with receive_rows() of `dst`.
      store_release_sys(row_flags_at(p().symmetric[dst], p().regions, p().rank) + blockIdx.x, s.call.epoch);
    }
  }

  // ---- the last warp ----

  __device__ void lead() {
    if (threadIdx.x % kWarpLanes == 0) {
      read_call(p(), s.call, true, true);
      s.to = all_ranks(p()) & ~(s.call.masked | s.call.lost);
    }
    __syncthreads();  // The workers have counted.
    if (!is_leader()) return;
    Leader leader(p(), s.call);
    leader.wait_stats = reinterpret_cast<int64_t*>(params.args.wait_stats);
    LowLatencyHeader& header = *params.routing.header;
    bool sent = false;
    if (leader.lane == 0) {
      header.epoch = s.call.epoch;
      header.valid = 0;
      header.failure = Finding{};
    }
    __syncwarp();
    if (!s.call.skipped) {
      sent = exchange_messages(leader);
      if (is_led() || !sent) stop_or_release(kStepGo, sent);
      sent = sent && take_findings(leader);
    }
    leader.await_blocks(kMeetEnd, false);
    if (sent && p().mask_on_timeout != 0) {
      sent = !leader.is_left_out();
      if (sent) announce_pushed(leader, s.call.view, p().state->peer_slots);
    }
    if (leader.lane == 0) {
      header.valid = sent ? 1 : 0;
      if (!sent && p().state->finding.agreed != 0) header.failure = p().state->finding;
    }
    __syncwarp();
    if (sent && params.receives != 0) receive_rows(leader, params.routing, regions());
    call_end(p(), s.call, {true, true, params.receives != 0});
  }

  __device__ void stop_or_release(Step step, bool go) const {
    if (threadIdx.x % kWarpLanes == 0) release_blocks(p(), s.call, step, go);
    __syncwarp();
  }

  // As in normal mode; the words of the workers are for speed, this is for the truth. True when every rank makes this call.
  __device__ bool exchange_messages(Leader& leader) {
    if (!leader.enter(DEEPEP_PHASE_NOTIFY)) return false;  // Silent, as deepep_inject told it.
    if (is_led()) {
      // Whoever has this rank's message has its counts.
      stop_or_release(kStepCounted, true);
      leader.await_blocks(kMeetCounted, true);
    }
    if (s.found.bad != 0) {
      const uint32_t bad = ~s.found.bad;
      Finding finding;
      finding.a = static_cast<int32_t>(bad / input.num_topk);
      finding.b = static_cast<int32_t>(bad % input.num_topk);
      finding.expected = p().options.num_experts;
      finding.seen = input.raw(bad);
      leader.refuse(DEEPEP_ERROR_INVALID_ARGUMENT, Reason::bad_entry, finding);
    }
    uint32_t agreed[kNumAgreed];
    agree(agreed);
    leader.publish_all(agreed, params.routing.num_tokens);
    if (!leader.gather(agreed, 0, true)) return false;
    keep_view(leader);
    return leader.enter(DEEPEP_PHASE_SEND);
  }

  __device__ void keep_view(const Leader& leader) const {
    LowLatencyHeader& header = *params.routing.header;
    if (leader.lane == 0) header.view = s.call.view;
    for (uint32_t rank = leader.lane; rank < p().options.num_ranks; rank += kWarpLanes) {
      header.peer_slots[rank] = rank == p().rank ? p().slot : p().state->peer_slots[rank];
    }
    __syncwarp();
  }

  // What the workers have found in the counts; the user's part of the counts. False when the call fails.
  __device__ bool take_findings(Leader& leader) {
    if (!await_counts(leader)) {
      stop_or_release(kStepGo, false);
      return false;
    }
    if (s.found.overfull != 0) {
      const uint32_t expert = ~s.found.overfull;
      Finding finding;
      finding.peer = static_cast<int32_t>(expert_rank(expert, p().options.num_experts, p().options.num_ranks));
      finding.a = static_cast<int32_t>(expert);
      finding.expected = p().regions.low_latency_rows;
      finding.seen = tables.sum[expert];
      leader.refuse(DEEPEP_ERROR_CAPACITY, Reason::expert_capacity, finding);
      return false;
    }
    fill_counts(leader);
    return true;
  }

  // Waits until the workers of this block have all counts: every rank has sent its message, so they are all but there.
  __device__ bool await_counts(Leader& leader) {
    leader.begin_waits();
    const uint64_t begin_ns = global_time_ns();
    for (;;) {
      // Pairs with the release in exchange().
      if (__shfl_sync(kAllLanes, load_acquire_block(&s.found.counted), 0) != 0) break;
      const uint64_t now = __shfl_sync(kAllLanes, global_time_ns(), 0);
      if (now < s.call.deadline_ns) continue;
      const uint64_t missing = leader.ranks_where([&](uint32_t src) { return in_view(s.call.view, src) && !has_counts(src); });
      if (missing == 0) continue;  // The block is slow, not the peer.
      const auto first = static_cast<uint32_t>(__ffsll(static_cast<long long>(missing)) - 1);
      Finding finding;
      finding.code = DEEPEP_ERROR_TIMEOUT;
      finding.reason = Reason::late_message;
      finding.peer = static_cast<int32_t>(first);
      finding.expected = static_cast<int64_t>(s.call.epoch);
      finding.waited_ns = static_cast<int64_t>(now - begin_ns);
      leader.fail(finding);
      leader.announce_failure();
      return false;
    }
    __syncwarp();  // What the first lane has acquired, all have; others may have looked before.
    return true;
  }

  __device__ const uint64_t* words_of(uint32_t src) const {
    return count_words_at(own_memory(p()), p().regions, p().options.num_experts, src, s.call.epoch);
  }
  __device__ bool has_counts(uint32_t src) const {
    for (uint32_t i = 0; i < p().options.num_experts + kNumCountInfos; ++i) {
      if (!is_count_of(load_relaxed_sys(words_of(src) + i), s.call.epoch)) return false;
    }
    return true;
  }

  // The leader's warp: counts, ranges and statistics for the user, and what the later halves need to know.
  __device__ void fill_counts(const Leader& leader) const {
    const uint32_t ranks = p().options.num_ranks, experts = p().options.num_experts;
    auto* counts = reinterpret_cast<int32_t*>(params.args.recv_count);
    auto* ranges = reinterpret_cast<int64_t*>(params.args.recv_layout_range);
    auto* stats = reinterpret_cast<int32_t*>(params.args.expert_stats);
    for (uint32_t local = leader.lane; local < p().num_local_experts; local += kWarpLanes) {
      uint64_t begin = 0;
#pragma unroll 8
      for (uint32_t src = 0; src < ranks; ++src) {
        const uint64_t word = load_relaxed_sys(words_of(src) + p().first_expert + local);
        uint32_t count = src == p().rank ? tables.own[p().first_expert + local] : static_cast<uint32_t>(word);
        if (!in_view(s.call.view, src)) count = 0;
        ranges[local * ranks + src] = static_cast<int64_t>(begin << 32 | count);
        begin += count;
      }
      counts[local] = static_cast<int32_t>(begin);
      if (stats != nullptr) stats[local] += static_cast<int32_t>(begin);
    }
    for (uint32_t src = leader.lane; src < ranks; src += kWarpLanes) {
      if (src == p().rank || !in_view(s.call.view, src)) continue;
      const uint64_t sender = load_relaxed_sys(words_of(src) + experts + kInfoSender);
      params.routing.header->peer_blocks[src] = count_sender_from_word(static_cast<uint32_t>(sender)).blocks;
    }
    uint32_t sent = 0;
    for (uint32_t e = leader.lane; e < experts; e += kWarpLanes) {
      if (in_view(s.call.view, expert_rank(e, experts, ranks))) sent += tables.own[e];
    }
    sent = __reduce_add_sync(kAllLanes, sent);
    if (leader.lane != 0) return;
    p().state->rows_sent += sent;
    p().state->bytes_sent += uint64_t{sent} * (params.row_bytes + uint64_t{params.scales.num} * params.scales.elem_bytes);
  }
};

// Low-latency dispatch of one rank, its send half or both. Collective; graph-safe. The last warp of block 0 leads.
template <bool kTma, bool kCast>
__global__ void __launch_bounds__(kMaxBlockThreads + kWarpLanes, 1)
    low_latency_dispatch_kernel(const __grid_constant__ LowLatencyDispatchParams params) {
  extern __shared__ __align__(128) uint8_t dynamic_shared[];
  __shared__ LowLatencyShared s;
  __shared__ uint64_t barriers[kCast ? 1 : kMaxBarriers];
  LowLatencyDispatch dispatch(params, s, dynamic_shared, barriers);
  if (is_worker())
    dispatch.template work<kTma, kCast>();
  else
    dispatch.lead();
}

// Fails a receive half whose send half did not come to its end, or repeats what that has found.
__device__ inline bool check_send_half(Leader& leader, const LowLatencyHeader& header) {
  if (header.valid != 0) return true;
  if (header.failure.code == 0) {
    Finding finding;
    finding.expected = static_cast<int64_t>(header.epoch);
    leader.refuse(DEEPEP_ERROR_ABORTED, Reason::no_send, finding);
    return false;
  }
  leader.refuse(header.failure.code, header.failure.reason, header.failure);
  return false;
}

// The receive half of a low-latency dispatch. Not collective; graph-safe. One warp.
__global__ void __launch_bounds__(kWarpLanes, 1)
    low_latency_receive_kernel(const __grid_constant__ LowLatencyReceiveParams params) {
  __shared__ CallShared s;
  const CallParams& p = params.call;
  call_begin(p, s, false, true);
  const LowLatencyHeader& header = *params.routing.header;
  if (threadIdx.x == 0) s.epoch = header.epoch;
  __syncwarp();
  Leader leader(p, s);
  leader.wait_stats = reinterpret_cast<int64_t*>(params.wait_stats);
  if (!s.skipped && check_send_half(leader, header)) {
    receive_rows(leader, params.routing, {params.scales, params.row_bytes, p.regions.low_latency_rows});
  }
  arrive(p, kMeetEnd);
  call_end(p, s, {false, true, true});
}

}  // namespace deepep
