// How a buffer runs operations: see Buffer::enqueue in buffer.hpp.
//
// In: an API call that was checked. Out: one task on the communication stream, which waits for what must come before, works,
// and then, in this order: keeps the failure, marks the buffer, completes the record (events), and queues the ids. So whoever
// sees a completion finds everything else done.

#include <new>
#include <utility>

#include "buffer.hpp"
#include "../api/registry.hpp"

namespace deepep {
namespace {

// Counting a routing touches no peer, so it goes on when the buffer has failed.
bool needs_peers(int32_t op) { return op != DEEPEP_OP_LAYOUT; }

void set_failure(Operation& op, int32_t code, const char* words) {
  op.failure = {};
  op.failure.code = code;
  set_message(op.failure, "Cannot finish %s: %s", op_name(op.op), words);
}

}  // namespace

void Operation::fail(Finding finding) {
  finding.op = op;
  finding.epoch = epoch;
  finding.phase = phase;
  failure = describe(finding, buffer.rank);
  agreed = finding.agreed != 0;
}

void Operation::counts_ready() {
  if (counts_id != 0) buffer.complete(counts_id, DEEPEP_OK);
  counts_id = 0;
}

uint64_t Buffer::enqueue(int32_t op_kind, const StreamFields& fields, bool collective, std::function<void(Operation&)> work,
                         uint64_t counts_id, uint64_t epoch_of_send, int32_t borrowed_slot) {
  check_usable();
  if (failed && needs_peers(op_kind)) {
    Rejected rejected{needs_recovery(first_failure_, rank)};
    throw rejected;
  }
  check_id(fields.done_id, "done_id");
  check_id(counts_id, "counts_id");
  std::shared_ptr<Event> event;
  if (fields.event) event = find<Event>(Kind::event, fields.event, "event");
  std::shared_ptr<Stream> stream;
  if (fields.stream) stream = find<Stream>(Kind::stream, fields.stream, "stream");
  if (stream && stream->closed()) reject(DEEPEP_ERROR_CLOSED, "the stream was destroyed");
  if (stream == comm_) stream = nullptr;  // It is in order with itself.

  std::vector<std::shared_ptr<Record>> waits;
  if (fields.previous_event) {
    waits.push_back(find<Event>(Kind::event, fields.previous_event, "previous_event")->latest());
  } else if (stream) {
    waits.push_back(stream->record());
  }
  for (const int32_t slot : slots.taken()) waits.push_back(slots[static_cast<size_t>(slot)].reusable);

  const uint64_t this_epoch = collective ? epoch + 1 : epoch_of_send;
  Operation op = {.buffer = *this,
                  .op = op_kind,
                  .epoch = this_epoch,
                  .timeout_ns = fields.timeout_ms ? uint64_t{fields.timeout_ms} * 1'000'000 : timeout_ns,
                  .flags = fields.flags,
                  .done_id = fields.done_id,
                  .counts_id = counts_id,
                  .generation = generation,
                  .failure = {}};
  auto record = std::make_shared<Record>();
  record->ends_on = comm_.get();
  record->nth = ++num_records_;
  const bool pushed = comm_->push(
      [this, op = std::move(op), work = std::move(work), waits = std::move(waits), record]() mutable {
        // Pairs with the caller's stream, its event, or the releaser of a slot: each completes by itself (stream.hpp).
        for (const auto& wait : waits) {
          if (wait) wait->wait();
        }
        run(op, work);
        work = nullptr;  // What it holds goes before anybody is told that the operation has ended.
        finish(op, *record);
      });
  if (!pushed) reject(DEEPEP_ERROR_CLOSED, "the buffer was destroyed");

  num_pending_ += 1;
  if (fields.done_id != 0) ends_[fields.done_id] = record;  // finish() needs `mutex` to take it out again
  if (collective) epoch = this_epoch;
  slots.hold_taken(op_kind, this_epoch, borrowed_slot);
  if (event) event->set(record);
  if (stream && !(fields.flags & DEEPEP_FLAG_ASYNC_FINISH)) stream->push_wait(record);
  return this_epoch;
}

void Buffer::run(Operation& op, const std::function<void(Operation&)>& work) {
  if (needs_peers(op.op) && static_cast<int64_t>(op.generation) <= failed_generation_) {
    const std::lock_guard lock(mutex);
    op.failure = needs_recovery(first_failure_, rank);
    return;
  }
  try {
    work(op);
  } catch (const Rejected& rejected) {
    op.failure = rejected.failure;
  } catch (const std::bad_alloc&) {
    set_failure(op, DEEPEP_ERROR_INTERNAL, "out of memory while it ran");
  } catch (const std::exception& e) {
    set_failure(op, DEEPEP_ERROR_INTERNAL, e.what());
  } catch (...) {
    set_failure(op, DEEPEP_ERROR_INTERNAL, "an unknown exception");
  }
}

// Completes what the operation left open in its failure, and keeps it.
std::shared_ptr<const Status> Buffer::make_status(Operation& op) {
  if (op.failure.code == DEEPEP_OK) return nullptr;
  op.failure.op = op.op;
  if (op.failure.phase == DEEPEP_PHASE_NONE) op.failure.phase = op.phase;
  if (op.failure.message[0] == 0) set_message(op.failure, "Cannot finish %s: code %d", op_name(op.op), op.failure.code);
  auto status = std::make_shared<Status>(Status{op.failure, op.epoch});
  statuses.keep(op.done_id, op.counts_id, status);
  counters.num_failures += 1;
  return status;
}

void Buffer::finish(Operation& op, Record& record) {
  const int32_t code = op.failure.code;
  auto status = make_status(op);
  if (code == DEEPEP_OK && !(op.flags & DEEPEP_FLAG_RECEIVE_HOOK)) {
    if (op.op == DEEPEP_OP_DISPATCH || op.op == DEEPEP_OP_LOW_LATENCY_DISPATCH) counters.num_dispatches += 1;
    if (op.op == DEEPEP_OP_COMBINE || op.op == DEEPEP_OP_LOW_LATENCY_COMBINE) counters.num_combines += 1;
  }
  {
    const std::lock_guard lock(mutex);
    if (code != DEEPEP_OK && needs_peers(op.op) && !op.agreed && !is_harmless(code)) {
      failed_generation_ = static_cast<int64_t>(op.generation);
      failed_peer_ = op.failure.peer;
      first_failure_ = op.failure;
      failed = true;
    }
    num_pending_ -= 1;
    if (op.done_id != 0) ends_.erase(op.done_id);
  }
  record.complete(std::move(status));
  complete(op.counts_id, code);
  complete(op.done_id, code);
}

}  // namespace deepep
