// The slots of a buffer: who holds which, and after what a free one may be used again.
//
// In: dispatches take a slot, deepep_slot_release gives it back in the order of a stream. Out: a slot's number, or an error
// that names the holders; and the records that the next holder's operation waits for. Guarded by Buffer::mutex: every member
// is called with it held. Compiled by each backend: a Record is a point in one of its streams.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "stream.hpp"

namespace deepep {

struct LowLatencySlot;

// One result's worth of memory.
struct Slot {
  bool held = false;
  std::shared_ptr<LowLatencySlot> state;  // of a low-latency dispatch that holds it; empty when a slot was just taken
  int32_t holder_op = 0;                  // who holds it, for messages
  uint64_t holder_epoch = 0;
  std::shared_ptr<Record> reusable;  // the next holder's operation waits for it: deepep_slot_release's stream
  uint64_t capture = 0;              // of which its holder is part; 0 = none
  bool given_back = false;           // in that capture, whose later calls may take it; for others it is held
};

// The stream whose work an operation waits for: the caller's, unless it is told to begin after an event instead.
template <class Args>
uint64_t stream_before(const Args& args) {
  return args.previous_event == 0 ? args.stream : 0;
}

class Slots {
 public:
  void resize(size_t count) { slots_.resize(count); }
  size_t size() const { return slots_.size(); }
  Slot& operator[](size_t slot) { return slots_[slot]; }
  auto begin() { return slots_.begin(); }
  auto end() { return slots_.end(); }
  // Bit s is set when slot s is free.
  uint32_t free_bits() const;

  // Takes slot `wanted`, or with -1 any free one, for the operation enqueued next, which begins after what is enqueued on
  // `stream` (see stream_before(); 0 = none) and is part of `capture`; its state is empty then. Rejects with NO_FREE_SLOT,
  // naming the holders, or INVALID_ARGUMENT. Given back by itself when the API call is rejected after it.
  int32_t take(int32_t wanted, uint64_t stream, uint64_t capture = 0);
  // A slot that is held; rejects otherwise.
  Slot& held(int32_t slot);
  // The same, or one that was given back in a capture that has ended.
  Slot& owned(int32_t slot);
  // Frees a slot; the next holder's operation waits for `reusable` if there is one.
  void give(int32_t slot, std::shared_ptr<Record> reusable = nullptr);
  // The same for later calls of the capture in which it was taken.
  void give_in_capture(int32_t slot, std::shared_ptr<Record> reusable);
  // After a rejected call: gives back what take() took since the last enqueue.
  void give_back_taken();

  // What take() took since the last enqueue: that operation waits for their `reusable` …
  const std::vector<int32_t>& taken() const { return taken_; }
  // … and then is their holder, but for `borrowed`, if that is not -1: later operations, which come after it, may take it.
  void hold_taken(int32_t op, uint64_t epoch, int32_t borrowed, uint64_t capture = 0);

 private:
  [[noreturn]] void reject_none_free(int32_t wanted) const;

  std::vector<Slot> slots_;
  std::vector<int32_t> taken_;
};

}  // namespace deepep
