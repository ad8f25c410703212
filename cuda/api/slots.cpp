// The slots of a buffer: see slots.hpp.

#include "slots.hpp"

#include <string>
#include <utility>

#include "../abi/deepep.h"
#include "../common/describe.hpp"
#include "../common/failure.hpp"

namespace deepep {

uint32_t Slots::free_bits() const {
  uint32_t bits = 0;
  for (size_t i = 0; i < slots_.size(); ++i) bits |= slots_[i].held ? 0u : 1u << i;
  return bits;
}

int32_t Slots::take(int32_t wanted, uint64_t stream, uint64_t capture) {
  const auto num_slots = static_cast<int32_t>(slots_.size());
  if (wanted < -1 || wanted >= num_slots) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "slot is %d, at most %d", wanted, num_slots - 1);
  }
  int32_t found = -1;
  for (int32_t i = 0; i < num_slots && wanted == -1; ++i) {
    const Slot& slot = slots_[static_cast<size_t>(i)];
    if (slot.held) continue;
    // One that need not be waited for is better than one whose reader is still at work. Its number tells of most that they were
    // given back in the order of the same stream; to ask costs more.
    if (!slot.reusable || slot.reusable->is_marked_on(stream) || slot.reusable->done()) {
      found = i;
      break;
    }
    if (found == -1) found = i;
  }
  if (wanted >= 0) {
    const Slot& slot = slots_[static_cast<size_t>(wanted)];
    if (!slot.held || (slot.given_back && slot.capture == capture)) found = wanted;
  }
  if (found == -1) reject_none_free(wanted);
  taken_.push_back(found);
  Slot& slot = slots_[static_cast<size_t>(found)];
  slot.held = true;
  slot.state = nullptr;
  return found;
}

void Slots::reject_none_free(int32_t wanted) const {
  std::string holders;
  for (size_t i = 0; i < slots_.size(); ++i) {
    if (wanted >= 0 && i != static_cast<size_t>(wanted)) continue;
    holders += (holders.empty() ? "" : ", ") + std::string("slot ") + std::to_string(i) + " by " +
               op_name(slots_[i].holder_op) + " of epoch " + std::to_string(slots_[i].holder_epoch);
  }
  reject(DEEPEP_ERROR_NO_FREE_SLOT, "%s held by results that were not released (%s)",
         wanted >= 0          ? "the slot is"
         : slots_.size() == 1 ? "the only slot is"
                              : "all slots are",
         holders.c_str());
}

Slot& Slots::held(int32_t slot) {
  Slot& found = owned(slot);
  if (found.given_back) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "slot %d is not held: it was released in a capture", slot);
  return found;
}

Slot& Slots::owned(int32_t slot) {
  if (slot < 0 || slot >= static_cast<int32_t>(slots_.size())) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "slot is %d, at most %zu", slot, slots_.size() - 1);
  }
  Slot& found = slots_[static_cast<size_t>(slot)];
  if (!found.held) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "slot %d is not held: it was released, or never taken", slot);
  }
  return found;
}

void Slots::give(int32_t slot, std::shared_ptr<Record> reusable) {
  Slot& given = slots_[static_cast<size_t>(slot)];
  given.held = false;
  given.given_back = false;
  given.capture = 0;
  given.reusable = std::move(reusable);
}

void Slots::give_in_capture(int32_t slot, std::shared_ptr<Record> reusable) {
  Slot& given = slots_[static_cast<size_t>(slot)];
  given.given_back = true;
  given.reusable = std::move(reusable);
}

void Slots::give_back_taken() {
  // Their `reusable` is still what it was: the next holder waits for it as this one would have.
  for (const int32_t taken : taken_) {
    Slot& slot = slots_[static_cast<size_t>(taken)];
    slot.held = slot.given_back;
  }
  taken_.clear();
}

void Slots::hold_taken(int32_t op, uint64_t epoch, int32_t borrowed, uint64_t capture) {
  for (const int32_t taken : taken_) {
    Slot& slot = slots_[static_cast<size_t>(taken)];
    slot.reusable = nullptr;
    slot.capture = capture;
    slot.given_back = false;
    slot.holder_op = op;
    slot.holder_epoch = epoch;
  }
  taken_.clear();
  if (borrowed >= 0) give(borrowed);
}

}  // namespace deepep
