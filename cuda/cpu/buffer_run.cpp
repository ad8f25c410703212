// How a buffer runs operations: see Buffer::enqueue in buffer.hpp. Slots are here too, since operations take and give them.
//
// In: an API call that was checked. Out: one task on the communication stream, which waits for what must come before, works,
// and then, in this order: keeps the failure, marks the buffer, frees the borrowed slot, completes the record (events), and
// queues the ids. So whoever sees a completion finds everything else done.

#include <new>
#include <utility>

#include "buffer.hpp"
#include "registry.hpp"

namespace deepep {
namespace {

// "a dispatch", for messages.
const char* op_name(int32_t op) {
  switch (op) {
    case DEEPEP_OP_LAYOUT: return "a layout";
    case DEEPEP_OP_DISPATCH: return "a dispatch";
    case DEEPEP_OP_COMBINE: return "a combine";
    case DEEPEP_OP_LOW_LATENCY_DISPATCH: return "a low-latency dispatch";
    case DEEPEP_OP_LOW_LATENCY_COMBINE: return "a low-latency combine";
    case DEEPEP_OP_BARRIER: return "a barrier";
    case DEEPEP_OP_EXPERT_OUTPUT: return "a wait for readers";
  }
  return "an operation";
}

// True when the code alone says that nothing was left half-way. Operation::agreed says it for the others.
bool is_harmless(int32_t code) {
  return code == DEEPEP_ERROR_INVALID_ARGUMENT || code == DEEPEP_ERROR_UNSUPPORTED || code == DEEPEP_ERROR_CAPACITY ||
         code == DEEPEP_ERROR_MISMATCH || code == DEEPEP_ERROR_NEEDS_RECOVERY;
}

// Counting a routing touches no peer, so it goes on when the buffer has failed.
bool needs_peers(int32_t op) { return op != DEEPEP_OP_LAYOUT; }

void set_failure(Operation& op, int32_t code, const char* words) {
  op.failure = {};
  op.failure.code = code;
  set_message(op.failure, "Cannot finish %s: %s", op_name(op.op), words);
}

}  // namespace

void Operation::counts_ready() {
  if (counts_id != 0) buffer.complete(counts_id, DEEPEP_OK);
  counts_id = 0;
}

uint64_t Buffer::enqueue(int32_t op_kind, const StreamFields& fields, bool collective, std::function<void(Operation&)> work,
                         uint64_t counts_id, uint64_t epoch_of_send, int32_t borrowed_slot) {
  check_usable();
  if (failed && needs_peers(op_kind)) {
    Rejected rejected{needs_recovery()};
    throw rejected;
  }
  if (epoch_of_send != 0 && epoch_of_send <= base_epoch) {
    reject(DEEPEP_ERROR_ABORTED, "its send half, epoch %llu, was given up in a recovery at epoch %llu",
           static_cast<unsigned long long>(epoch_of_send), static_cast<unsigned long long>(base_epoch.load()));
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
  for (const int32_t slot : taken_slots_) waits.push_back(slots[static_cast<size_t>(slot)].reusable);

  const uint64_t this_epoch = collective ? epoch + 1 : epoch_of_send;
  Operation op = {.buffer = *this,
                  .op = op_kind,
                  .epoch = this_epoch,
                  .timeout_ns = fields.timeout_ms ? uint64_t{fields.timeout_ms} * 1'000'000 : timeout_ns,
                  .flags = fields.flags,
                  .done_id = fields.done_id,
                  .counts_id = counts_id,
                  .generation = generation_,
                  .failure = {}};
  auto record = std::make_shared<Record>();
  record->ends_on = comm_.get();
  const bool pushed = comm_->push(
      [this, op = std::move(op), work = std::move(work), waits = std::move(waits), record, borrowed_slot]() mutable {
        // Pairs with the caller's stream, its event, or the releaser of a slot: each completes by itself (stream.hpp).
        for (const auto& wait : waits) {
          if (wait) wait->wait();
        }
        run(op, work);
        work = nullptr;  // What it holds goes before anybody is told that the operation has ended.
        finish(op, *record, borrowed_slot);
      });
  if (!pushed) reject(DEEPEP_ERROR_CLOSED, "the buffer was destroyed");

  num_pending_ += 1;
  if (collective) epoch = this_epoch;
  for (const int32_t taken : taken_slots_) {
    Slot& slot = slots[static_cast<size_t>(taken)];
    slot.reusable = nullptr;
    slot.holder_op = op_kind;
    slot.holder_epoch = this_epoch;
  }
  taken_slots_.clear();
  if (borrowed_slot >= 0) slots[static_cast<size_t>(borrowed_slot)].borrowed = true;
  if (event) event->set(record);
  if (stream && !(fields.flags & DEEPEP_FLAG_ASYNC_FINISH)) stream->push_wait(record);
  return this_epoch;
}

// What a call is told that comes after a failure half-way: whose fault it was, and in the words of then.
Failure Buffer::needs_recovery() const {
  Failure failure = first_failure_;
  failure.code = DEEPEP_ERROR_NEEDS_RECOVERY;
  const bool other = failed_peer_ >= 0 && failed_peer_ != static_cast<int32_t>(rank);
  set_message(failure, "An earlier call failed half-way; recover the buffer%s. %s", other ? " or mask the rank" : "",
              first_failure_.message);
  return failure;
}

void Buffer::run(Operation& op, const std::function<void(Operation&)>& work) {
  if (needs_peers(op.op) && static_cast<int64_t>(op.generation) <= failed_generation_) {
    const std::lock_guard lock(mutex);
    op.failure = needs_recovery();
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
  keep_status(op.done_id, op.counts_id, status);
  counters.num_failures += 1;
  return status;
}

void Buffer::finish(Operation& op, Record& record, int32_t borrowed_slot) {
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
    if (borrowed_slot >= 0) give_slot(borrowed_slot);
    num_pending_ -= 1;
  }
  record.complete(std::move(status));
  complete(op.counts_id, code);
  complete(op.done_id, code);
}

int32_t Buffer::take_slot(int32_t wanted) {
  const auto num_slots = static_cast<int32_t>(slots.size());
  if (wanted < -1 || wanted >= num_slots) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "slot is %d, at most %d", wanted, num_slots - 1);
  }
  int32_t found = -1;
  for (int32_t i = 0; i < num_slots && wanted == -1; ++i) {
    const Slot& slot = slots[static_cast<size_t>(i)];
    if (slot.held) continue;
    // One that nobody reads any more is better than one whose reader is still at work.
    if (!slot.reusable || slot.reusable->done()) {
      found = i;
      break;
    }
    if (found == -1) found = i;
  }
  if (wanted >= 0 && !slots[static_cast<size_t>(wanted)].held) found = wanted;
  if (found == -1) {
    std::string holders;
    for (int32_t i = 0; i < num_slots; ++i) {
      if (wanted >= 0 && i != wanted) continue;
      const Slot& slot = slots[static_cast<size_t>(i)];
      holders += (holders.empty() ? "" : ", ") + std::string("slot ") + std::to_string(i) + " by " + op_name(slot.holder_op) +
                 " of epoch " + std::to_string(slot.holder_epoch);
    }
    reject(DEEPEP_ERROR_NO_FREE_SLOT, "%s held by results that were not released (%s)",
           wanted >= 0 ? "the slot is" : num_slots == 1 ? "the only slot is" : "all slots are", holders.c_str());
  }
  taken_slots_.push_back(found);
  Slot& slot = slots[static_cast<size_t>(found)];
  slot.held = true;
  slot.state = nullptr;
  return found;
}

Slot& Buffer::held_slot(int32_t slot) {
  if (slot < 0 || slot >= static_cast<int32_t>(slots.size())) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "slot is %d, at most %zu", slot, slots.size() - 1);
  }
  Slot& found = slots[static_cast<size_t>(slot)];
  if (!found.held || found.borrowed) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "slot %d is not held: it was released, or never taken", slot);
  }
  return found;
}

void Buffer::give_slot(int32_t slot, std::shared_ptr<Record> reusable) {
  Slot& given = slots[static_cast<size_t>(slot)];
  given.held = false;
  given.borrowed = false;
  given.reusable = std::move(reusable);
}

void Buffer::give_back_taken() {
  // Their `reusable` is still what it was: the next holder waits for it as this one would have.
  for (const int32_t slot : taken_slots_) slots[static_cast<size_t>(slot)].held = false;
  taken_slots_.clear();
}

}  // namespace deepep
