// Low-latency combine: expert outputs are announced to the ranks of the dispatch, then each pulls and reduces its tokens' rows.
//
// In: deepep_low_latency_combine_args. Out: bf16 [num_tokens, hidden]. Phases on the communication stream: PUBLISH (wait until
// earlier readers of the region are gone, copy in, announce), and in the receive half REDUCE (wait for the peers'
// announcements, pull). The receive half may come many calls later, so announcements have lines of their own instead of the
// message ring (protocol.hpp), and weights and routing are taken over in the send half. Called by the API layer.

#include <cstring>

#include "../api/operations.hpp"
#include "../api/registry.hpp"
#include "exchange.hpp"
#include "expert_region.hpp"
#include "layout.hpp"
#include "low_latency_slot.hpp"
#include "rows.hpp"
#include "rows_fp8.hpp"
#include "wait.hpp"

namespace deepep {

// One combine, from its checks to the end of its receive half.
struct LowLatencyCombine {
  deepep_low_latency_combine_args args;
  const LowLatencySlot* state = nullptr;  // which holds this: work that was enqueued holds it
  uint32_t slot = 0;
  bool one_piece = false;  // no receive half: x may be read until the end

  // Taken over by the send half; on the communication stream.
  std::vector<int32_t> experts;  // [num_tokens, num_topk], -1 = left out by this combine
  std::vector<float> weights;    // the same shape; empty = all ones
  Failure refusal;               // an error in this rank's arguments
  bool announced = false;        // the send half has come to its end
};

namespace {

// Takes routing and weights over. An entry must be the dispatch's or -1.
void take_routing(Operation& op, LowLatencyCombine& job) {
  const Routing& routing = job.state->routing;
  if (!routing.valid) {
    op.fail({.code = DEEPEP_ERROR_INVALID_ARGUMENT, .reason = Reason::no_dispatch, .agreed = 1});
    return;
  }
  const size_t count = size_t{job.state->plan.num_tokens} * job.state->plan.num_topk;
  const TopkIdx topk = {reinterpret_cast<const void*>(job.args.topk_idx), job.args.topk_idx_bytes, job.state->plan.num_topk};
  job.experts.resize(count);
  for (size_t i = 0; i < count; ++i) {
    const int64_t value = topk.at(i);
    if (value != -1 && value != routing.experts[i]) {
      op.fail({.code = DEEPEP_ERROR_INVALID_ARGUMENT,
               .reason = Reason::changed_entry,
               .agreed = 1,
               .a = static_cast<int32_t>(i / topk.num_topk),
               .b = static_cast<int32_t>(i % topk.num_topk),
               .expected = routing.experts[i],
               .seen = value});
      return;
    }
    job.experts[i] = static_cast<int32_t>(value);
  }
  const auto* weights = reinterpret_cast<const float*>(job.args.topk_weights);
  if (weights != nullptr) job.weights.assign(weights, weights + count);
}

bool casts(const LowLatencyCombine& job) { return (job.args.flags & DEEPEP_FLAG_FP8) != 0; }

uint8_t* own_region(Buffer& buffer, const LowLatencyCombine& job) {
  return buffer.symmetric(buffer.rank) + slot_offset(buffer.regions, job.slot) + buffer.regions.expert_output;
}

void copy_rows(Buffer& buffer, const LowLatencyCombine& job, uint32_t local, uint64_t begin, uint64_t end) {
  const uint64_t row_bytes = uint64_t{buffer.options.hidden} * 2;
  const auto* x = reinterpret_cast<const uint8_t*>(job.args.x);
  for (uint64_t row = begin; row < end; ++row) {
    const uint64_t at = region_row(buffer, local, row) * row_bytes;
    stream_row(own_region(buffer, job) + at, x + at, row_bytes);
  }
}

// Copies what the peers will pull; this rank's own rows too when x may be gone before the receive half.
void copy_in(Buffer& buffer, const LowLatencyCombine& job) {
  if (job.args.x == 0 || reinterpret_cast<const uint8_t*>(job.args.x) == own_region(buffer, job)) return;
  const CountMatrix matrix = job.state->routing.matrix(buffer.options);
  for (uint32_t local = 0; local < buffer.num_local_experts; ++local) {
    const uint32_t expert = buffer.first_expert + local;
    const uint32_t own_begin = entries_before(matrix, buffer.rank, expert);
    const uint32_t own_end = entries_before(matrix, buffer.rank + 1, expert);
    copy_rows(buffer, job, local, 0, own_begin);
    if (!job.one_piece) copy_rows(buffer, job, local, own_begin, own_end);
    copy_rows(buffer, job, local, own_end, entries_before(matrix, buffer.options.num_ranks, expert));
  }
  stream_fence();  // stream_row() may have used non-temporal stores, which the announcement does not order by itself.
}

// The same cast to FP8: all rows, from where they are, which can be the region itself.
void cast_in(Buffer& buffer, const LowLatencyCombine& job) {
  const uint32_t hidden = buffer.options.hidden;
  const auto* x = job.args.x != 0 ? reinterpret_cast<const uint8_t*>(job.args.x) : own_region(buffer, job);
  const CountMatrix matrix = job.state->routing.matrix(buffer.options);
  std::vector<uint8_t> cast(fp8_row_bytes(hidden));
  for (uint32_t local = 0; local < buffer.num_local_experts; ++local) {
    const uint32_t num_rows = entries_before(matrix, buffer.options.num_ranks, buffer.first_expert + local);
    for (uint32_t row = 0; row < num_rows; ++row) {
      const uint64_t at = region_row(buffer, local, row) * hidden * 2;
      cast_row_to_fp8(reinterpret_cast<const uint16_t*>(x + at), hidden, false, false, cast.data(),
                      cast.data() + fp8_scales_offset(hidden));
      std::memcpy(own_region(buffer, job) + at, cast.data(), cast.size());
    }
  }
}

// Tells the ranks of the dispatch; a header in the ring as well, so that a rank which is in another call notices.
void announce_outputs(Operation& op, const LowLatencyCombine& job) {
  Buffer& buffer = op.buffer;
  const uint64_t masked = buffer.masked.load(std::memory_order_relaxed);
  const LowLatencySlot& state = *job.state;
  Draft draft;
  draft.agreed[kAgreedOp] = DEEPEP_OP_LOW_LATENCY_COMBINE;
  draft.slot = job.slot;
  for (uint32_t peer = 0; peer < buffer.options.num_ranks; ++peer) {
    if (peer == buffer.rank || in_view(masked, peer)) continue;
    publish(op, draft, peer);
    if (!in_view(state.routing.view, peer)) continue;
    ReadyLine* line = ready_at(buffer.symmetric(peer), buffer.regions, buffer.rank, state.slots[peer]);
    line->said = count_word(op.epoch, ready_said(op.failure.code, job.args.flags & DEEPEP_FLAG_FP8));
    store_release(&line->epoch, op.epoch);  // Pairs with the acquire in receive() of the peer.
  }
  for (uint32_t peer = 0; peer < buffer.options.num_ranks; ++peer) {
    if (!in_view(masked, peer)) ring(buffer, peer);
  }
}

// The send half. False when the operation has failed half-way; a refusal is kept for the receive half.
bool send(Operation& op, LowLatencyCombine& job) {
  if (!inject(op, DEEPEP_PHASE_PUBLISH)) return false;
  PeerWait wait(op, 1, reinterpret_cast<int64_t*>(job.args.wait_stats));
  if (!wait_for_readers(op, job.slot, wait)) return false;
  take_routing(op, job);
  begin_reading(op, job.slot, job.state->routing.view);
  if (op.failure.code == 0) {
    if (casts(job))
      cast_in(op.buffer, job);
    else
      copy_in(op.buffer, job);
  }
  announce_outputs(op, job);
  job.refusal = op.failure;
  job.announced = true;
  return true;
}

// Waits for the outputs of every rank that takes part. False when the call fails, on all ranks alike or half-way.
bool wait_for_outputs(Operation& op, const LowLatencyCombine& job, PeerWait& wait, uint64_t& view) {
  Buffer& buffer = op.buffer;
  const uint32_t flags = job.args.flags & DEEPEP_FLAG_FP8;
  int32_t refused = -1, differs = -1;
  for (uint32_t src = 0; src < buffer.options.num_ranks; ++src) {
    if (src == buffer.rank || !in_view(view, src)) continue;
    const ReadyLine* line = ready_at(buffer.symmetric(buffer.rank), buffer.regions, src, job.slot);
    // Pairs with the release in announce_outputs() of src.
    const MessageHeader* message = message_at(buffer.symmetric(buffer.rank), buffer.regions, src, op.epoch);
    const Arrival arrival = wait.wait_for(src, &line->epoch, op.epoch, {.reason = Reason::late_output, .message = message});
    if (arrival == Arrival::failed) return false;
    if (arrival == Arrival::left_out)
      view &= ~(uint64_t{1} << src);
    else if (code_said(line->said) != 0 && refused < 0)
      refused = static_cast<int32_t>(src);
    else if (flags_said(line->said) != flags && differs < 0)
      differs = static_cast<int32_t>(src);
  }
  if (job.refusal.code != 0) {
    op.failure = job.refusal;
    op.agreed = true;
  } else if (refused >= 0) {
    const auto by = static_cast<uint32_t>(refused);
    fail_refused(op, by, code_said(ready_at(buffer.symmetric(buffer.rank), buffer.regions, by, job.slot)->said));
  } else if (differs >= 0) {
    const auto by = static_cast<uint32_t>(differs);
    op.fail({.code = DEEPEP_ERROR_MISMATCH,
             .peer = differs,
             .reason = Reason::disagreement,
             .agreed = 1,
             .a = kAgreedFlags,
             .expected = flags,
             .seen = flags_said(ready_at(buffer.symmetric(buffer.rank), buffer.regions, by, job.slot)->said)});
  }
  return op.failure.code == 0;
}

// False when the rows may have been overwritten before they were read.
bool reduce(Operation& op, const LowLatencyCombine& job, uint64_t view) {
  Buffer& buffer = op.buffer;
  const Options& options = buffer.options;
  const Routing& routing = job.state->routing;
  const ExpertOwners owners(options);
  const std::vector<uint32_t> bases = row_bases(routing, routing.view, options, buffer.rank);
  const uint64_t row_bytes = uint64_t{options.hidden} * 2;
  std::vector<const uint8_t*> regions(options.num_ranks);
  for (uint32_t rank = 0; rank < options.num_ranks; ++rank) {
    regions[rank] = buffer.symmetric(rank) + slot_offset(buffer.regions, job.state->slots[rank]) + buffer.regions.expert_output;
  }
  if (job.one_piece && job.args.x != 0 && !casts(job)) regions[buffer.rank] = reinterpret_cast<const uint8_t*>(job.args.x);
  const uint16_t* rows[DEEPEP_MAX_TOPK];
  float weights[DEEPEP_MAX_TOPK];
  uint64_t rows_pulled = 0;
  for (uint32_t token = 0; token < job.state->plan.num_tokens; ++token) {
    uint32_t count = 0;
    for (uint32_t k = 0; k < routing.width; ++k) {
      const size_t i = size_t{token} * routing.width + k;
      const int32_t expert = job.experts[i];
      if (expert < 0 || !in_view(view, owners[expert])) continue;
      const uint32_t first = local_experts(options.num_experts, options.num_ranks, owners[expert]).first;
      const auto key = static_cast<uint32_t>(expert);
      const uint64_t at = region_row(buffer, key - first, bases[key] + routing.hops[i].index);
      rows[count] = reinterpret_cast<const uint16_t*>(regions[owners[expert]] + at * row_bytes);
      if (!job.weights.empty()) weights[count] = job.weights[i];
      count += 1;
    }
    const Reduction reduction = {.rows = rows,
                                 .weights = job.weights.empty() ? nullptr : weights,
                                 .num_rows = count,
                                 .hidden = options.hidden,
                                 .out = reinterpret_cast<uint16_t*>(job.args.out) + size_t{token} * options.hidden};
    if (casts(job))
      reduce_fp8_rows(reduction);
    else
      reduce_rows(reduction);
    rows_pulled += count;
  }
  buffer.counters.rows_pulled += rows_pulled;
  return !is_overtaken(op);
}

// The receive half.
void receive(Operation& op, LowLatencyCombine& job) {
  if (!job.announced) return fail_without_send(op);
  if (!inject(op, DEEPEP_PHASE_REDUCE)) return;
  PeerWait wait(op, 1, reinterpret_cast<int64_t*>(job.args.wait_stats));
  op.failure = Failure{};
  uint64_t view = job.state->routing.view & ~op.buffer.masked.load(std::memory_order_relaxed);
  const bool came = wait_for_outputs(op, job, wait, view);
  if (!came && op.agreed) forget_readers(op, job.slot);  // a call that fails on every rank is read by none
  if (!came && !op.agreed) return;
  if (came && !reduce(op, job, view)) return;
  // When the call was refused nobody reads, and says so too: then the announcements may be made anew.
  for (uint32_t rank = 0; rank < op.buffer.options.num_ranks; ++rank) {
    if (in_view(view, rank)) end_reading(op, rank, job.state->slots[rank]);
  }
}

}  // namespace

uint64_t enqueue_combine(Buffer& buffer, const deepep_low_latency_combine_args& args,
                         const std::shared_ptr<LowLatencySlot>& slot) {
  const auto job = std::make_shared<LowLatencyCombine>();
  job->args = args;
  job->state = slot.get();
  job->slot = static_cast<uint32_t>(args.slot);
  job->one_piece = (args.flags & DEEPEP_FLAG_RECEIVE_HOOK) == 0;
  const uint64_t epoch = buffer.enqueue(DEEPEP_OP_LOW_LATENCY_COMBINE, stream_fields(args), true, [job, slot](Operation& op) {
    guarded(op, [&] {
      if (send(op, *job) && job->one_piece) receive(op, *job);
    });
  });
  if (!job->one_piece) slot->combine = job;
  return epoch;
}

void enqueue_combine_receive(Buffer& buffer, const deepep_receive_args& args, const std::shared_ptr<LowLatencySlot>& slot) {
  buffer.enqueue(
      DEEPEP_OP_LOW_LATENCY_COMBINE, stream_fields(args), false,
      [job = slot->combine, slot](Operation& op) { guarded(op, [&] { receive(op, *job); }); }, 0, slot->combine_epoch);
  slot->combine = nullptr;
}

void enqueue_combine_give_up(Buffer& buffer, int32_t, const std::shared_ptr<LowLatencySlot>& slot) {
  StreamFields alone;
  alone.flags = DEEPEP_FLAG_RECEIVE_HOOK;  // half a call: it is not counted as a combine that ended
  buffer.enqueue(
      DEEPEP_OP_LOW_LATENCY_COMBINE, alone, false,
      [job = slot->combine, slot](Operation& op) {
        for (uint32_t rank = 0; rank < op.buffer.options.num_ranks; ++rank) {
          if (in_view(job->state->routing.view, rank)) end_reading(op, rank, job->state->slots[rank]);
        }
      },
      0, slot->combine_epoch);
  slot->combine = nullptr;
}

void release_slot(Buffer& buffer, const deepep_slot_release_args& args) {
  buffer.slots.held(args.slot);
  const auto readers = args.stream ? present_work(*find<Stream>(Kind::stream, args.stream, "stream")) : nullptr;
  give_up_pending_combine(buffer, args.slot);
  buffer.slots.give(args.slot, readers);
}

}  // namespace deepep
