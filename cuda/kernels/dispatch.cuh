// Dispatch: counts first, then each row straight to its final place on every destination rank. One kernel.
//
// In: DispatchParams. Out: rows in the peers' slots and in this rank's, counts on the device and on the host. Phases: NOTIFY
// (count, exchange messages, check), SEND (push), ARRIVE (wait for everyone's pushes). protocol.hpp says why two
// synchronisations suffice. While the leader waits for messages, all blocks work out the places of their tokens; when it goes,
// warps of all blocks claim tokens to push. What a call of few tokens takes are steps that wait for one another: the leader's
// block counts and places those alone, and whatever a step does not need is done beside it, by another warp. Graph-safe.
// Caller: launch_dispatch().
#pragma once

#include "dispatch_rows.cuh"

namespace deepep {

// Warps of a block beside those that push: they give the counts to the user while rows move.
constexpr uint32_t kClerks = 1;

struct Dispatch : DispatchRows {
  uint8_t* shared;
  FewPart part;
  CountTables tables;  // where this block counts
  bool wrong;          // of a block that counts alone: some entry is

  __device__ RoutingInput input() const {
    return {reinterpret_cast<const void*>(params.args.topk_idx), reinterpret_cast<const uint8_t*>(params.args.is_token_in_rank),
            params.routing.topk_idx_bytes, params.routing.num_tokens, params.routing.num_topk};
  }

  // What the call begins with. By all threads.
  __device__ void begin() {
    const uint32_t warp = threadIdx.x / kWarpLanes;
    const bool knows = is_leader() && cached();
    if (threadIdx.x == kWarpLanes) {
      const CallFound found = find_call(p());
      if (knows) s.known = *params.routing.header;
      read_call(p(), s.call, true, true, found);
      if (knows) say_routing(s.call, s.known.epoch);
      s.expected = all_ranks(p()) & ~(s.call.masked | s.call.lost);
      s.stopped = 0;
    }
    __syncwarp();
    if (warp == 1 && knows && !may_be_silent() && !s.call.skipped) publish_known();
    if (warp == 0) {
      for (uint32_t rank = lane_id(); rank < p().options.num_ranks; rank += kWarpLanes) {
        s.slots[rank] = p().symmetric[rank];
        s.first_experts[rank] = static_cast<int32_t>(p().partition.experts(rank).first);
      }
    }
    if (is_leader()) s.pushed.clear();
    if (counts()) tables = count_tables_of_block();
    if (counts_alone()) clear_tables(p(), tables, by_expert());
    __syncthreads();
  }

  // ---- NOTIFY

  // Leader's block, second warp: the message of a routing that is known. Whatever has read the slot, or written there, was an
  // earlier kernel, and has ended: await_kernel_before() has seen to that. Nothing is told but that, so a fence would only say
  // to the memory model what no GPU does otherwise, and it would take longer than all of the message's way. So it is with a new
  // routing, too, of which each count says by itself that it is there.
  __device__ void publish_known() const {
    Leader(p(), s.call).publish_to(s.expected, s.known.valid == params.routing.name ? 0 : DEEPEP_ERROR_INVALID_ARGUMENT, false);
  }
  // deepep_inject may want this rank to say nothing.
  __device__ bool may_be_silent() const { return p().inject[DEEPEP_PHASE_NOTIFY].wanted != 0; }

  // Leader's warp: `bad` of the state is what this rank finds wrong in its own routing, before it says anything.
  __device__ void check_entries(Leader& leader, uint64_t bad) {
    if (bad == 0) return;
    const RoutingInput from = input();
    Finding finding;
    finding.a = static_cast<int32_t>(~bad / from.num_topk);
    finding.b = static_cast<int32_t>(~bad % from.num_topk);
    finding.expected = p().options.num_experts;
    finding.seen = from.raw(~bad);
    leader.refuse(DEEPEP_ERROR_INVALID_ARGUMENT, Reason::bad_entry, finding);
  }

  // Leader's block: num_tokens_per_expert of a routing by is_token_in_rank.
  __device__ void check_expert_counts(const int32_t* per_expert) {
    constexpr int32_t most = DEEPEP_MAX_TOKENS * DEEPEP_MAX_TOPK;
    for (uint32_t e = threadIdx.x; e < p().options.num_experts; e += blockDim.x) {
      if (per_expert[e] < 0 || per_expert[e] > most) max_relaxed_gpu(&p().state->bad_entry, ~uint64_t{e});
    }
    __syncthreads();
    const uint64_t bad = load_relaxed_gpu(&p().state->bad_entry);
    if (bad == 0 || threadIdx.x >= kWarpLanes) return;
    Finding finding;
    finding.a = static_cast<int32_t>(~bad);
    finding.seen = per_expert[~bad];
    Leader(p(), s.call).refuse(DEEPEP_ERROR_INVALID_ARGUMENT, Reason::bad_expert_count, finding);
  }

  // Whether blocks that have nothing to count are waited for, too, before anything is said to the peers: those that wait for
  // rows would wait for room on this device. Where one block sends alone they do not.
  __device__ bool meets_for_room() const { return !cached() && is_few() && params.sending_blocks > 1; }

  // Whether this block counts, and whether it does so for all.
  __device__ bool counts() const { return !cached() && (is_leader() || !is_few()); }
  __device__ bool counts_alone() const { return !cached() && is_leader() && is_few(); }
  // The tokens that it counts and places.
  __device__ TokenRange counted_tokens() const {
    return is_few() ? TokenRange{0, params.routing.num_tokens} : block_tokens(params.routing.num_tokens);
  }

  __device__ uint32_t columns() const { return p().options.num_ranks + p().options.num_experts; }
  __device__ uint32_t* sums() const { return reinterpret_cast<uint32_t*>(shared + sums_at()); }
  // Leader's block: adds up what this rank has.
  __device__ void add_counts_up(const int32_t* per_expert) const {
    const uint32_t ranks = p().options.num_ranks;
    for (uint32_t i = threadIdx.x; i < columns(); i += blockDim.x) {
      uint32_t sum = is_few() ? counted_here(p(), tables, by_expert(), i) : counted_before(p(), gridDim.x, i);
      if (i >= ranks && per_expert != nullptr) sum = static_cast<uint32_t>(per_expert[i - ranks]);
      sums()[i] = sum;
    }
  }
  // When it has met: tells the peers.
  __device__ void publish_sums() const {
    const uint32_t* const values = sums();
    const auto words_of = [&](uint32_t peer) {
      return message_counts(message_at(p().symmetric[peer], p().regions, p().rank, s.call.epoch));
    };
    publish_counts(p(), s.expected, s.call.epoch, threadIdx.x / kWarpLanes, blockDim.x / kWarpLanes, columns(), words_of,
                   [&](uint32_t i) { return values[i]; });
  }

  // Leader's warp, when the rows of all ranks are known. Every rank has the whole matrix, so all fail alike, before a row has
  // moved.
  __device__ void check_capacity(Leader& leader, const RowTables& tables) {
    for (uint32_t first = 0; first < p().options.num_ranks; first += kWarpLanes) {
      const uint32_t mine = first + leader.lane;
      const bool counts = mine < p().options.num_ranks && in_view(s.call.view, mine);
      const uint32_t over = __ballot_sync(kAllLanes, counts && tables.rows[mine] > p().options.max_recv_tokens);
      if (over == 0) continue;
      const uint32_t dst = first + static_cast<uint32_t>(__ffs(static_cast<int>(over))) - 1;
      Finding finding;
      finding.peer = static_cast<int32_t>(dst);
      finding.expected = p().options.max_recv_tokens;
      finding.seen = static_cast<int64_t>(tables.rows[dst]);
      leader.refuse(DEEPEP_ERROR_CAPACITY, Reason::capacity, finding);
      return;
    }
  }

  // One warp: where rows go, by functions that tell which slot a rank uses and where this rank's rows begin there.
  template <class SlotOf, class BaseOf>
  __device__ void find_slots(SlotOf slot_of, BaseOf base_of) {
    for (uint32_t rank = lane_id(); rank < p().options.num_ranks; rank += kWarpLanes) {
      s.slots[rank] += slot_offset(p().regions, slot_of(rank));
      if (!by_expert()) s.row_bases[rank] = base_of(rank);
    }
  }

  // The leader's block: the other blocks are to stop.
  __device__ bool stop() const {
    if (threadIdx.x == 0) release_blocks(p(), s.call, kStepGo, false);
    return false;
  }

  // The leader's block: says what this rank has. The first warp leads; the second publishes, of a routing that is known as soon
  // as the call has begun. False when the call has been stopped.
  __device__ bool publish() {
    const uint32_t warp = threadIdx.x / kWarpLanes;
    const bool leads = warp == 0;
    Leader leader(p(), s.call);
    const bool entered = !leads || leader.enter(DEEPEP_PHASE_NOTIFY);
    if (!cached() && !is_few()) {
      wait_for_blocks(p(), s.call, kMeetCounted, true);
      if (threadIdx.x == 0) release_blocks(p(), s.call, kStepCounted, s.call.code == 0);
    }
    // Few tokens are counted here alone: the others have met to say that there is room for all of them.
    if (meets_for_room() && leads) leader.await_blocks(kMeetCounted, true);
    // Silent, as deepep_inject told it: nothing is said to the peers.
    if (may_be_silent() && __syncthreads_or(!entered)) return stop();
    if (cached()) {
      if (may_be_silent() && warp == 1) publish_known();
      const bool known = s.known.valid == params.routing.name;
      // Should all ranks take part.
      if (known) find_row_bases_beside(p(), params.routing, s.expected, row_tables_of_block());
      if (!known && leads) leader.refuse(DEEPEP_ERROR_INVALID_ARGUMENT, Reason::no_routing);
    } else {
      // Either, since both note what is wrong in the same word.
      const bool has_entries = params.args.topk_idx != 0;
      const uint64_t given = params.routing.num_topk == 0 ? params.args.num_tokens_per_expert : 0;
      const auto* per_expert = reinterpret_cast<const int32_t*>(given);
      if (!has_entries && per_expert != nullptr) check_expert_counts(per_expert);
      const bool looks = leads && has_entries && (wrong || !is_few());
      const uint64_t bad = looks ? load_relaxed_gpu(&p().state->bad_entry) : 0;
      add_counts_up(per_expert);
      if (leads) check_entries(leader, bad);
      if (threadIdx.x == 0) s.said_code = s.call.code;
      __syncthreads();
      // Each count says by itself that it is there; where ranks may be left out, whoever has the message has them.
      const bool counts_first = p().mask_on_timeout != 0;
      if (warp == 1 && !counts_first) leader.publish_to(s.expected, s.said_code, false);
      publish_sums();  // Should the call be refused, a peer may have taken them: its handle holds no routing then.
      place_sections(p(), tables, by_expert());
      if (warp == 1 && counts_first) leader.publish_to(s.expected, s.said_code, true);
      // While the messages come.
      if (s.said_code == 0) {
        place_block(p(), input(), counted_tokens(), tables, by_expert(), params.routing);
        if (!is_few()) arrive(p(), kMeetPlaced);
      }
    }
    return true;
  }

  // Warps from `first` on; see take_columns().
  __device__ bool take_soon(const RowTables& rows, uint64_t view, uint32_t first) const {
    const uint32_t skipped = first * kWarpLanes;
    if (threadIdx.x < skipped) return true;
    return take_columns(p(), params.routing, s.call.epoch, view, rows, threadIdx.x - skipped, blockDim.x - skipped);
  }
  // All threads, when the ranks have agreed: mostly the counts have come with the messages. False when the call has failed.
  __device__ bool take_late(const RowTables& rows) const {
    if (!__syncthreads_or(!take_soon(rows, s.call.view, 0))) return true;
    if (threadIdx.x < kWarpLanes) wait_for_counts(Leader(p(), s.call), s.call.view);
    __syncthreads();
    return !__syncthreads_or(s.call.code != 0 || !take_soon(rows, s.call.view, 0));
  }

  // The same until it goes, or stops with s.call.code: true when rows may be pushed.
  __device__ bool lead() {
    const uint32_t warp = threadIdx.x / kWarpLanes;
    const bool leads = warp == 0;
    Leader leader(p(), s.call);
    const RowTables rows = row_tables_of_block();
    // While the first warp listens the others take what comes, should all ranks take part.
    const bool came = cached() || s.said_code != 0 || take_soon(rows, s.expected, 1);
    const bool gathered = !leads || leader.gather(0, true);
    if (__syncthreads_or(!gathered)) return stop();
    if (!cached() || s.call.view != s.expected) {
      if (cached()) {
        find_row_bases(p(), params.routing, s.call.view, rows);
      } else {
        if (__syncthreads_or(!came || s.call.view != s.expected) && !take_late(rows)) return stop();
        place_all_groups(p(), params.routing, rows, warp, blockDim.x / kWarpLanes);
      }
      // Any block may push any token: all must have their places.
      cached() || is_few() ? __syncthreads() : wait_for_blocks(p(), s.call, kMeetPlaced, false);
    }
    if (leads) {
      check_capacity(leader, rows);
      if (!leader.failed()) leader.enter(DEEPEP_PHASE_SEND);
    } else if (warp == 1) {
      if (lane_id() == 0) s.num_rows = rows.rows[p().rank];
      find_slots([&](uint32_t rank) { return s.call.peer_slots[rank]; }, [&](uint32_t rank) { return rows.bases[rank]; });
    }
    if (__syncthreads_or(leads && s.call.code != 0)) return stop();
    if (threadIdx.x == 0) {
      params.routing.header->view = s.call.view;
      p().state->rows[p().slot] = {s.call.view, params.routing.name, 0};
      if (!cached()) params.routing.header->epoch = s.call.epoch;
      release_blocks(p(), s.call, kStepGo, true);
    }
    return true;
  }

  // A block that is not the leader's: waits for its release, or its stop.
  __device__ bool follow() {
    if (threadIdx.x / kWarpLanes == 1) {
      if (lane_id() == 0) s.call.go = hear_leader(p(), s.call, kStepGo);
      __syncwarp();  // What one lane has acquired, all have.
      if (s.call.go != 0) {
        if (lane_id() == 0) s.call.view = __ldcg(&p().state->view), s.num_rows = __ldcg(&p().state->num_rows);
        find_slots([&](uint32_t rank) { return __ldcg(p().state->peer_slots + rank); },
                   [&](uint32_t rank) { return __ldcg(row_bases(p()) + rank); });
      }
    }
    __syncthreads();
    return s.call.go != 0;
  }

  // True when rows may be pushed. By all threads.
  __device__ bool notify() {
    // Until this dispatch has succeeded the handle holds no routing.
    if (!cached() && is_leader() && threadIdx.x == 0) params.routing.header->valid = 0;
    if (s.call.skipped) return false;
    if (counts()) {
      if (is_few()) {
        wrong = count_sections(p(), input(), counted_tokens(), tables, by_expert(), params.routing.experts);
      } else {
        count_block(p(), input(), counted_tokens(), tables, by_expert(), params.routing.experts);
        arrive(p(), kMeetCounted);
      }
    }
    // It tells of nothing but itself.
    if (meets_for_room() && threadIdx.x == kWarpLanes) reduce_add_relaxed_gpu(&p().state->arrivals[kMeetCounted], 1);
    if (is_leader()) {
      if (!publish()) return false;
    } else if (!cached() && !is_few()) {
      // A stop is for good: whoever asked again would change the answer that others of the block are reading.
      if (!await_leader(p(), s.call, kStepCounted)) return false;
      place_sections(p(), tables, by_expert());
      place_block(p(), input(), counted_tokens(), tables, by_expert(), params.routing);
      arrive(p(), kMeetPlaced);
    }
    if (is_few() && !(is_leader() && threadIdx.x < kWarpLanes)) part = take_part();
    return is_leader() ? lead() : follow();
  }

  // Shared memory: the tables of a count, where rows begin, sums. None is where another is: warps use them at once.
  __device__ uint32_t sums_at() const {
    return (params.plan.block_bytes - sums_bytes(p().options)) / 8 * 8;
  }
  __device__ uint32_t rows_at() const {
    return (sums_at() - row_tables_bytes(p().options)) / 8 * 8;
  }
  __device__ RowTables row_tables_of_block() const { return row_tables(p(), shared + rows_at()); }
  __device__ CountTables count_tables_of_block() const {
    CountTables tables = count_tables(p(), shared, rows_at(), by_expert());
    if (is_few()) tables.sections = min(tables.sections, max(params.routing.num_tokens, 1u));
    return tables;
  }

  // ---- counts for the user

  __device__ void store_count(uint64_t i, int32_t value) const {
    reinterpret_cast<int32_t*>(params.args.recv_num_rows)[i] = value;
    if (p().seq != 0) store_relaxed_sys(reinterpret_cast<uint64_t*>(params.args.host_counts) + i, host_count(p().seq, value));
  }

  // The clerk of each block, a warp that pushes no rows: the counts, on the device and on the host. Each word tells the host
  // by itself that it is there: a fence would wait for more than them. The clerks share them, because one after another they
  // would take longer than the rows of few tokens; the first of all, which the host looks at, mostly comes last.
  __device__ void fill_counts() {
    const CountMatrix matrix = matrix_of(p(), params.routing, s.call.view);
    const uint32_t lane = threadIdx.x % kWarpLanes;
    const uint32_t ranks = p().options.num_ranks;
    auto* stats = reinterpret_cast<int32_t*>(params.args.expert_stats);
    for (uint32_t e = blockIdx.x * kWarpLanes + lane; e < p().num_local_experts; e += gridDim.x * kWarpLanes) {
      const uint32_t entries = entries_before(matrix, ranks, p().first_expert + e);
      store_count(2 + e, static_cast<int32_t>(aligned(entries, params.routing.expert_alignment)));
      if (stats != nullptr) stats[e] += static_cast<int32_t>(entries);
    }
    if (is_leader()) {
      for (uint32_t src = lane; src < ranks; src += kWarpLanes) {
        const uint32_t tokens = in_view(s.call.view, src) ? matrix.tokens[src * ranks + p().rank] : 0;
        store_count(2 + p().num_local_experts + src, static_cast<int32_t>(tokens));
      }
      if (lane == 0) {
        store_count(1, static_cast<int32_t>(p().state->num_rows));
        store_count(0, static_cast<int32_t>(tokens_before(matrix, ranks, p().rank)));
      }
    }
    if (blockIdx.x != gridDim.x - 1) return;
    const uint64_t sent = rows_sent();
    if (lane != 0) return;
    const uint64_t row_bytes = params.args.row_bytes + uint64_t{params.args.num_scales} * params.args.scale_elem_bytes;
    reduce_add_relaxed_gpu(&p().state->rows_sent, sent);
    reduce_add_relaxed_gpu(&p().state->bytes_sent, sent * row_bytes);
  }

  // Nothing came: whoever works by the counts, without asking how the call ended, finds no rows of an earlier one. The host
  // does the same with its own.
  __device__ void clear_counts() {
    const uint32_t num_counts = 2 + p().num_local_experts + p().options.num_ranks;
    auto* counts = reinterpret_cast<int32_t*>(params.args.recv_num_rows);
    for (uint32_t i = threadIdx.x; i < num_counts; i += blockDim.x) counts[i] = 0;
    __syncthreads();
  }

  // ---- SEND

  template <bool kTma>
  __device__ void send(uint64_t* barriers) {
    if (threadIdx.x / kWarpLanes >= params.plan.warps)
      fill_counts();
    else if (is_few())
      put_part(part);
    else
      push<kTma>(shared, barriers);
    // Last: a warp that has few rows to push, or none, does it while others push theirs; blocks, where one sends alone.
    const uint32_t first = params.sending_blocks < gridDim.x ? params.sending_blocks : 0;
    if (blockIdx.x >= first) clear_experts(first);
  }

  // ---- ARRIVE: leader's block, when all blocks have pushed

  // A rank that died between its counts and its rows: the places of its rows become padding, the others stay where they are,
  // because every rank has computed with them.
  __device__ void forget_rows_of(uint32_t src) {
    const CountMatrix matrix = matrix_of(p(), params.routing, s.call.view);
    const SlotView here = slot_view(p().regions, s.slots[p().rank]);
    const uint32_t warp = threadIdx.x / kWarpLanes, warps = blockDim.x / kWarpLanes;
    if (by_expert()) {
      for (uint32_t e = 0; e < p().num_local_experts; ++e) {
        const uint32_t expert = p().first_expert + e;
        const uint64_t begin = __ldcg(group_begins(p()) + e);
        clear_rows(here, begin + entries_before(matrix, src, expert), begin + entries_before(matrix, src + 1, expert), warp,
                   warps, true);
      }
    } else {
      clear_rows(here, tokens_before(matrix, src, p().rank), tokens_before(matrix, src + 1, p().rank), warp, warps, true);
    }
    // The host may be reading the counts, which were handed out before.
    if (threadIdx.x == 0) store_count(2 + p().num_local_experts + src, 0);
  }

  // One warp: rows that this rank has sent.
  __device__ uint64_t rows_sent() const {
    const uint32_t lane = threadIdx.x % kWarpLanes;
    const uint32_t ranks = p().options.num_ranks, experts = p().options.num_experts;
    uint64_t sum = 0;
    if (!by_expert()) {
      for (uint32_t dst = lane; dst < ranks; dst += kWarpLanes) {
        if (in_view(s.call.view, dst)) sum += params.routing.tokens[p().rank * ranks + dst];
      }
    } else {
      for (uint32_t e = lane; e < experts; e += kWarpLanes) {
        if (in_view(s.call.view, p().partition.rank(e))) sum += params.routing.entries[p().rank * experts + e];
      }
    }
    for (uint32_t step = kWarpLanes / 2; step != 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    return sum;
  }

  // This block's rows are in place: the leader is told, and the peers, unless that is for the leader to say, or rows were left
  // out.
  __device__ void end_block(bool went) {
    __syncthreads();
    const uint32_t blocks = params.sending_blocks;
    if (went && p().mask_on_timeout == 0 && threadIdx.x / kWarpLanes == 1 && s.stopped == 0 && blockIdx.x < blocks) {
      announce_block(p(), s.call.view, s.call.epoch, blocks, is_leader() ? s.call.peer_slots : nullptr);
    }
    // Releases what the block has written; pairs with Leader::await_blocks().
    if (threadIdx.x == 0) reduce_add_release_gpu(&p().state->arrivals[kMeetEnd], 1);
  }

  __device__ void finish(bool went) {
    if (went && p().mask_on_timeout == 0) return finish_with_all();
    const uint32_t warp = threadIdx.x / kWarpLanes;
    if (warp == 0) {
      Leader leader(p(), s.call);
      leader.await_blocks(kMeetEnd, false);
      end_blocks(p(), s.call);
      uint64_t left_out = 0;
      // Whoever has left this rank out may have given its slot to others.
      if (went && !leader.is_left_out()) {
        announce_pushed(leader, s.call.view, s.call.peer_slots);
        left_out = wait_pushed(leader, s.call.view);
      }
      if (leader.lane == 0) s.left_out = left_out;
    }
    __syncthreads();
    if (!went) {
      clear_counts();
    } else {
      for (uint64_t rest = s.call.code == 0 ? s.left_out : 0; rest != 0; rest &= rest - 1) {
        forget_rows_of(static_cast<uint32_t>(__ffsll(static_cast<long long>(rest)) - 1));
      }
    }
    __syncthreads();
    if (warp == 0) end();
  }

  // The same where nobody can be left out: the first warp waits for this rank's blocks, the others for the peers'.
  __device__ void finish_with_all() {
    const uint32_t warp = threadIdx.x / kWarpLanes;
    Leader leader(p(), s.call);
    uint64_t ended_ns = 0;
    bool left_out = false;
    if (warp == 0) {
      leader.await_blocks(kMeetEnd, false);
      ended_ns = leader.begin_wait();
      end_blocks(p(), s.call);
      left_out = must_stop(p(), s.call, s.call.view);
    } else {
      look_for_blocks(p(), s.call, s.pushed, s.call.view);
    }
    if (warp == 0 && lane_id() == 0) s.ended_ns = ended_ns;
    __syncthreads();
    // In a captured call by another warp. Where the host hears that a call has ended it may ask at once for what was waited.
    if (warp == (p().seq != 0 ? 0 : 1)) account_for_blocks(leader, s.pushed, s.ended_ns);
    if (warp != 0) return;
    const uint64_t late = late_blocks(leader, s.pushed, s.call.view);
    const bool entered = leader.enter(DEEPEP_PHASE_ARRIVE), injected = p().inject[DEEPEP_PHASE_ARRIVE].wanted != 0;
    if (late != 0 || left_out || injected || s.pushed.torn != 0) {
      settle(leader, entered ? late : 0, injected ? leader.begin_wait() : ended_ns);
    }
    end();
  }
  // Waits for those that are late; fails the call when ranks disagree about who takes part, or one has left this one out.
  DEEPEP_COLD __device__ static void settle(Leader leader, uint64_t late, uint64_t begin_ns) {
    const CallShared& s = leader.s;
    if (late != 0) wait_for_late_blocks(leader, late, begin_ns);
    if (!leader.failed()) check_views(leader, s.view, s.view & ~rank_bit(leader.p.rank));
    // Whoever has left this rank out has failed in this call.
    if (must_stop(leader.p, s, s.view)) leader.is_left_out();
  }

  // The leader's warp.
  __device__ void end() {
    if (threadIdx.x == 0 && s.call.code == 0 && !s.call.skipped) params.routing.header->valid = params.routing.name;
    tell_end(p(), s.call, {true, true, true});
  }
};

// Dispatch of one rank. Collective; graph-safe. Block 0 leads.
template <bool kTma>
__global__ void __launch_bounds__(kMaxBlockThreads + kClerks * kWarpLanes, 1)
    dispatch_kernel(const __grid_constant__ DispatchParams params) {
  extern __shared__ __align__(128) uint8_t dynamic_shared[];
  __shared__ DispatchShared s;
  __shared__ uint64_t barriers[kMaxBarriers];
  await_kernel_before();
  Dispatch dispatch{{params, s}, dynamic_shared, {}, {}, false};
  dispatch.begin();
  const bool goes = dispatch.notify();
  if (goes) {
    if (dispatch.by_expert()) dispatch.clear_padding();
    dispatch.template send<kTma>(barriers);
  }
  dispatch.end_block(goes);
  if (is_leader()) dispatch.finish(goes);
}

}  // namespace deepep
