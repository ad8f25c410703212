// A dispatch at work; see dispatch_run.hpp. Phases: NOTIFY (count, exchange, check), SEND (push), ARRIVE (wait for everyone's
// pushes). protocol.hpp says why two synchronisations suffice.
#include "dispatch_run.hpp"

#include <cstring>
#include <optional>
#include <vector>

#include "exchange.hpp"
#include "layout.hpp"
#include "payload.hpp"
#include "pushed.hpp"
#include "rows.hpp"
#include "scales.hpp"
#include "wait.hpp"

namespace deepep {
namespace {

constexpr uint32_t kTokensBetweenLooks = 16;  // tokens pushed between two looks at whether a peer left this rank out

SlotView slot_of(const Buffer& buffer, uint32_t rank, uint32_t slot) {
  return slot_view(buffer.regions, buffer.symmetric(rank) + slot_offset(buffer.regions, slot));
}

// A run of rows.
struct RowRange {
  uint64_t begin = 0;
  uint64_t end = 0;
};

class DispatchRun {
 public:
  DispatchRun(Operation& op, const DispatchJob& job)
      : op_(op),
        buffer_(op.buffer),
        options_(op.buffer.options),
        job_(job),
        args_(job.args),
        plan_(job.plan),
        routing_(job.handle ? job.handle->routing : own_routing_),
        payload_(payload_of(job.args)),
        scale_copy_({payload_.num_scales, payload_.scale_elem_bytes,
                     {job.args.recv_scales_row_stride, job.args.recv_scales_elem_stride}, payload_.scales_elem_stride}),
        weights_(reinterpret_cast<const float*>(job.args.topk_weights)),
        here_(slot_of(op.buffer, op.buffer.rank, job.slot)) {}

  void run() {
    if (!inject(op_, DEEPEP_PHASE_NOTIFY) || !notify()) return no_rows();
    if (!inject(op_, DEEPEP_PHASE_SEND) || !send()) return;
    if (!inject(op_, DEEPEP_PHASE_ARRIVE) || !arrive()) return;
    routing_.valid = true;
  }

 private:
  bool notify();
  void route(Counts& counts);
  Draft draft(const Counts& counts) const;
  bool check_capacity();
  void fill_counts();
  void no_rows();
  bool send();
  void push_token(uint32_t token);
  void push_row(uint32_t token, uint32_t k, const SlotView& to, uint32_t dst, uint32_t row);
  void push_scale_columns();
  void put_topk(const SlotView& to, uint32_t dst, uint32_t row, uint32_t token);
  void put_index(uint8_t* topk_idx, uint64_t i, int64_t value) const;
  void clear_rows(RowRange rows, bool payload_too);
  void clear_padding();
  bool arrive();
  void forget_rows_of(uint32_t src);
  bool by_column() const { return (args_.flags & DEEPEP_FLAG_SCALES_COLUMN_MAJOR) != 0; }
  bool by_expert() const { return plan_.space == RowSpace::expert; }

  Operation& op_;
  Buffer& buffer_;
  const Options& options_;
  const DispatchJob& job_;
  const deepep_dispatch_args& args_;
  const RoutingPlan& plan_;
  Routing own_routing_;
  Routing& routing_;
  const Payload payload_;
  const ScaleCopy scale_copy_;
  const float* weights_;
  const SlotView here_;
  PeerSlots slots_{};
  std::vector<uint32_t> bases_;
  std::vector<SlotView> there_;  // by rank
  std::optional<ExpertOwners> owners_;
  uint64_t rows_sent_ = 0;
};

// Counts this rank's tokens, or takes the routing of the handle.
void DispatchRun::route(Counts& counts) {
  if (job_.cached) {
    if (!routing_.is(plan_)) op_.fail({.code = DEEPEP_ERROR_INVALID_ARGUMENT, .reason = Reason::no_routing, .agreed = 1});
    return;
  }
  routing_.valid = false;
  routing_.plan = plan_;
  routing_.epoch = op_.epoch;
  if (plan_.num_topk > 0) {
    count_topk(op_, {reinterpret_cast<const void*>(args_.topk_idx), plan_.topk_idx_bytes, plan_.num_topk}, plan_.num_tokens,
               counts, &routing_);
  } else {
    count_tokens_in_rank(op_, reinterpret_cast<const uint8_t*>(args_.is_token_in_rank),
                         reinterpret_cast<const int32_t*>(args_.num_tokens_per_expert), plan_.num_tokens, counts, routing_);
  }
}

Draft DispatchRun::draft(const Counts& counts) const {
  Draft draft;
  draft.agreed[kAgreedOp] = DEEPEP_OP_DISPATCH;
  draft.agreed[kAgreedLayout] = static_cast<uint32_t>(plan_.space);
  draft.agreed[kAgreedExpertAlignment] = plan_.expert_alignment;
  draft.agreed[kAgreedRowBytes] = payload_.row_bytes;
  draft.agreed[kAgreedNumScales] = payload_.num_scales;
  draft.agreed[kAgreedScaleElemBytes] = payload_.scale_elem_bytes;
  draft.agreed[kAgreedNumTopk] = plan_.num_topk;
  draft.agreed[kAgreedTopkIdxBytes] = plan_.num_topk > 0 ? plan_.topk_idx_bytes : 0;
  draft.agreed[kAgreedTopkWeights] = weights_ != nullptr ? 1 : plan_.num_tokens == 0 ? kNoOpinion : 0;
  draft.agreed[kAgreedCached] = job_.cached ? 1 : 0;
  draft.agreed[kAgreedFlags] = args_.flags & DEEPEP_FLAG_SCALES_COLUMN_MAJOR;
  draft.agreed[kAgreedRouting] = job_.cached ? static_cast<uint32_t>(routing_.epoch) : 0;
  draft.slot = job_.slot;
  draft.pushes = true;
  if (!job_.cached && op_.failure.code == 0) {
    draft.tokens_per_rank = counts.tokens.data();
    draft.entries_per_expert = counts.entries.data();
  }
  return draft;
}

// Every rank has the whole matrix, so every rank fails alike, before a row has moved.
bool DispatchRun::check_capacity() {
  const CountMatrix matrix = routing_.matrix(options_);
  for (uint32_t dst = 0; dst < options_.num_ranks; ++dst) {
    if (!in_view(routing_.view, dst)) continue;
    const uint64_t need = by_expert() ? expert_layout_rows(matrix, dst, plan_.expert_alignment)
                                      : tokens_before(matrix, options_.num_ranks, dst);
    if (need <= options_.max_recv_tokens) continue;
    op_.fail({.code = DEEPEP_ERROR_CAPACITY,
              .peer = static_cast<int32_t>(dst),
              .reason = Reason::capacity,
              .agreed = 1,
              .expected = options_.max_recv_tokens,
              .seen = static_cast<int64_t>(need)});
    return false;
  }
  return true;
}

// Device counts and host counts are one array here.
void DispatchRun::fill_counts() {
  const CountMatrix matrix = routing_.matrix(options_);
  auto* counts = reinterpret_cast<int32_t*>(args_.recv_num_rows);
  auto* per_expert = reinterpret_cast<int32_t*>(args_.recv_num_tokens_per_expert);
  auto* per_rank = reinterpret_cast<int32_t*>(args_.recv_num_tokens_per_rank);
  auto* stats = reinterpret_cast<int32_t*>(args_.expert_stats);
  counts[0] = static_cast<int32_t>(tokens_before(matrix, options_.num_ranks, buffer_.rank));
  counts[1] = by_expert() ? static_cast<int32_t>(expert_layout_rows(matrix, buffer_.rank, plan_.expert_alignment)) : counts[0];
  for (uint32_t e = 0; e < buffer_.num_local_experts; ++e) {
    const uint32_t entries = entries_before(matrix, options_.num_ranks, buffer_.first_expert + e);
    per_expert[e] = static_cast<int32_t>(align_up(entries, plan_.expert_alignment));
    if (stats != nullptr) stats[e] += static_cast<int32_t>(entries);
  }
  for (uint32_t src = 0; src < options_.num_ranks; ++src) {
    const bool came = in_view(routing_.view, src);
    per_rank[src] = came ? static_cast<int32_t>(routing_.tokens[size_t{src} * options_.num_ranks + buffer_.rank]) : 0;
  }
  op_.counts_ready();
}

// Nothing came: whoever works by the device's counts, without asking how the call ended, finds no rows of an earlier one.
void DispatchRun::no_rows() {
  const size_t num_counts = 2 + buffer_.num_local_experts + options_.num_ranks;
  std::memset(reinterpret_cast<void*>(args_.recv_num_rows), 0, num_counts * sizeof(int32_t));
}

bool DispatchRun::notify() {
  Counts counts;
  route(counts);  // A refusal stays in op_.failure: exchange() passes it on.
  PeerWait wait(op_, 0);
  Exchange exchanged;
  if (!exchange(op_, draft(counts), wait, exchanged)) return false;
  slots_ = slots_of(exchanged);
  if (job_.cached) routing_.view = exchanged.view;
  else keep_counts(exchanged, options_, routing_);
  buffer_.rows[job_.slot] = {routing_.view, job_.cached ? routing_.epoch : op_.epoch};
  if (!check_capacity()) return false;
  fill_counts();
  return true;
}

// -1 source index and no weight in rows that nobody fills; with `payload_too` zeros in x and scales.
void DispatchRun::clear_rows(RowRange rows, bool payload_too) {
  const uint64_t weights_a_row = by_expert() ? 1 : plan_.num_topk;
  for (uint64_t row = rows.begin; row < rows.end; ++row) {
    here_.src_idx[row] = -1;
    for (uint64_t k = 0; !by_expert() && k < plan_.num_topk; ++k) put_index(here_.topk_idx, row * plan_.num_topk + k, -1);
    if (args_.recv_topk_weights != 0) {
      std::memset(here_.topk_weights + row * weights_a_row, 0, weights_a_row * sizeof(float));
    }
    if (!payload_too) continue;
    std::memset(here_.x + row * payload_.row_bytes, 0, payload_.row_bytes);
    clear_scales(scale_copy_, here_.scales + row * scale_copy_.to.row);
  }
}

// The rows of this rank's slot that no rank pushes to.
void DispatchRun::clear_padding() {
  if (by_expert()) {
    const CountMatrix matrix = routing_.matrix(options_);
    uint64_t group = 0;
    for (uint32_t e = 0; e < buffer_.num_local_experts; ++e) {
      const uint64_t entries = entries_before(matrix, options_.num_ranks, buffer_.first_expert + e);
      const uint64_t end = group + align_up(entries, plan_.expert_alignment);
      clear_rows({group + entries, end}, (args_.flags & DEEPEP_FLAG_ZERO_PADDING) != 0);
      group = end;
    }
  } else if ((args_.flags & DEEPEP_FLAG_NO_CPU_SYNC) != 0 && plan_.num_topk > 0) {
    // -1 is all ones in either width.
    const uint64_t used = tokens_before(routing_.matrix(options_), options_.num_ranks, buffer_.rank);
    const uint64_t row_bytes = uint64_t{plan_.num_topk} * plan_.topk_idx_bytes;
    std::memset(here_.topk_idx + used * row_bytes, 0xff, (options_.max_recv_tokens - used) * row_bytes);
  }
}

void DispatchRun::put_index(uint8_t* topk_idx, uint64_t i, int64_t value) const {
  if (plan_.topk_idx_bytes == 4) reinterpret_cast<int32_t*>(topk_idx)[i] = static_cast<int32_t>(value);
  else reinterpret_cast<int64_t*>(topk_idx)[i] = value;
}

// Rank layout: the token's entries as rank `dst` sees them.
void DispatchRun::put_topk(const SlotView& to, uint32_t dst, uint32_t row, uint32_t token) {
  const auto first = static_cast<int32_t>(local_experts(options_.num_experts, options_.num_ranks, dst).first);
  for (uint32_t k = 0; k < plan_.num_topk; ++k) {
    const int32_t expert = routing_.experts[size_t{token} * plan_.num_topk + k];
    const bool here = expert >= 0 && (*owners_)[expert] == dst;
    const uint64_t i = uint64_t{row} * plan_.num_topk + k;
    put_index(to.topk_idx, i, here ? expert - first : -1);
    if (weights_ != nullptr) to.topk_weights[i] = here ? weights_[size_t{token} * plan_.num_topk + k] : 0.0f;
  }
}

void DispatchRun::push_row(uint32_t token, uint32_t k, const SlotView& to, uint32_t dst, uint32_t row) {
  stream_row(to.x + uint64_t{row} * payload_.row_bytes, payload_.row(token), payload_.row_bytes);
  if (payload_.num_scales > 0 && !by_column()) {
    put_scales(scale_copy_, to.scales + row * scale_copy_.to.row, payload_.scales_of(token));
  }
  to.src_idx[row] = static_cast<int32_t>(buffer_.rank * options_.max_tokens_per_rank + token);
  if (!by_expert()) put_topk(to, dst, row, token);
  else if (weights_ != nullptr) to.topk_weights[row] = weights_[size_t{token} * plan_.num_topk + k];
}

// The row is read from memory for the first destination and from the cache for the others.
void DispatchRun::push_token(uint32_t token) {
  for (uint32_t i = 0; i < routing_.width; ++i) {
    const Hop hop = routing_.hops[size_t{token} * routing_.width + i];
    if (hop.key < 0) continue;
    const uint32_t dst = by_expert() ? (*owners_)[hop.key] : static_cast<uint32_t>(hop.key);
    if (!in_view(routing_.view, dst)) continue;
    push_row(token, i, there_[dst], dst, bases_[static_cast<size_t>(hop.key)] + hop.index);
    rows_sent_ += 1;
  }
}

// The scales of all rows, for the ranks in the view.
void DispatchRun::push_scale_columns() {
  const TokensByKey by_key = tokens_by_key(routing_, options_, buffer_.rank);
  std::vector<const uint8_t*> from(by_key.tokens.size());
  for (size_t i = 0; i < from.size(); ++i) from[i] = payload_.scales_of(by_key.tokens[i]);
  for (uint32_t key = 0; key + 1 < by_key.begin.size(); ++key) {
    const uint32_t dst = by_expert() ? (*owners_)[static_cast<int32_t>(key)] : key;
    if (!in_view(routing_.view, dst)) continue;
    put_scale_rows(scale_copy_, there_[dst].scales + bases_[key] * scale_copy_.to.row, from.data() + by_key.begin[key],
                   by_key.begin[key + 1] - by_key.begin[key]);
  }
}

bool DispatchRun::send() {
  owners_.emplace(options_);
  bases_ = row_bases(routing_, routing_.view, options_, buffer_.rank);
  for (uint32_t dst = 0; dst < options_.num_ranks; ++dst) there_.push_back(slot_of(buffer_, dst, slots_[dst]));
  clear_padding();
  for (uint32_t token = 0; token < plan_.num_tokens; ++token) {
    if (token % kTokensBetweenLooks == 0 && is_left_out(op_)) return false;
    push_token(token);
  }
  if (is_left_out(op_)) return false;
  if (payload_.num_scales > 0 && by_column()) push_scale_columns();
  announce_pushed(op_, routing_.view, slots_);
  const uint64_t scale_bytes = uint64_t{payload_.num_scales} * payload_.scale_elem_bytes;
  buffer_.counters.rows_sent += rows_sent_;
  buffer_.counters.bytes_sent += rows_sent_ * (payload_.row_bytes + scale_bytes);
  return true;
}

// A rank that died between its counts and its rows: the places of its rows become padding, the others stay where they are,
// because every rank has computed with them.
void DispatchRun::forget_rows_of(uint32_t src) {
  const CountMatrix matrix = routing_.matrix(options_);
  if (by_expert()) {
    uint64_t group = 0;
    for (uint32_t e = buffer_.first_expert; e < buffer_.first_expert + buffer_.num_local_experts; ++e) {
      clear_rows({group + entries_before(matrix, src, e), group + entries_before(matrix, src + 1, e)}, true);
      group += group_rows(matrix, e, plan_.expert_alignment);
    }
  } else {
    clear_rows({tokens_before(matrix, src, buffer_.rank), tokens_before(matrix, src + 1, buffer_.rank)}, true);
  }
  // The host may be reading the counts, which were handed out before.
  auto* per_rank = reinterpret_cast<int32_t*>(args_.recv_num_tokens_per_rank);
  std::atomic_ref<int32_t>(per_rank[src]).store(0, std::memory_order_relaxed);
}

bool DispatchRun::arrive() {
  PeerWait wait(op_, 0);
  for (uint32_t src = 0; src < options_.num_ranks; ++src) {
    if (src == buffer_.rank || !in_view(routing_.view, src)) continue;
    const Arrival arrival = wait_pushed(op_, wait, src, job_.slot, routing_.view);
    if (arrival == Arrival::failed) return false;
    if (arrival == Arrival::left_out) forget_rows_of(src);
  }
  return true;
}

}  // namespace

void run_dispatch(Operation& op, const DispatchJob& job) { DispatchRun(op, job).run(); }

}  // namespace deepep
