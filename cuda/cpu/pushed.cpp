// The second synchronisation of a dispatch; see pushed.hpp.
#include "pushed.hpp"

#include <bit>

#include "../common/routing.hpp"
#include "rows.hpp"

namespace deepep {

PeerSlots slots_of(const Exchange& exchanged) {
  PeerSlots slots{};
  for (uint32_t rank = 0; rank < slots.size(); ++rank) {
    if (exchanged.from[rank] != nullptr) slots[rank] = exchanged.sender(rank).slot;
  }
  return slots;
}

void announce_pushed(Operation& op, uint64_t view, const PeerSlots& slots) {
  Buffer& buffer = op.buffer;
  stream_fence();  // Rows may have gone by non-temporal stores, which the releases below do not order by themselves.
  for (uint32_t dst = 0; dst < buffer.options.num_ranks; ++dst) {
    if (dst == buffer.rank || !in_view(view, dst)) continue;
    uint8_t* base = buffer.symmetric(dst);
    store_release(slot_word_at(base, buffer.regions.pushed_view, buffer.rank, slots[dst]), view);
    store_release(slot_word_at(base, buffer.regions.pushed, buffer.rank, slots[dst]), op.epoch);  // Pairs with wait_pushed().
  }
  for (uint32_t dst = 0; dst < buffer.options.num_ranks; ++dst) {
    if (in_view(view, dst)) ring(buffer, dst);
  }
}

Arrival wait_pushed(Operation& op, PeerWait& wait, uint32_t src, uint32_t slot, uint64_t view) {
  Buffer& buffer = op.buffer;
  uint8_t* base = buffer.symmetric(buffer.rank);
  const uint64_t* word = slot_word_at(base, buffer.regions.pushed, src, slot);
  // Pairs with the release in announce_pushed() of src.
  const Arrival arrival = wait.wait_for(src, word, op.epoch, {Reason::late_rows});
  if (arrival != Arrival::arrived) return arrival;
  const uint64_t theirs = load_acquire(slot_word_at(base, buffer.regions.pushed_view, src, slot));
  if (theirs == view) return Arrival::arrived;
  const auto peer = static_cast<uint32_t>(std::countr_zero(theirs ^ view));
  op.fail({.code = DEEPEP_ERROR_ABORTED,
           .peer = static_cast<int32_t>(peer),
           .reason = Reason::torn_view,
           .a = static_cast<int32_t>(in_view(view, peer) ? buffer.rank : src),
           .b = static_cast<int32_t>(in_view(view, peer) ? src : buffer.rank),
           .expected = static_cast<int64_t>(view),
           .seen = static_cast<int64_t>(theirs)});
  announce_failure(op);
  return Arrival::failed;
}

}  // namespace deepep
