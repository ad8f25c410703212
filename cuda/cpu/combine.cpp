// Combine, normal mode: expert outputs are announced, then each rank pulls the rows of its tokens and reduces them.
//
// In: deepep_combine_args. Out: bf16 [num_tokens, hidden] and, if asked, the weights brought back. Phases on the communication
// stream: PUBLISH (wait until earlier readers of the region are gone, copy in, exchange messages), REDUCE (pull). The sum of a
// token is taken in a fixed order in f32, see rows.hpp. Called by the API layer. expert_output, which gives users the region
// to write into, is here too: it shares the wait for earlier readers.
#include <cstring>
#include <utility>

#include "../api/checks.hpp"
#include "../api/low_latency.hpp"
#include "../api/operations.hpp"
#include "exchange.hpp"
#include "expert_region.hpp"
#include "handle.hpp"
#include "rows.hpp"
#include "wait.hpp"

namespace deepep {
namespace {

struct CombineJob {
  deepep_combine_args args;
  RoutingPlan plan;
  std::shared_ptr<Handle> handle;
  uint32_t slot = 0;
  bool has_slot = false;  // the caller named it; otherwise it is borrowed and x must be given
};

class CombineRun {
 public:
  CombineRun(Operation& op, const CombineJob& job)
      : op_(op),
        buffer_(op.buffer),
        options_(op.buffer.options),
        job_(job),
        args_(job.args),
        routing_(job.handle->routing),
        by_expert_(job.plan.space == RowSpace::expert),
        row_bytes_(uint64_t{job.args.hidden} * 2),
        expert_weights_(reinterpret_cast<const float*>(job.args.topk_weights)) {}

  void run() {
    if (!inject(op_, DEEPEP_PHASE_PUBLISH) || !publish()) return;
    if (!inject(op_, DEEPEP_PHASE_REDUCE)) return;
    reduce();
  }

 private:
  // Where the outputs of a rank lie, as this rank reads them.
  struct Source {
    const uint8_t* rows = nullptr;  // nullptr = the rank takes no part
    uint64_t stride = 0;
    const float* weights = nullptr;
  };

  uint64_t num_rows() const;
  // Ranks of the dispatch whose rows these are: that of the slot, or where no slot is named the latest with the handle.
  uint64_t view() const {
    const Buffer::SlotRows& rows = buffer_.rows[job_.slot];
    return job_.has_slot && rows.routing == routing_.epoch ? rows.view : routing_.view;
  }
  const uint8_t* region() const {
    return buffer_.symmetric(buffer_.rank) + slot_offset(buffer_.regions, job_.slot) + buffer_.regions.expert_output;
  }
  // Whether anything is put into the slot before it is announced.
  bool copies() const {
    return (args_.x != 0 && reinterpret_cast<const uint8_t*>(args_.x) != region()) || expert_weights_ != nullptr;
  }
  void check_content();
  void copy_in();
  void copy_rows(uint64_t begin, uint64_t end, const uint8_t* x, uint8_t* region);
  Draft draft() const;
  bool publish();
  void find_sources();
  void reduce();
  void reduce_token(uint32_t token, const ExpertOwners& owners, const std::vector<uint32_t>& bases);
  void bring_weights_back(uint32_t token, uint32_t num_rows);

  Operation& op_;
  Buffer& buffer_;
  const Options& options_;
  const CombineJob& job_;
  const deepep_combine_args& args_;
  Routing& routing_;
  const bool by_expert_;
  const uint64_t row_bytes_;
  const float* expert_weights_;
  Exchange exchange_;
  std::vector<Source> sources_;  // by rank
  uint64_t rows_pulled_ = 0;

  // The rows of the token at hand.
  const uint16_t* rows_[DEEPEP_MAX_RANKS] = {};
  float row_weights_[DEEPEP_MAX_RANKS] = {};
  const float* back_[DEEPEP_MAX_RANKS] = {};  // the weights that come back with each row
  uint32_t ks_[DEEPEP_MAX_RANKS] = {};
};
static_assert(DEEPEP_MAX_TOPK <= DEEPEP_MAX_RANKS);

// Rows of this rank's expert outputs.
uint64_t CombineRun::num_rows() const {
  const CountMatrix matrix = routing_.matrix(options_, view());
  return by_expert_ ? expert_layout_rows(matrix, buffer_.rank, job_.plan.expert_alignment)
                    : tokens_before(matrix, options_.num_ranks, buffer_.rank);
}

// What can only be checked once the handle is filled.
void CombineRun::check_content() {
  if (!routing_.is(job_.plan)) {
    op_.fail({.code = DEEPEP_ERROR_INVALID_ARGUMENT, .reason = Reason::no_routing, .agreed = 1});
  } else if (args_.x == 0 && !job_.has_slot && num_rows() > 0) {
    op_.fail({.code = DEEPEP_ERROR_INVALID_ARGUMENT,
              .reason = Reason::no_rows_given,
              .agreed = 1,
              .seen = static_cast<int64_t>(num_rows())});
  } else if (copies() && args_.num_rows != 0 && num_rows() > args_.num_rows) {
    op_.fail({.code = DEEPEP_ERROR_INVALID_ARGUMENT,
              .reason = Reason::few_rows_given,
              .agreed = 1,
              .expected = static_cast<int64_t>(num_rows()),
              .seen = args_.num_rows});
  }
}

void CombineRun::copy_rows(uint64_t begin, uint64_t end, const uint8_t* x, uint8_t* region) {
  for (uint64_t row = begin; row < end; ++row) stream_row(region + row * row_bytes_, x + row * args_.x_stride, row_bytes_);
}

// Copies what the peers will pull: neither padding nor this rank's own rows, which are read where they are.
void CombineRun::copy_in() {
  const Regions& regions = buffer_.regions;
  uint8_t* slot = buffer_.symmetric(buffer_.rank) + slot_offset(regions, job_.slot);
  uint8_t* region = slot + regions.expert_output;
  const auto* x = reinterpret_cast<const uint8_t*>(args_.x);
  const CountMatrix matrix = routing_.matrix(options_, view());
  const uint32_t me = buffer_.rank;
  if (expert_weights_ != nullptr) {
    std::memcpy(slot + regions.expert_weights, expert_weights_,
                num_rows() * (by_expert_ ? 1 : job_.plan.num_topk) * sizeof(float));
  }
  if (x == nullptr || x == region) return;
  if (!by_expert_) {
    copy_rows(0, tokens_before(matrix, me, me), x, region);
    copy_rows(tokens_before(matrix, me + 1, me), num_rows(), x, region);
  } else {
    uint64_t group = 0;
    for (uint32_t e = buffer_.first_expert; e < buffer_.first_expert + buffer_.num_local_experts; ++e) {
      copy_rows(group, group + entries_before(matrix, me, e), x, region);
      copy_rows(group + entries_before(matrix, me + 1, e), group + entries_before(matrix, options_.num_ranks, e), x, region);
      group += group_rows(matrix, e, job_.plan.expert_alignment);
    }
  }
  stream_fence();  // stream_row() may have used non-temporal stores, which the message's release does not order by itself.
}

Draft CombineRun::draft() const {
  Draft draft;
  draft.agreed[kAgreedOp] = DEEPEP_OP_COMBINE;
  draft.agreed[kAgreedLayout] = static_cast<uint32_t>(job_.plan.space);
  draft.agreed[kAgreedExpertAlignment] = job_.plan.expert_alignment;
  draft.agreed[kAgreedRowBytes] = static_cast<uint32_t>(row_bytes_);
  draft.agreed[kAgreedNumTopk] = job_.plan.num_topk;
  const bool has_rows = job_.plan.num_tokens > 0 || (routing_.is(job_.plan) && num_rows() > 0);
  draft.agreed[kAgreedTopkWeights] = expert_weights_ != nullptr ? 1 : has_rows ? 0 : kNoOpinion;
  draft.agreed[kAgreedRouting] = static_cast<uint32_t>(routing_.epoch);
  draft.slot = job_.slot;
  return draft;
}

bool CombineRun::publish() {
  PeerWait wait(op_, 1);
  check_content();  // A refusal stays in op_.failure: exchange() passes it on.
  if (op_.failure.code == 0) {
    if (!wait_for_readers(op_, job_.slot, wait)) return false;
    begin_reading(op_, job_.slot, ~uint64_t{0});
    copy_in();
  }
  PeerWait for_messages = wait.again();
  if (exchange(op_, draft(), for_messages, exchange_)) return true;
  if (op_.agreed) forget_readers(op_, job_.slot);
  return false;
}

void CombineRun::find_sources() {
  const Regions& regions = buffer_.regions;
  sources_.resize(options_.num_ranks);
  for (uint32_t rank = 0; rank < options_.num_ranks; ++rank) {
    if (!in_view(exchange_.view, rank) || !in_view(view(), rank)) continue;
    const uint8_t* slot = buffer_.symmetric(rank) + slot_offset(regions, exchange_.sender(rank).slot);
    sources_[rank] = {slot + regions.expert_output, row_bytes_, reinterpret_cast<const float*>(slot + regions.expert_weights)};
  }
  Source& own = sources_[buffer_.rank];
  if (args_.x != 0) own.rows = reinterpret_cast<const uint8_t*>(args_.x), own.stride = args_.x_stride;
}

void CombineRun::bring_weights_back(uint32_t token, uint32_t num_rows) {
  const uint32_t num_topk = job_.plan.num_topk;
  float* out = reinterpret_cast<float*>(args_.out_topk_weights) + size_t{token} * num_topk;
  std::memset(out, 0, num_topk * sizeof(float));
  if (by_expert_) {
    for (uint32_t i = 0; i < num_rows; ++i) out[ks_[i]] = *back_[i];
    return;
  }
  for (uint32_t k = 0; k < num_topk; ++k) {
    if (routing_.experts[size_t{token} * num_topk + k] < 0) continue;
    for (uint32_t i = 0; i < num_rows; ++i) out[k] = out[k] + back_[i][k];
  }
}

void CombineRun::reduce_token(uint32_t token, const ExpertOwners& owners, const std::vector<uint32_t>& bases) {
  const auto* weights = reinterpret_cast<const float*>(args_.weights);
  const uint64_t weights_a_row = by_expert_ ? 1 : job_.plan.num_topk;
  uint32_t count = 0;
  for (uint32_t i = 0; i < routing_.width; ++i) {
    const Hop hop = routing_.hops[size_t{token} * routing_.width + i];
    if (hop.key < 0) continue;
    const Source& source = sources_[by_expert_ ? owners[hop.key] : static_cast<uint32_t>(hop.key)];
    if (source.rows == nullptr) continue;
    const uint64_t row = bases[static_cast<size_t>(hop.key)] + hop.index;
    rows_[count] = reinterpret_cast<const uint16_t*>(source.rows + row * source.stride);
    if (weights != nullptr) row_weights_[count] = weights[size_t{token} * job_.plan.num_topk + i];
    back_[count] = source.weights + row * weights_a_row;
    ks_[count] = i;
    count += 1;
  }
  const uint64_t at = uint64_t{token} * args_.hidden;
  const auto* bias_0 = reinterpret_cast<const uint16_t*>(args_.bias_0);
  const auto* bias_1 = reinterpret_cast<const uint16_t*>(args_.bias_1);
  reduce_rows({.rows = rows_,
               .weights = weights != nullptr ? row_weights_ : nullptr,
               .num_rows = count,
               .hidden = args_.hidden,
               .bias_0 = bias_0 != nullptr ? bias_0 + at : nullptr,
               .bias_1 = bias_1 != nullptr ? bias_1 + at : nullptr,
               .out = reinterpret_cast<uint16_t*>(args_.out) + at});
  if (expert_weights_ != nullptr) bring_weights_back(token, count);
  rows_pulled_ += count;
}

void CombineRun::reduce() {
  find_sources();
  const ExpertOwners owners(options_);
  const std::vector<uint32_t> bases = row_bases(routing_, view(), options_, buffer_.rank);
  for (uint32_t token = 0; token < job_.plan.num_tokens; ++token) reduce_token(token, owners, bases);
  if (is_overtaken(op_)) return;
  for (uint32_t rank = 0; rank < options_.num_ranks; ++rank) {
    if (in_view(exchange_.view, rank)) end_reading(op_, rank, exchange_.sender(rank).slot);
  }
  buffer_.counters.rows_pulled += rows_pulled_;
}

}  // namespace

void combine(Buffer& buffer, const deepep_combine_args& args) {
  CombineJob job;
  job.handle = find_handle(buffer, args.handle);
  job.plan = job.handle->plan;
  check_combine(buffer, args, job.plan);
  job.args = args;
  job.has_slot = args.slot != -1;
  if (job.has_slot) {
    check_no_pending_combine(buffer, args.slot);
    check_expert_rows(buffer, static_cast<uint32_t>(args.slot), args.x, args.x_stride, uint64_t{args.hidden} * 2);
  }
  const int32_t borrowed = job.has_slot ? -1 : buffer.slots.take(-1, stream_before(args));
  job.slot = static_cast<uint32_t>(job.has_slot ? args.slot : borrowed);
  buffer.enqueue(
      DEEPEP_OP_COMBINE, stream_fields(args), true,
      [job = std::move(job)](Operation& op) { guarded(op, [&] { CombineRun(op, job).run(); }); }, 0, 0,
      borrowed);
}

void expert_output(Buffer& buffer, deepep_expert_output_args& args) {
  check_no_pending_combine(buffer, args.slot);
  const auto slot = static_cast<uint32_t>(args.slot);
  buffer.enqueue(DEEPEP_OP_EXPERT_OUTPUT, stream_fields(args), false, [slot](Operation& op) {
    if (!inject(op, DEEPEP_PHASE_PUBLISH)) return;
    PeerWait wait(op, 1);
    wait_for_readers(op, slot, wait);
  });
  args.address = reinterpret_cast<uint64_t>(buffer.symmetric(buffer.rank) + slot_offset(buffer.regions, slot) +
                                            buffer.regions.expert_output);
  args.bytes = buffer.regions.expert_output_bytes;
}

}  // namespace deepep
