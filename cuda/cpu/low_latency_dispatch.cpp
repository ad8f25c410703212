// Low-latency dispatch: rows go straight into the region of their expert, cast to FP8 on the way if asked.
//
// In: deepep_low_latency_dispatch_args. Out: [num_local_experts, max_rows, row bytes] packed from 0 for each expert, with
// counts, source tokens and ranges. Phases on the communication stream: NOTIFY (count, exchange), SEND (cast and push), and in
// the receive half ARRIVE (wait for everyone's rows); without RECEIVE_HOOK the two halves are one operation. Counts are
// exchanged first, as in normal mode, so rows are packed and nothing is gathered afterwards. Called by the API layer.
#include "low_latency_slot.hpp"

#include <cstring>

#include "exchange.hpp"
#include "layout.hpp"
#include "payload.hpp"
#include "rows.hpp"
#include "scales.hpp"
#include "wait.hpp"

namespace deepep {
namespace {

constexpr uint32_t kTokensBetweenLooks = 16;  // tokens pushed between two looks at whether a peer left this rank out
constexpr uint32_t kAgreedFlagBits =
    DEEPEP_FLAG_SCALES_COLUMN_MAJOR | DEEPEP_FLAG_FP8 | DEEPEP_FLAG_ROUND_SCALE | DEEPEP_FLAG_UE8M0;

struct SendJob {
  deepep_low_latency_dispatch_args args;
  std::shared_ptr<LowLatencySlot> state;
  uint32_t slot = 0;
};

class LowLatencySend {
 public:
  LowLatencySend(Operation& op, const SendJob& job)
      : op_(op),
        buffer_(op.buffer),
        options_(op.buffer.options),
        job_(job),
        args_(job.args),
        state_(*job.state),
        routing_(job.state->routing),
        layout_(job.state->layout),
        payload_(payload_of(job.args)) {}

  bool run() {
    const bool ok = inject(op_, DEEPEP_PHASE_NOTIFY) && notify() && inject(op_, DEEPEP_PHASE_SEND) && send();
    if (!ok && op_.agreed) state_.failure = op_.failure;
    routing_.valid = ok;
    return ok;
  }

 private:
  bool notify();
  Draft draft(const Counts& counts) const;
  bool check_capacity();
  void fill_counts();
  bool send();
  void push_token(uint32_t token, const ExpertOwners& owners, const std::vector<uint32_t>& bases);
  void push_row(uint32_t token, uint32_t dst, uint64_t local_expert, uint32_t row, const uint8_t* x);
  void push_scale_columns(const ExpertOwners& owners, const std::vector<uint32_t>& bases);
  const uint8_t* scales_of(uint32_t token) const;
  uint8_t* scales_at(uint32_t dst, uint64_t local_expert, uint32_t row) const;
  uint64_t scale_bytes() const { return uint64_t{layout_.scales.num_scales} * layout_.scales.elem_bytes; }
  bool casts() const { return (args_.flags & DEEPEP_FLAG_FP8) != 0; }
  bool by_column() const { return (args_.flags & DEEPEP_FLAG_SCALES_COLUMN_MAJOR) != 0; }

  Operation& op_;
  Buffer& buffer_;
  const Options& options_;
  const SendJob& job_;
  const deepep_low_latency_dispatch_args& args_;
  LowLatencySlot& state_;
  Routing& routing_;
  const LowLatencyLayout& layout_;
  const Payload payload_;
  std::vector<uint8_t> cast_row_;     // FP8: the token at hand
  std::vector<uint8_t> cast_scales_;  // FP8: of all tokens
  uint64_t rows_sent_ = 0;
};

Draft LowLatencySend::draft(const Counts& counts) const {
  Draft draft;
  draft.agreed[kAgreedOp] = DEEPEP_OP_LOW_LATENCY_DISPATCH;
  draft.agreed[kAgreedRowBytes] = payload_.row_bytes;
  draft.agreed[kAgreedNumScales] = payload_.num_scales;
  draft.agreed[kAgreedScaleElemBytes] = payload_.scale_elem_bytes;
  draft.agreed[kAgreedFlags] = args_.flags & kAgreedFlagBits;
  draft.slot = job_.slot;
  draft.pushes = true;
  if (op_.failure.code == 0) {
    draft.tokens_per_rank = counts.tokens.data();
    draft.entries_per_expert = counts.entries.data();
  }
  return draft;
}

// Only tokens that list an expert twice can overfill a region.
bool LowLatencySend::check_capacity() {
  const CountMatrix matrix = routing_.matrix(options_);
  for (uint32_t e = 0; e < options_.num_experts; ++e) {
    const uint32_t dst = expert_rank(e, options_.num_experts, options_.num_ranks);
    const uint32_t need = entries_before(matrix, options_.num_ranks, e);
    if (need <= layout_.max_rows || !in_view(routing_.view, dst)) continue;
    op_.fail({.code = DEEPEP_ERROR_CAPACITY,
              .peer = static_cast<int32_t>(dst),
              .reason = Reason::expert_capacity,
              .agreed = 1,
              .a = static_cast<int32_t>(e),
              .expected = layout_.max_rows,
              .seen = need});
    return false;
  }
  return true;
}

void LowLatencySend::fill_counts() {
  const CountMatrix matrix = routing_.matrix(options_);
  auto* count = reinterpret_cast<int32_t*>(args_.recv_count);
  auto* range = reinterpret_cast<int64_t*>(args_.recv_layout_range);
  auto* stats = reinterpret_cast<int32_t*>(args_.expert_stats);
  for (uint32_t local = 0; local < buffer_.num_local_experts; ++local) {
    uint64_t begin = 0;
    for (uint32_t src = 0; src < options_.num_ranks; ++src) {
      const uint64_t end = entries_before(matrix, src + 1, buffer_.first_expert + local);
      range[local * options_.num_ranks + src] = static_cast<int64_t>(begin << 32 | (end - begin));
      begin = end;
    }
    count[local] = static_cast<int32_t>(begin);
    if (stats != nullptr) stats[local] += static_cast<int32_t>(begin);
  }
}

bool LowLatencySend::notify() {
  Counts counts;
  routing_.plan = state_.plan;
  routing_.epoch = op_.epoch;
  // A refusal stays in op_.failure: exchange() passes it on.
  count_topk(op_, {reinterpret_cast<const void*>(args_.topk_idx), state_.plan.topk_idx_bytes, state_.plan.num_topk},
             state_.plan.num_tokens, counts, &routing_);
  PeerWait wait(op_, 0, reinterpret_cast<int64_t*>(args_.wait_stats));
  Exchange exchanged;
  if (!exchange(op_, draft(counts), wait, exchanged)) return false;
  state_.slots = slots_of(exchanged);
  keep_counts(exchanged, options_, routing_);
  if (!check_capacity()) return false;
  fill_counts();
  return true;
}

// Where a token's scales come from: the caller, or the cast.
const uint8_t* LowLatencySend::scales_of(uint32_t token) const {
  return casts() ? cast_scales_.data() + token * scale_bytes() : payload_.scales_of(token);
}

uint8_t* LowLatencySend::scales_at(uint32_t dst, uint64_t local_expert, uint32_t row) const {
  return buffer_.symmetric(dst) + slot_offset(buffer_.regions, state_.slots[dst]) + buffer_.regions.recv_scales +
         local_expert * layout_.expert_stride + row * layout_.scales.to.row;
}

void LowLatencySend::push_row(uint32_t token, uint32_t dst, uint64_t local_expert, uint32_t row, const uint8_t* x) {
  uint8_t* slot = buffer_.symmetric(dst) + slot_offset(buffer_.regions, state_.slots[dst]);
  const uint64_t at = local_expert * layout_.max_rows + row;
  stream_row(slot + buffer_.regions.recv_x + at * layout_.row_bytes, x, layout_.row_bytes);
  if (layout_.scales.num_scales > 0 && !by_column()) {
    put_scales(layout_.scales, scales_at(dst, local_expert, row), scales_of(token));
  }
  reinterpret_cast<int32_t*>(slot + buffer_.regions.recv_src_idx)[at] = static_cast<int32_t>(token);
}

void LowLatencySend::push_token(uint32_t token, const ExpertOwners& owners, const std::vector<uint32_t>& bases) {
  bool is_cast = false;
  for (uint32_t k = 0; k < routing_.width; ++k) {
    const Hop hop = routing_.hops[size_t{token} * routing_.width + k];
    if (hop.key < 0) continue;
    const uint32_t dst = owners[hop.key];
    if (!in_view(routing_.view, dst)) continue;
    if (casts() && !is_cast) {
      cast_row_to_fp8(reinterpret_cast<const uint16_t*>(payload_.row(token)), layout_.row_bytes,
                      (args_.flags & DEEPEP_FLAG_ROUND_SCALE) != 0, (args_.flags & DEEPEP_FLAG_UE8M0) != 0, cast_row_.data(),
                      cast_scales_.data() + token * scale_bytes());
      is_cast = true;
    }
    const auto expert = static_cast<uint32_t>(hop.key);
    const uint32_t first = local_experts(options_.num_experts, options_.num_ranks, dst).first;
    push_row(token, dst, expert - first, bases[expert] + hop.index, casts() ? cast_row_.data() : payload_.row(token));
    rows_sent_ += 1;
  }
}

void LowLatencySend::push_scale_columns(const ExpertOwners& owners, const std::vector<uint32_t>& bases) {
  const TokensByKey by_key = tokens_by_key(routing_, options_, buffer_.rank);
  std::vector<const uint8_t*> from(by_key.tokens.size());
  for (size_t i = 0; i < from.size(); ++i) from[i] = scales_of(by_key.tokens[i]);
  for (uint32_t expert = 0; expert < options_.num_experts; ++expert) {
    const uint32_t dst = owners[static_cast<int32_t>(expert)];
    if (!in_view(routing_.view, dst)) continue;
    const uint32_t first = local_experts(options_.num_experts, options_.num_ranks, dst).first;
    put_scale_rows(layout_.scales, scales_at(dst, expert - first, bases[expert]), from.data() + by_key.begin[expert],
                   by_key.begin[expert + 1] - by_key.begin[expert]);
  }
}

bool LowLatencySend::send() {
  const ExpertOwners owners(options_);
  const std::vector<uint32_t> bases = row_bases(routing_, routing_.view, options_, buffer_.rank);
  if (casts()) {
    cast_row_.resize(layout_.row_bytes);
    cast_scales_.resize(state_.plan.num_tokens * scale_bytes());
  }
  for (uint32_t token = 0; token < state_.plan.num_tokens; ++token) {
    if (token % kTokensBetweenLooks == 0 && is_left_out(op_)) return false;
    push_token(token, owners, bases);
  }
  if (is_left_out(op_)) return false;
  if (layout_.scales.num_scales > 0 && by_column()) push_scale_columns(owners, bases);
  announce_pushed(op_, routing_.view, state_.slots);
  buffer_.counters.rows_sent += rows_sent_;
  buffer_.counters.bytes_sent += rows_sent_ * (layout_.row_bytes + scale_bytes());
  return true;
}

// A rank that died between its counts and its rows: the places of its rows become zeros without a source, the others stay
// where they are, because every rank has computed with them.
void forget_rows_of(Operation& op, const LowLatencySlot& state, uint32_t slot, uint32_t src) {
  Buffer& buffer = op.buffer;
  uint8_t* base = buffer.symmetric(buffer.rank) + slot_offset(buffer.regions, slot);
  const CountMatrix matrix = state.routing.matrix(buffer.options);
  const LowLatencyLayout& layout = state.layout;
  for (uint32_t local = 0; local < buffer.num_local_experts; ++local) {
    const uint64_t begin = entries_before(matrix, src, buffer.first_expert + local);
    const uint64_t end = entries_before(matrix, src + 1, buffer.first_expert + local);
    for (uint64_t row = begin; row < end; ++row) {
      const uint64_t at = region_row(buffer, local, row);
      std::memset(base + buffer.regions.recv_x + at * layout.row_bytes, 0, layout.row_bytes);
      clear_scales(layout.scales,
                   base + buffer.regions.recv_scales + local * layout.expert_stride + row * layout.scales.to.row);
      reinterpret_cast<int32_t*>(base + buffer.regions.recv_src_idx)[at] = -1;
    }
    auto* range = reinterpret_cast<int64_t*>(base + buffer.regions.layout_range);
    range[local * buffer.options.num_ranks + src] = static_cast<int64_t>(begin << 32);
  }
}

// The dispatch has failed: whoever works by the counts, without asking how it ended, finds no rows of an earlier one.
void clear_counts(Buffer& buffer, uint32_t slot) {
  uint8_t* base = buffer.symmetric(buffer.rank) + slot_offset(buffer.regions, slot);
  std::memset(base + buffer.regions.counts, 0, buffer.num_local_experts * sizeof(int32_t));
  std::memset(base + buffer.regions.layout_range, 0,
              size_t{buffer.num_local_experts} * buffer.options.num_ranks * sizeof(int64_t));
}

// The receive half.
bool receive(Operation& op, LowLatencySlot& state, uint32_t slot) {
  if (!state.routing.valid) {
    if (state.failure.code == 0) {
      fail_without_send(op);
      return false;
    }
    op.failure = state.failure;  // Every rank has found it alike.
    op.agreed = true;
    return false;
  }
  if (!inject(op, DEEPEP_PHASE_ARRIVE)) return false;
  PeerWait wait(op, 0, reinterpret_cast<int64_t*>(state.wait_stats));
  for (uint32_t src = 0; src < op.buffer.options.num_ranks; ++src) {
    if (src == op.buffer.rank || !in_view(state.routing.view, src)) continue;
    const Arrival arrival = wait_pushed(op, wait, src, slot, state.routing.view);
    if (arrival == Arrival::failed) return false;
    if (arrival == Arrival::left_out) forget_rows_of(op, state, slot, src);
  }
  return true;
}

}  // namespace

uint64_t enqueue_dispatch(Buffer& buffer, const deepep_low_latency_dispatch_args& args,
                          const std::shared_ptr<LowLatencySlot>& slot) {
  const SendJob job = {args, slot, static_cast<uint32_t>(args.slot)};
  return buffer.enqueue(DEEPEP_OP_LOW_LATENCY_DISPATCH, stream_fields(args), true, [job](Operation& op) {
    const bool both_halves = (job.args.flags & DEEPEP_FLAG_RECEIVE_HOOK) == 0;
    guarded(op, [&] {
      const bool sent = LowLatencySend(op, job).run();
      if (!sent || (both_halves && !receive(op, *job.state, job.slot))) clear_counts(op.buffer, job.slot);
    });
  });
}

void enqueue_dispatch_receive(Buffer& buffer, const deepep_receive_args& args, const std::shared_ptr<LowLatencySlot>& slot) {
  const auto index = static_cast<uint32_t>(args.slot);
  buffer.enqueue(
      DEEPEP_OP_LOW_LATENCY_DISPATCH, stream_fields(args), false,
      [slot, index](Operation& op) {
        guarded(op, [&] {
          if (!receive(op, *slot, index)) clear_counts(op.buffer, index);
        });
      },
      0, slot->dispatch_epoch);
}

}  // namespace deepep
