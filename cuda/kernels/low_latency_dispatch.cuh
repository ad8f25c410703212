// Low-latency dispatch: rows go straight into the region of their expert, cast to FP8 on the way if asked. One kernel for the
// send half, or for both halves; the receive half alone is another (low_latency_receive.cuh).
//
// In: LowLatencyDispatchParams. Out: [num_local_experts, max_rows, row bytes] packed from 0 for each expert in the peers' slots
// and in this rank's, with counts, source tokens and ranges. Phases: NOTIFY (count, exchange counts), SEND (cast and push),
// ARRIVE (wait for everyone's rows). Graph-safe. Caller: launch_low_latency_dispatch().
//
// Nobody waits for a leader. Every block counts for itself, and pushes as soon as it has the counts of all ranks; every block
// says to every peer that its rows are there (`row_flags`), and the leader's workers look for them; where scales come as rows
// the other blocks do, too, and make columns of them. Beside that, the last warp of block 0 leads. It has little to do as
// long as all comes soon; when something does not, or a peer refuses the call, it goes the way of normal mode: it reads the
// messages, watches the deadline, and stops the others. That a block may then have pushed already does no harm: whoever has
// sent counts has given its slot. Only where ranks may be left out, and where deepep_inject wants something, do the blocks go
// by the leader's word.
#pragma once

#include "low_latency_receive.cuh"
#include "rows_cast.cuh"
#include "scales.cuh"

namespace deepep {

struct LowLatencyShared {
  CallShared call;
  CountFindings found;
  Arrivals arrivals;
  uint64_t waited_ns[DEEPEP_MAX_RANKS];  // for the ranks' counts; the leader's block
  uint64_t barriers[kMaxWarps];          // of the pieces that come by TMA
  uint64_t to;      // ranks that the workers tell their counts; the leader learns of more that are lost meanwhile
  uint64_t view;    // ranks that the workers count in
  uint32_t placed;  // 1 = the places of the first round are found
  uint8_t* slots[DEEPEP_MAX_RANKS];
  bool turns_scales[DEEPEP_MAX_RANKS];  // they go as rows between that rank and this one
  uint32_t may_turn;                    // 1 = the rows of the peer have come whose scales this block is about to turn
};

struct LowLatencyDispatch {
  const LowLatencyDispatchParams& params;
  LowLatencyShared& s;
  uint8_t* shared;
  RoutingInput input;
  LowLatencyTables tables;

  __device__ LowLatencyDispatch(const LowLatencyDispatchParams& given, LowLatencyShared& own, uint8_t* dynamic_shared)
      : params(given),
        s(own),
        shared(dynamic_shared),
        input{reinterpret_cast<const void*>(given.args.topk_idx), nullptr, given.args.topk_idx_bytes, given.routing.num_tokens,
              given.args.topk_idx != 0 ? given.routing.num_topk : 0},
        tables(dynamic_shared, given.call.options.num_experts, given.routing.num_topk) {}

  __device__ const CallParams& p() const { return params.call; }
  __device__ LowLatencyCount counting() { return {p(), input, tables, s.found}; }
  __device__ ExpertRegions regions() const { return {params.scales, params.row_bytes, p().regions.low_latency_rows}; }
  __device__ int64_t* wait_stats() const { return reinterpret_cast<int64_t*>(params.args.wait_stats); }

  // Whether the blocks go by the leader's word. The same on every block.
  __device__ bool is_led() const { return is_led_dispatch(p()); }

  // ---- workers ----

  template <bool kCast, bool kTurns>
  __device__ void work() {
    const TokenRange own = tokens();
    Mover<kCast, kTurns> mover(*this, round_at(own, own.begin));
    counting().count(own, [&] { mover.fetch(); });  // Not before: what it loads would hold up what is counted.
    __syncthreads();  // The last warp has read the state.
    bool pushed = false;
    if (!s.call.skipped && publish())
      pushed = send(mover, own);
    else
      mover.wait();  // Nothing may be under way when a block ends.
    workers_meet();  // This block's rows are in place.
    if (pushed && p().mask_on_timeout == 0 && threadIdx.x < kWarpLanes) {
      announce_block(p(), s.view, s.call.epoch, gridDim.x, nullptr);
    }
    tell_leader(kTurns ? kMeetPushed : kMeetEnd);
    if (pushed && is_leader() && params.receives != 0 && p().mask_on_timeout == 0) {
      look_for_rows(p(), s.call, s.arrivals, s.view, wait_stats());
    }
    if constexpr (kTurns) {
      if (pushed) turn_scales();
      workers_meet();
      tell_leader(kMeetEnd);
    }
  }

  // By the workers when they have met: not by the warp that announces.
  __device__ void tell_leader(Meeting meeting) const {
    // Releases what they have written; pairs with Leader::await_blocks().
    if (threadIdx.x == num_workers() - kWarpLanes) reduce_add_release_gpu(&p().state->arrivals[meeting], 1);
  }

  // This block's tokens. Where there are few, some blocks have the same.
  __device__ TokenRange tokens() const {
    return cut({0, params.routing.num_tokens}, blockIdx.x / params.blocks_a_token, gridDim.x / params.blocks_a_token);
  }
  __device__ uint32_t part() const { return blockIdx.x % params.blocks_a_token; }
  // Tokens whose places fit into the tables.
  __device__ TokenRange round_at(TokenRange own, uint32_t begin) const { return {begin, min(own.end, begin + kRoundTokens)}; }

  // False when the leader has stopped the call.
  __device__ bool publish() {
    const bool led = is_led();
    if (led && !workers_await_leader(p(), s.call, kStepCounted)) return false;
    counting().publish(s.call.epoch, s.to, p().agreed_hash, {p().slot, false, params.turns_scales_of != 0});
    if (led) workers_arrive(p(), kMeetCounted);
    return true;
  }

  // Takes the counts of all ranks. True when rows may be pushed.
  __device__ bool exchange() {
    const bool led = is_led();
    if (led && !workers_await_leader(p(), s.call, kStepGo)) return false;
    if (s.found.bad != 0) return false;
    const uint64_t view = led ? __ldcg(&p().state->view) : all_ranks(p()) & ~s.call.masked;
    if (threadIdx.x == 0) {
      s.view = view;
      s.slots[p().rank] = own_slot();
      s.turns_scales[p().rank] = false;
    }
    const auto heard = [&](uint32_t rank, const CountSender& sender, uint64_t waited_ns) {
      s.slots[rank] = p().symmetric[rank] + slot_offset(p().regions, sender.slot);
      s.turns_scales[rank] = sender.turns_scales && in_view(params.turns_scales_of, rank);
      if (!is_leader()) return;
      s.waited_ns[rank] = waited_ns;
      params.routing.header->peer_slots[rank] = sender.slot;
    };
    const uint32_t listening = params.listeners * kWarpLanes;
    if (threadIdx.x < listening && !counting().take(s.call, view, p().agreed_hash, listening, heard)) {
      atomicOr(&s.found.stop, 1u);
    }
    // Who has said its counts and ended since would have rows pushed to memory that may be gone: the messages tell.
    if (threadIdx.x == 0 && (view & ~s.to) != 0) atomicOr(&s.found.stop, 1u);
    // Pairs with the release in lead(): the last warp has found the places of the first round.
    while (threadIdx.x == 0 && load_acquire_block(&s.placed) == 0) {
    }
    workers_meet();
    if (is_leader() && threadIdx.x == 0) store_release_block(&s.found.counted, 1);  // Pairs with comes_soon().
    return s.found.stop == 0 && s.found.overfull == 0;
  }

  // What a warp moves of a round of tokens: pieces of rows, one after another. One that is cast comes into the warp's shared
  // memory, by TMA, if there is, while the one before is stored: it takes no turn in the queue of loads, and the code that
  // casts it there is short. One that is not goes through registers.
  template <bool kCast, bool kTurns>
  struct Mover {
    const LowLatencyDispatch& dispatch;
    TokenRange round;
    uint32_t token;  // of the round
    uint32_t piece;  // of its row
    uint32_t phase;  // of the warp's barrier
    bool holds;      // a piece was taken
    uint32_t held_token, held_piece;
    RowPiece<kCast> held;
    typename RowPiece<kCast>::Share share;

    __device__ Mover(const LowLatencyDispatch& given, TokenRange first) : dispatch(given), phase(0) {
      if constexpr (kCast && kHasTma) {
        if (moves() && has_tma() && lane_id() == 0) {
          barrier_init(barrier(), 1);
          fence_barrier_init();
        }
        __syncwarp();
      }
      begin(first);
    }

    __device__ void begin(TokenRange next) {
      round = next;
      token = moves() ? 0 : round.end - round.begin;
      piece = moves() ? (dispatch.part() >> dispatch.params.place_shift) * num_warps() + warp() : 0;
      turn();
    }
    __device__ void advance() {
      piece += (dispatch.params.blocks_a_token >> dispatch.params.place_shift) * num_warps();
      turn();
    }
    __device__ void turn() {
#pragma unroll 1
      for (; piece >= dispatch.params.row_pieces; piece -= dispatch.params.row_pieces) ++token;
    }
    __device__ bool has() const { return token < round.end - round.begin; }

    // Warps before the first mover move nothing.
    __device__ bool moves() const { return threadIdx.x / kWarpLanes >= dispatch.params.first_mover; }
    __device__ uint32_t warp() const { return threadIdx.x / kWarpLanes - dispatch.params.first_mover; }
    __device__ uint32_t num_warps() const { return num_workers() / kWarpLanes - dispatch.params.first_mover; }
    __device__ uint32_t first_unit() const { return piece * dispatch.params.piece_units; }
    // Of the piece as it is given.
    __device__ uint32_t bytes() const { return bytes_from(first_unit()); }
    __device__ uint32_t bytes_from(uint32_t first_unit) const {
      const uint32_t row_bytes = kCast ? 2 * dispatch.params.row_bytes : dispatch.params.row_bytes;
      return min(row_bytes - first_unit * kUnitBytes, dispatch.params.piece_units * kUnitBytes);
    }
    __device__ uint32_t units() const { return (bytes() + kUnitBytes - 1) / kUnitBytes; }

    __device__ bool has_tma() const { return dispatch.params.plan.tma != 0; }
    __device__ uint64_t* barrier() const { return &dispatch.s.barriers[warp()]; }
    __device__ uint8_t* stage() const {
      const Plan& plan = dispatch.params.plan;
      return dispatch.shared + plan.block_bytes - (plan.warps - warp()) * plan.chunk_bytes;
    }
    __device__ const uint8_t* source() const {
      const auto* x = reinterpret_cast<const uint8_t*>(dispatch.params.args.x);
      return x + (round.begin + token) * dispatch.params.args.x_stride + first_unit() * kUnitBytes;
    }

    // Begins to bring a piece, if there is one, to where the last one was.
    __device__ void fetch() {
      if constexpr (kCast && kHasTma) {
        if (!has_tma() || !has()) return;
        fence_proxy_async_shared();
        __syncwarp();  // All lanes have read what was there.
        if (lane_id() != 0) return;
        barrier_arrive_expect(barrier(), bytes());
        bulk_load(stage(), source(), bytes(), barrier());
      }
    }
    // What was fetched has come.
    __device__ void wait() {
      if (!kCast || !has()) return;
      if constexpr (kHasTma) {
        if (has_tma()) {
          barrier_wait(barrier(), phase);
          phase ^= 1;
          return;
        }
      }
      const uint32_t end = bytes();
      for (uint32_t at = lane_id() * 16; at < end; at += kUnitBytes) {
        *reinterpret_cast<uint4*>(stage() + at) = load_stream(source() + at);
      }
    }
    // Then the piece can be stored. Of one that is cast all that can be is done now, and the next one begins to come.
    __device__ void take() {
      wait();
      holds = has();
      if (!holds) return;
      if constexpr (kCast)
        held.scale = held.cast_shared(stage(), bytes(), (dispatch.params.args.flags & DEEPEP_FLAG_ROUND_SCALE) != 0);
      else
        held.load(source(), bytes());
      held_token = token, held_piece = piece;
      if constexpr (kCast) {
        find_share();
        held.load_shared(stage(), units());
      }
      advance();
      fetch();
    }
    __device__ void find_share() {
      const LowLatencyDispatchParams& params = dispatch.params;
      const CastRows rows = {.channels = params.row_bytes, .ue8m0 = (params.args.flags & DEEPEP_FLAG_UE8M0) != 0};
      const uint32_t first_unit = held_piece * params.piece_units;
      share = held.share(rows, first_unit, bytes_from(first_unit), params.scales.to_elem_stride);
    }
    // Stores what was taken.
    __device__ void pass_on(const ScaleUnits& given_scales) {
      const LowLatencyDispatchParams& params = dispatch.params;
      const deepep_low_latency_dispatch_args& args = params.args;
      const bool brings_scales = held_piece == 0;
      const auto* from = reinterpret_cast<const uint8_t*>(args.scales) + (round.begin + held_token) * args.scales_row_stride;
      const RowPlace* const places = dispatch.tables.places + held_token * dispatch.input.num_topk;
      const uint32_t step = 1u << params.place_shift;
      if constexpr (!kCast) find_share();
#pragma unroll 1
      for (uint32_t nth = dispatch.part() & (step - 1); nth < dispatch.input.num_topk; nth += step) {
        const RowPlace to = places[nth];
        if (to.x_word == 0) continue;
        held.store(share, kTurns ? to.x() : reinterpret_cast<uint8_t*>(to.x_word), to.scales, kTurns && to.in_row());
        if constexpr (!kCast) {
          if (brings_scales) copy_scales(given_scales, from, to.scales);
        }
      }
    }

   private:
    __device__ static void copy_scales(const ScaleUnits& scales, const uint8_t* from, uint8_t* to) {
      for (uint32_t unit = lane_id(); unit < scales.count; unit += kWarpLanes) {
        store_unit(to + scales.to(unit), load_unit(from + scales.from(unit), scales.bytes), scales.bytes);
      }
    }
  };

  // Pushes this block's rows. False when nothing may be pushed.
  template <bool kCast, bool kTurns>
  __device__ bool send(Mover<kCast, kTurns>& mover, TokenRange own) {
    const ScaleUnits scales = kCast ? ScaleUnits{} : given_scales();
    mover.take();  // The first piece while the counts come.
    if (!exchange()) {
      mover.wait();  // Nothing may be under way when a block ends.
      return false;
    }
    bool stopped = false;
    for (bool placed = false;; mover.take()) {
      if (!placed) {
        keep_rows<kTurns>(mover.round);
        workers_meet();
        // In a call that masks, a peer may have left this rank out meanwhile.
        stopped = stopped || (p().mask_on_timeout != 0 && must_stop(p(), s.call, s.view));
        placed = true;
      }
      if (mover.holds) {
        if (!stopped) mover.pass_on(scales);
        continue;
      }
      if (mover.round.end >= own.end) return true;
      mover.begin(round_at(own, mover.round.end));
      mover.fetch();
      workers_meet();
      if (threadIdx.x < kWarpLanes) counting().find_places(mover.round);
      workers_meet();
      placed = false;
    }
  }

  // From places among this rank's entries to rows in the experts' regions, which combine will want too. The workers must meet
  // before and after.
  template <bool kTurns>
  __device__ void keep_rows(TokenRange round) {
    const uint32_t first = round.begin * input.num_topk, count = (round.end - round.begin) * input.num_topk;
    for (uint32_t i = threadIdx.x; i < count; i += num_workers()) {
      const int32_t expert = tables.experts[i];
      RowPlace place = {0, nullptr};
      uint32_t row = 0;
      if (expert >= 0) {
        const ExpertOwner owner = ExpertOwner::from_word(tables.owners[i]);
        row = tables.nth[i] + tables.base[expert];
        if (in_view(s.view, owner.rank)) {
          uint8_t* const slot = s.slots[owner.rank];
          const ExpertRegions::Row to = regions().row(p().regions, slot, owner.local, row);
          const bool in_row = kTurns && s.turns_scales[owner.rank];
          place = RowPlace::at(to.x, in_row ? regions().scale_row(p().regions, slot, owner.local, row) : to.scales, in_row);
          if (part() == 0) *to.src_idx = static_cast<int32_t>((first + i) / input.num_topk);
        }
      }
      tables.places[i] = place;
      if (part() != 0) continue;
      params.routing.experts[first + i] = expert;
      params.routing.rows[first + i] = row;
    }
  }

  // How the scales that the caller gives are copied.
  __device__ ScaleUnits given_scales() const {
    const LowLatencyScales& scales = params.scales;
    return scale_units(
        ScaleRows{scales.num, scales.elem_bytes, scales.from_elem_stride, scales.to_elem_stride,
                  params.args.scales | params.args.scales_row_stride | scales.to_row_stride | scales.expert_stride});
  }

  // ---- scales that come as rows ----

  __device__ uint8_t* own_slot() const { return own_memory(p()) + slot_offset(p().regions, p().slot); }

  // What one of `count` has of `items`: item `first` and every count-th after it. Where there are more of them than items,
  // `parts` have an item in common.
  struct Part {
    uint32_t first, part, parts;
    __device__ static Part of(uint32_t nth, uint32_t count, uint32_t items) {
      if (items == 0) return {nth, 0, 1};
      return {nth % items, nth / items, (count - 1 - nth % items) / items + 1};
    }
  };

  // Waits for rows of the peers, as long as the leader does, and makes columns of their scales; this rank's own are columns
  // already. The blocks share the peers, and the warps of a peer's blocks its experts. The leader's block looks for rows
  // instead, unless it is the only one.
  __device__ void turn_scales() {
    const uint32_t blocks = max(gridDim.x - 1, 1u), peers = p().options.num_ranks - 1, warps = num_workers() / kWarpLanes;
    if (is_leader() && gridDim.x > 1) return;
    const Part share = Part::of(gridDim.x > 1 ? blockIdx.x - 1 : 0, blocks, peers);
#pragma unroll 1
    for (uint32_t peer = share.first; peer < peers; peer += blocks) {
      const uint32_t src = peer < p().rank ? peer : peer + 1;
      if (!in_view(s.view, src) || !s.turns_scales[src]) continue;
      const Part experts = Part::of(share.part * warps + threadIdx.x / kWarpLanes, share.parts * warps, p().num_local_experts);
      LowLatencyCount::Range range = {0, 0};
      if (experts.first < p().num_local_experts) range = counting().range(s.call, s.view, experts.first, src);
      if (threadIdx.x < kWarpLanes) {
        bool came = false;
        for (uint32_t looks = 1; !(came = have_pushed(p(), s.call.epoch, src)); ++looks) {
          if (looks % kLooksBetween == 0 && __any_sync(kAllLanes, is_stopped(p(), s.call))) break;
        }
        if (threadIdx.x == 0) s.may_turn = came ? 1 : 0;
      }
      workers_meet();
      if (s.may_turn == 0) return;
#pragma unroll 1
      for (uint32_t local = experts.first; local < p().num_local_experts;) {
        // A warp reads some rows at once, so that it writes their words together.
        const uint32_t shift = range.count > 4 ? 3 : 2, end = range.begin + range.count;
#pragma unroll 1
        for (uint32_t row = range.begin + (experts.part << shift); row < end; row += experts.parts << shift) {
          turn_rows(local, row + lane_id() % (1u << shift), end, lane_id() >> shift, kWarpLanes >> shift);
        }
        local += share.parts * warps;
        if (local < p().num_local_experts) range = counting().range(s.call, s.view, local, src);
      }
      workers_meet();  // All have seen `may_turn`.
    }
  }
  // This lane's words of a row: from `first` on, `step` apart.
  __device__ void turn_rows(uint32_t local, uint32_t row, uint32_t end, uint32_t first, uint32_t step) const {
    constexpr uint32_t kWords = 8;  // under way
    if (row >= end) return;
    const LowLatencyScales& scales = params.scales;
    const auto* from = reinterpret_cast<const uint32_t*>(regions().scale_row(p().regions, own_slot(), local, row));
    uint8_t* const to = regions().row(p().regions, own_slot(), local, row).scales;
#pragma unroll 1
    for (uint32_t word = first; word < scales.num; word += kWords * step) {
      uint32_t values[kWords];
#pragma unroll
      for (uint32_t i = 0; i < kWords; ++i) {
        values[i] = word + i * step < scales.num ? __ldcg(from + word + i * step) : 0;
      }
#pragma unroll
      for (uint32_t i = 0; i < kWords; ++i) {
        const uint32_t nth = word + i * step;
        if (nth < scales.num) *reinterpret_cast<uint32_t*>(to + nth * scales.to_elem_stride) = values[i];
      }
    }
  }

  // ---- the last warp ----

  __device__ void lead() {
    if (lane_id() == 0) {
      read_call(p(), s.call, true, true);
      s.to = all_ranks(p()) & ~(s.call.masked | s.call.lost);
      s.placed = 0;
    }
    s.arrivals.clear();
    for (uint32_t rank = lane_id(); rank < DEEPEP_MAX_RANKS; rank += kWarpLanes) s.waited_ns[rank] = 0;
    __syncthreads();  // The workers have counted.
    const TokenRange own = tokens();
    counting().find_places(round_at(own, own.begin));
    if (lane_id() == 0) store_release_block(&s.placed, 1);
    __syncwarp();
    if (!is_leader()) return;
    LowLatencyHeader& header = *params.routing.header;
    if (lane_id() == 0) {
      header.epoch = s.call.epoch;
      header.valid = 0;
      header.failure.code = 0;
      header.peer_slots[p().rank] = p().slot;
    }
    __syncwarp();
    const bool plain = !is_led() && s.found.bad == 0;
    bool sent = !s.call.skipped && (plain ? exchange_messages() : exchange_slowly(params, s, shared));
    if (sent) tell_counts();
    const bool turns = params.turns_scales_of != 0;
    Leader(p(), s.call).await_blocks(turns ? kMeetPushed : kMeetEnd, false);
    if (!turns) end_blocks(p(), s.call);
    if (p().mask_on_timeout == 0) keep_waits(p(), 0, s.waited_ns, wait_stats());
    if (p().mask_on_timeout != 0) sent = sent && announce_to_all(p(), s.call);
    if (!sent) keep_failure(params);
    if (sent && params.receives != 0) {
      receive_rows(p(), s.call, params.routing, regions(), s.arrivals, s.call.view, wait_stats());
    }
    if (turns) {
      Leader(p(), s.call).await_blocks(kMeetEnd, false);
      end_blocks(p(), s.call);
    }
    if (s.call.code != 0 || s.call.skipped) clear_counts(p());
    tell_end(p(), s.call, {true, true, params.receives != 0});
  }

  __device__ void publish_message() const {
    Leader(p(), s.call).publish_all();
  }

  // Tells the peers what this rank calls, and waits until the workers have all counts. False when the call fails.
  __device__ bool exchange_messages() {
    publish_message();
    const bool soon = comes_soon(&s.found.counted, 1);
    if (!soon || s.found.stop != 0 || s.found.overfull != 0) return find_out(params, s, shared);
    if (lane_id() == 0) s.call.view = s.view;
    __syncwarp();
    return true;
  }

  // What the user is told, and later halves need to know, once rows are being pushed.
  __device__ void tell_counts() {
    counting().fill_counts(s.call, s.call.view, reinterpret_cast<int32_t*>(params.args.recv_count),
                           reinterpret_cast<int64_t*>(params.args.recv_layout_range));
    auto* stats = reinterpret_cast<int32_t*>(params.args.expert_stats);
    for (uint32_t local = lane_id(); stats != nullptr && local < p().num_local_experts; local += kWarpLanes) {
      stats[local] += static_cast<int32_t>(tables.sum[p().first_expert + local]);
    }
    const uint32_t num_sent = counting().num_sent(s.call.view);
    if (lane_id() == 0) {
      params.routing.header->view = s.call.view;
      params.routing.header->valid = 1;
      const uint64_t row_bytes = params.row_bytes + uint64_t{params.scales.num} * params.scales.elem_bytes;
      reduce_add_relaxed_gpu(&p().state->rows_sent, num_sent);
      reduce_add_relaxed_gpu(&p().state->bytes_sent, num_sent * row_bytes);
    }
    __syncwarp();
  }

  // ---- its seldom ways

  __device__ void stop_or_release(Step step, bool go) const {
    if (lane_id() == 0) release_blocks(p(), s.call, step, go);
    __syncwarp();
  }

  // The send half has failed, as the receive half shall know.
  DEEPEP_COLD __device__ static void keep_failure(const LowLatencyDispatchParams& params) {
    if (lane_id() == 0) {
      params.routing.header->valid = 0;
      const Finding& finding = params.call.state->finding;
      if (finding.agreed != 0) params.routing.header->failure = finding;
    }
    __syncwarp();
  }

  // The peers have this rank's rows, should it take part still.
  DEEPEP_COLD __device__ static bool announce_to_all(const CallParams& p, CallShared& s) {
    Leader leader(p, s);
    if (leader.is_left_out()) return false;
    announce_pushed(leader, s.view, p.state->peer_slots);
    return true;
  }

  // As in normal mode: the blocks wait for what the messages say.
  DEEPEP_COLD __device__ static bool exchange_slowly(const LowLatencyDispatchParams& params, LowLatencyShared& s,
                                                     uint8_t* shared) {
    LowLatencyDispatch self(params, s, shared);
    const bool went = self.exchange_messages_first();
    self.stop_or_release(kStepGo, went);
    return went && self.take_findings();
  }
  __device__ bool exchange_messages_first() {
    Leader leader(p(), s.call);
    leader.wait_stats = wait_stats();
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
    publish_message();
    return leader.gather(is_led() ? 0 : -1, true) && leader.enter(DEEPEP_PHASE_SEND);
  }

  // The counts do not come soon, or say that something is wrong: the messages tell.
  DEEPEP_COLD __device__ static bool find_out(const LowLatencyDispatchParams& params, LowLatencyShared& s, uint8_t* shared) {
    LowLatencyDispatch self(params, s, shared);
    Leader leader(params.call, s.call);
    leader.enter(DEEPEP_PHASE_NOTIFY);
    if (!leader.gather(-1, true)) {
      self.stop_or_release(kStepGo, false);
      return false;
    }
    leader.enter(DEEPEP_PHASE_SEND);
    return self.take_findings();
  }

  // What the workers have found in the counts. False when the call fails.
  __device__ bool take_findings() {
    Leader leader(p(), s.call);
    if (!await_counts(leader)) {
      stop_or_release(kStepGo, false);
      return false;
    }
    if (s.found.overfull == 0) return true;
    const uint32_t expert = ~s.found.overfull;
    Finding finding;
    finding.peer = static_cast<int32_t>(p().partition.rank(expert));
    finding.a = static_cast<int32_t>(expert);
    finding.expected = p().regions.low_latency_rows;
    finding.seen = tables.sum[expert];
    leader.refuse(DEEPEP_ERROR_CAPACITY, Reason::expert_capacity, finding);
    return false;
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
};

// Low-latency dispatch of one rank, its send half or both. Collective; graph-safe. The last warp of block 0 leads.
template <bool kCast, bool kTurns>
__global__ void __launch_bounds__(kMaxBlockThreads + kWarpLanes, 1)
    low_latency_dispatch_kernel(const __grid_constant__ LowLatencyDispatchParams params) {
  extern __shared__ __align__(128) uint8_t dynamic_shared[];
  __shared__ LowLatencyShared s;
  await_kernel_before();
  LowLatencyDispatch dispatch(params, s, dynamic_shared);
  if (is_worker())
    dispatch.template work<kCast, kTurns>();
  else
    dispatch.lead();
}

}  // namespace deepep
