// The first synchronisation of a call: every rank's message to every rank.
//
// In: what this rank says (agreed values, slot, an error of its own) and, for a dispatch, its counts. Out: who takes part,
// their slots and counts, or a failure that all ranks find alike. Callers: dispatch, combine, low latency, barrier. When it has
// succeeded, the slots that the messages name are free to be written (protocol.hpp).
#pragma once

#include <array>
#include <cstdint>

#include "../common/protocol.hpp"
#include "buffer.hpp"
#include "wait.hpp"

namespace deepep {

// What this rank says.
struct Draft {
  std::array<uint32_t, kNumAgreed> agreed{};
  uint32_t slot = 0;
  const uint32_t* tokens_per_rank = nullptr;      // [num_ranks], nullptr = a call without counts
  const uint32_t* entries_per_expert = nullptr;   // [num_experts]
  bool pushes = false;                            // rows will be pushed: all must count in the same ranks
};

// What all ranks said.
struct Exchange {
  uint64_t view = 0;                                   // ranks that take part, this one included
  std::array<MessageHeader*, DEEPEP_MAX_RANKS> from{};  // by rank, nullptr outside the view; valid during the call

  Sender sender(uint32_t rank) const { return sender_of(*from[rank]); }
};

// Publishes the draft to one rank, with op.failure's code. Does not ring.
void publish(Operation& op, const Draft& draft, uint32_t to);

// Publishes the draft and waits for every unmasked rank's. False when the call fails: by op.failure set before, by a rank
// that could not come, by one that refused, or because the ranks disagree. Waits are accounted to `wait`.
bool exchange(Operation& op, const Draft& draft, PeerWait& wait, Exchange& out);

}  // namespace deepep
