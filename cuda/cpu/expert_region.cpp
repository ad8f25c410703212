// The expert-output region of a slot; see expert_region.hpp.
#include "expert_region.hpp"

#include "../common/routing.hpp"

namespace deepep {

bool wait_for_readers(Operation& op, uint32_t slot, PeerWait& wait) {
  Buffer& buffer = op.buffer;
  Readers readers = {};
  {
    const std::lock_guard lock(buffer.mutex);
    readers = buffer.readers[slot];
  }
  // Readers of a combine before the last recovery have gone with it.
  if (readers.epoch <= buffer.base_epoch.load(std::memory_order_relaxed)) return true;
  for (uint32_t peer = 0; peer < buffer.options.num_ranks; ++peer) {
    if (peer == buffer.rank || !in_view(readers.ranks, peer)) continue;
    const uint64_t* word = slot_word_at(buffer.symmetric(buffer.rank), buffer.regions.pulled, peer, slot);
    // Pairs with end_reading() of the peer, or with the announcement that it gave up and reads no more.
    if (wait.wait_for(peer, word, readers.epoch, {Reason::late_reader, true}) == Arrival::failed) return false;
  }
  return true;
}

void begin_reading(Operation& op, uint32_t slot, uint64_t ranks) {
  const uint64_t masked = op.buffer.masked.load(std::memory_order_relaxed);
  const std::lock_guard lock(op.buffer.mutex);
  op.buffer.readers[slot] = {op.epoch, ranks & ~masked};
}

void forget_readers(Operation& op, uint32_t slot) {
  const std::lock_guard lock(op.buffer.mutex);
  // Those of an earlier combine still read: a call that is refused has not waited for them.
  if (op.buffer.readers[slot].epoch == op.epoch) op.buffer.readers[slot] = {};
}

namespace {

// Reads come before a release: the owner's acquire in wait_for_readers() lets it write.
void end_reading(Buffer& buffer, uint32_t rank, uint32_t slot, uint64_t epoch) {
  store_release(slot_word_at(buffer.symmetric(rank), buffer.regions.pulled, buffer.rank, slot), epoch);
}

}  // namespace

void end_reading(Operation& op, uint32_t rank, uint32_t slot) {
  if (rank == op.buffer.rank) return;
  end_reading(op.buffer, rank, slot, op.epoch);
  ring(op.buffer, rank);
}

void end_all_reading(Buffer& buffer, uint64_t epoch) {
  for (uint32_t peer = 0; peer < buffer.options.num_ranks; ++peer) {
    if (peer == buffer.rank) continue;
    for (uint32_t slot = 0; slot < buffer.options.num_slots; ++slot) end_reading(buffer, peer, slot, epoch);
    ring(buffer, peer);
  }
}

}  // namespace deepep
