// The second synchronisation of a dispatch: every rank has put its rows where they belong.
//
// In: the ranks that take part and their slots. Out: flags raised in the peers, and later the peers' flags seen here.
// Callers: dispatch and low-latency dispatch, between the first row and the first read of a received row.
#pragma once

#include <array>
#include <cstdint>

#include "buffer.hpp"
#include "exchange.hpp"
#include "wait.hpp"

namespace deepep {

// The slot that each rank uses in a call, by rank.
using PeerSlots = std::array<uint32_t, DEEPEP_MAX_RANKS>;
PeerSlots slots_of(const Exchange& exchanged);

// This rank has pushed all its rows of the operation to the ranks in the view.
void announce_pushed(Operation& op, uint64_t view, const PeerSlots& slots);

// Waits for the rows of rank `src` in this rank's `slot`, and makes sure that it counted in the same ranks. When a rank
// disappears between two looks, one rank may count it in and another not; their rows then have other places, so the call
// fails and the buffer needs a recovery.
Arrival wait_pushed(Operation& op, PeerWait& wait, uint32_t src, uint32_t slot, uint64_t view);

}  // namespace deepep
