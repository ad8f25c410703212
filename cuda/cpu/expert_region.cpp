// The expert-output region of a slot; see expert_region.hpp.
#include "expert_region.hpp"

#include "../common/routing.hpp"

namespace deepep {

bool wait_for_readers(Operation& op, uint32_t slot, PeerWait& wait) {
  Buffer& buffer = op.buffer;
  uint64_t epoch = 0;
  {
    const std::lock_guard lock(buffer.mutex);
    epoch = buffer.slots[slot].combine_epoch;
  }
  // Readers of a combine before the last recovery have gone with it.
  if (epoch <= buffer.base_epoch.load(std::memory_order_relaxed)) return true;
  for (uint32_t peer = 0; peer < buffer.options.num_ranks; ++peer) {
    if (peer == buffer.rank) continue;
    const uint64_t* word = slot_word_at(buffer.symmetric(buffer.rank), buffer.regions.pulled, peer, slot);
    // Pairs with end_reading() of the peer, or with the announcement that it gave up and reads no more.
    if (wait.wait_for(peer, word, epoch, {Reason::late_reader, true}) == Arrival::failed) return false;
  }
  return true;
}

void begin_reading(Operation& op, uint32_t slot) {
  const std::lock_guard lock(op.buffer.mutex);
  op.buffer.slots[slot].combine_epoch = op.epoch;
}

void forget_readers(Operation& op, uint32_t slot) {
  const std::lock_guard lock(op.buffer.mutex);
  op.buffer.slots[slot].combine_epoch = 0;
}

void end_reading(Operation& op, uint32_t rank, uint32_t slot) {
  Buffer& buffer = op.buffer;
  if (rank == buffer.rank) return;
  // Reads come before a release: the owner's acquire in wait_for_readers() lets it write.
  store_release(slot_word_at(buffer.symmetric(rank), buffer.regions.pulled, buffer.rank, slot), op.epoch);
  ring(buffer, rank);
}

}  // namespace deepep
