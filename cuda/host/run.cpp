// How a buffer runs operations: Buffer::enqueue, and in a capture what stands for it. How their ends are noted is in reap.cpp.
//
// In: an API call that was checked. Out: waits, one kernel, and what waits for it, on streams of CUDA; about five microseconds
// of the caller's time. Nothing is allocated on the device, and nothing waited for.

#include "../api/registry.hpp"
#include "../kernels/launch.hpp"
#include "buffer.hpp"
#include "graph.hpp"
#include "watchdog.hpp"

namespace deepep {
namespace {

// Whether what deepep_inject wants in a phase is for this part of a call.
bool enters(Halves halves, int32_t phase) {
  const bool receives = phase == DEEPEP_PHASE_ARRIVE || phase == DEEPEP_PHASE_REDUCE;
  return halves == Halves::both || halves == (receives ? Halves::receive : Halves::send);
}

}  // namespace

CaptureId Buffer::present_capture() {
  if (capture_ != 0) capture_ = capture_of(comm_);
  return capture_;
}

void Buffer::keep_for_capture(std::shared_ptr<void> needs) {
  if (!needs) return;
  if (capturing)
    capturing->needs.push_back(std::move(needs));
  else
    kept_for_good_.push_back(std::move(needs));
}

void Buffer::order(cudaStream_t before, cudaStream_t after, CaptureId capture) {
  DEEPEP_CUDA("order streams", cudaEventRecord(order_event_, before));
  DEEPEP_CUDA("order streams", cudaStreamWaitEvent(after, order_event_, 0));
  if (capture != 0) drop_passed(after);
}

void Buffer::follow(cudaStream_t next) {
  if (last_ == next) return;
  if (last_ == comm_)
    order(comm_, next, 0);
  else
    last_end_->make_wait(next, 0);
}

void Buffer::settle() {
  follow(comm_);
  last_ = comm_;
}

bool Buffer::is_own(cudaStream_t stream) const {
  for (const cudaStream_t own : streams_) {
    if (own == stream) return true;
  }
  return false;
}

void Buffer::wait_for(const std::shared_ptr<Record>& record, cudaStream_t stream, CaptureId capture) {
  if (record->make_wait(stream, capture)) keep_for_capture(record);
}

// The capture that the operation becomes part of, or 0; rejects what cannot be captured.
CaptureId Buffer::check_capture(const StreamFields& fields, const Enqueued& what, cudaStream_t stream) {
  const CaptureId own = present_capture();
  const CaptureId theirs = stream ? capture_of(stream) : own;
  if (own != 0 && own != theirs) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "the buffer's calls are being captured, but stream 0x%llx takes no part in it",
           static_cast<unsigned long long>(fields.stream));
  }
  if (what.halves == Halves::receive && theirs != what.send_capture) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "its send half %s captured: both halves are part of the same graph, or of none",
           what.send_capture != 0 ? "was" : "was not");
  }
  if (theirs == 0) return 0;
  if (fields.done_id != 0 || what.counts_id != 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "a captured call has no %s: a replay completes none",
           fields.done_id != 0 ? "done_id" : "counts_id");
  }
  if (what.op == DEEPEP_OP_DISPATCH && (fields.flags & DEEPEP_FLAG_NO_CPU_SYNC) == 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "a captured dispatch needs NO_CPU_SYNC: a replay gives the host no counts");
  }
  if (what.borrowed_slot >= 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT,
           "a captured call must name its slot, which must stay held while the graph is replayed");
  }
  return theirs;
}

CallParams Buffer::call_params(const StreamFields& fields, const Enqueued& what, CaptureId capture) {
  CallParams call = call_;
  call.op = what.op;
  call.seq = capture == 0 ? seq_ + 1 : 0;
  call.lost = std::atomic_ref<uint64_t>(host_->lost).load(std::memory_order_relaxed);
  // A launch that has more to agree on says more, and makes agreed_hash of it all.
  call.agreed[kAgreedOp] = static_cast<uint32_t>(what.op);
  call.agreed[kAgreedMaskOnTimeout] = call.mask_on_timeout;
  call.timeout_ns = fields.timeout_ms ? uint64_t{fields.timeout_ms} * 1'000'000 : timeout_ns;
  for (int32_t phase = DEEPEP_PHASE_NOTIFY; phase <= DEEPEP_PHASE_REDUCE; ++phase) {
    deepep_inject_args injection;
    if (!enters(what.halves, phase) || !injections.take(what.op, phase, injection)) continue;
    Injection& wanted = call.inject[phase];
    wanted.wanted = 1 + injection.action;
    if (injection.action == DEEPEP_INJECT_DELAY) wanted.ns = uint64_t{injection.delay_us} * 1000;
    // Half as long again as the deadline, so that the peers' own deadlines, which began later, have passed too.
    if (injection.action == DEEPEP_INJECT_STALL) wanted.ns = call.timeout_ns + call.timeout_ns / 2;
  }
  return call;
}

uint64_t Buffer::enqueue(const StreamFields& fields, Enqueued what, const Launch& launch) {
  if (needs_peers(what.op)) check_good();
  check_id(fields.done_id, "done_id");
  check_id(what.counts_id, "counts_id");
  std::shared_ptr<Event> event;
  if (fields.event) event = find<Event>(Kind::event, fields.event, "event");
  std::shared_ptr<Record> previous;
  if (fields.previous_event) previous = find<Event>(Kind::event, fields.previous_event, "previous_event")->latest();
  cudaStream_t stream = stream_of(fields.stream, "stream");
  if (stream == comm_) stream = nullptr;  // It is in order with itself.
  const CaptureId capture = check_capture(fields, what, stream);
  if (capture == 0 && pending_.size() >= kMostPending) {
    reject(DEEPEP_ERROR_OUT_OF_MEMORY, "%zu operations of the buffer have not ended yet: it has no room for one more",
           pending_.size());
  }
  if (previous) previous->check_capture(capture);
  std::shared_ptr<Record> record;
  if (event || fields.done_id != 0) record = std::make_shared<Record>(device->index);

  // The caller's own stream does where it would wait for the operation anyway: then no stream waits for another, which costs
  // the host two calls and the device several microseconds each time.
  const bool waits = stream && (fields.flags & DEEPEP_FLAG_ASYNC_FINISH) == 0;
  const bool direct = waits && capture == 0 && !fields.previous_event && is_own(stream);
  const cudaStream_t where = direct ? stream : comm_;
  // What is enqueued on the stream later must not hold up the next operation, so the end of this one is marked there. Made
  // now: once the operation runs nothing may fail.
  std::shared_ptr<Record> end = direct && !record ? std::make_shared<Record>(device->index) : record;
  if (direct)
    follow(where);  // Should this call be rejected yet, the last operation is still the one before.
  else
    settle();
  // A capture is joined by a wait for its stream, whatever else is waited for.
  if (!direct && stream && (!fields.previous_event || capture != capture_)) order(stream, comm_, capture);
  if (capture != 0) capture_ = capture, is_captured_ = true;
  if (previous) wait_for(previous, where, capture);
  for (const int32_t slot : slots.taken()) {
    const auto& reusable = slots[static_cast<size_t>(slot)].reusable;
    if (reusable) wait_for(reusable, where, capture);
  }

  const bool collective = what.collective;
  const int32_t op = what.op, borrowed = what.borrowed_slot;
  const CallParams call = call_params(fields, what, capture);
  if (capture == 0) {
    // Before the launch, since it may fail for want of memory, and an operation that runs must be known.
    pending_.push_back({.seq = call.seq,
                        .op = op,
                        .collective = collective,
                        .done_id = fields.done_id,
                        .counts_id = what.counts_id,
                        .counts_slot = what.counts_slot,
                        .record = record,
                        .needs = std::move(what.needs)});
  } else {
    keep_for_capture(std::move(what.needs));
  }
  const Place place = {where, capture == 0 && launches_early};
  if (const cudaError_t error = launch(call, place); error != cudaSuccess) {
    if (capture == 0) pending_.pop_back();
    reject_cuda(error, "launch the kernel");
  }
  if (capture == 0) {
    seq_ = call.seq;
    if (collective) epoch_ += 1;
    note_pending();
  } else if (capturing) {
    capturing->num_collective += collective ? 1 : 0;
    capturing->needs_peers |= needs_peers(op);
  }
  // Of a captured call that of its first replay, at least.
  const uint64_t epoch = shown_epoch() + (capture != 0 && collective ? 1 : 0);
  slots.hold_taken(op, epoch, borrowed, capture);
  if (record) {
    record->belong_to_operation();
    record->mark(where, capture);
    if (event) event->set(record);
  }
  if (waits && !direct) {
    if (record)
      record->make_wait(stream, capture);
    else
      order(comm_, stream, capture);
  }
  if (direct) {
    if (!record) end->mark(where, 0);
    last_end_ = std::move(end);
    last_ = where;
  }
  watchdog_wake();
  return epoch;
}

void Buffer::update(UpdateParams params) {
  if (present_capture() != 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "the buffer's calls are being captured");
  params.call = call_;
  params.call.lost = std::atomic_ref<uint64_t>(host_->lost).load(std::memory_order_relaxed);
  settle();
  auto record = std::make_shared<Record>(device->index);
  if (const cudaError_t error = launch_update(params, comm_); error != cudaSuccess) reject_cuda(error, "launch the kernel");
  record->mark(comm_, 0);
  updated_ = std::move(record);
}

Plan Buffer::plan(Work work) const {
  if (work.num_sms < 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "num_sms is %d, at least 0", work.num_sms);
  if (work.num_sms == 0) work.num_sms = wanted_sms;
  const Plan plan = make_plan(work, topology);
  check_sms(plan.sms);
  if (plan.stages == 0) {
    reject(DEEPEP_ERROR_UNSUPPORTED, "rows of %u channels are too long for a combine to cast them to FP8: %u at most",
           work.row_bytes / 2, kMaxWarps * kPieceUnits * kUnitBytes / 2);
  }
  if (plan.block_bytes > 0 && plan.block_bytes + kReservedShared > topology.shared_bytes) {
    reject(DEEPEP_ERROR_UNSUPPORTED, "%u experts and %u of them a token take %u bytes of shared memory a block, and %s has %u",
           work.num_experts, work.hops, plan.block_bytes + kReservedShared, device_name(*device).c_str(),
           topology.shared_bytes);
  }
  return plan;
}

int32_t Buffer::sms(int32_t asked) const {
  if (asked < 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "num_sms is %d, at least 0", asked);
  const int32_t wanted = asked > 0 ? asked : default_sms;
  check_sms(wanted);
  return wanted;
}

// Blocks of an operation wait for each other and for other ranks' blocks: all must run at once.
void Buffer::check_sms(int32_t wanted) const {
  const auto all = static_cast<long long>(wanted) * topology.ranks_on_device;
  if (wanted <= static_cast<int32_t>(kMaxBlocks) && all <= topology.device_sms) return;
  reject(DEEPEP_ERROR_INVALID_ARGUMENT,
         "%u ranks on the device * %d multiprocessors = %lld, but %s has %d: their kernels could not run at once",
         topology.ranks_on_device, wanted, all, device_name(*device).c_str(), topology.device_sms);
}

}  // namespace deepep
