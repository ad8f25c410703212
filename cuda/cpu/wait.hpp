// Waiting for peers, and waking them: every wait of an operation is bounded, watched and accounted for.
//
// In: a word in this rank's control area that a peer raises. Out: it has arrived, or the peer was left out, or the operation
// has failed and says why. Callers: every collective operation, on the communication stream. A wait spins for some
// microseconds, then sleeps on the rank's doorbell, a futex in shared memory: several ranks share a core.
#pragma once

#include <atomic>
#include <cstdint>

#include "../common/protocol.hpp"
#include "buffer.hpp"

namespace deepep {

// Words of control areas are plain in the structs that device code shares; this is how the CPU touches them.
inline uint64_t load_acquire(const uint64_t* word) {
  return std::atomic_ref<uint64_t>(*const_cast<uint64_t*>(word)).load(std::memory_order_acquire);
}
inline void store_release(uint64_t* word, uint64_t value) {
  std::atomic_ref<uint64_t>(*word).store(value, std::memory_order_release);
}

enum class Arrival {
  arrived,
  left_out,  // the peer is masked, before or since
  failed,    // op.failure is filled and the peers have been told
};

// What a wait is for, for the message of its failure.
struct Awaited {
  Reason reason;                    // late_*
  bool satisfied_by_abort = false;  // also over once the peer has given up in this epoch or a later one: it no longer reads
  const MessageHeader* message = nullptr;  // the peer's in this call, if it comes: of another operation, it ends the wait
};

// The waits of one phase. They share a deadline, so that several missing peers cost one timeout. It is extended once, by half,
// when the awaited peer itself waits for a third rank: the one that is to blame shall be blamed, not the one that waits for it.
class PeerWait {
 public:
  // `kind` is Buffer::wait_ns's, -1 = not accounted. `wait_stats` is the caller's i64 [num_ranks] or nullptr.
  explicit PeerWait(Operation& op, int kind = -1, int64_t* wait_stats = nullptr);

  // The same for a further round: the deadline begins anew, since this round may have used it up on a rank that never came.
  PeerWait again() const { return PeerWait(op_, kind_, wait_stats_); }

  // Waits until `word`, which only `peer` raises, is at least `at_least`: an acquire, which pairs with the release that the
  // peer's store made before it rang. Not for this rank itself.
  Arrival wait_for(uint32_t peer, const uint64_t* word, uint64_t at_least, const Awaited& awaited);

 private:
  Arrival sleep_until(uint32_t peer, const uint64_t* word, uint64_t at_least, const Awaited& awaited, uint64_t begin_ns);
  bool is_elsewhere(uint32_t peer, const MessageHeader* message);
  Arrival heed_aborts(uint32_t peer, uint64_t seen, uint64_t waited_ns);
  Arrival give_up(uint32_t peer, int32_t code, const uint64_t* word, uint64_t at_least, const Awaited& awaited,
                  uint64_t waited_ns);

  Operation& op_;
  Buffer& buffer_;
  int kind_;
  int64_t* wait_stats_;
  uint64_t deadline_ns_;
  bool is_extended_ = false;
};

// Wakes `peer` if it waits for this rank. After the release stores that it may wait for.
void ring(Buffer& buffer, uint32_t peer);

// Tells every peer, masked ones too, that this rank ends `op` half-way because of op.failure.
void announce_failure(Operation& op);

// Runs the work of a collective operation; when it throws, the peers are told before the buffer records the failure.
template <class Work>
void guarded(Operation& op, Work work) {
  try {
    work();
  } catch (...) {
    op.failure.code = DEEPEP_ERROR_INTERNAL;
    announce_failure(op);
    throw;
  }
}

// Whether some peer has left this rank out of this call: then it must not write into that peer's memory any more. Fills
// op.failure. Called every few rows by those who push.
bool is_left_out(Operation& op);
// The same for those who have pulled rows: whether some peer has left this rank out, in this call or a later one, and may have
// overwritten the rows before they were read.
bool is_overtaken(Operation& op);
// Ends the operation because `peer` makes another one (DEEPEP_OP_*) in this call.
void fail_elsewhere(Operation& op, uint32_t peer, int32_t theirs);
// Ends the operation because `by` said with this code that it cannot make the call.
void fail_refused(Operation& op, uint32_t by, int32_t code);
// Ends the operation because rank `by` goes on without this one.
void fail_left_out(Operation& op, uint32_t by);

// Ends a receive half whose send half was skipped or failed half-way. The buffer stays good: it was put right since.
void fail_without_send(Operation& op);

}  // namespace deepep
