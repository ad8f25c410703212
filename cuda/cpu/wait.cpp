// Waiting for peers, and waking them; see wait.hpp.
#include "wait.hpp"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>

#include "../common/routing.hpp"

namespace deepep {
namespace {

constexpr uint64_t kSliceNs = 20'000'000;  // the longest sleep: bounds how late a peer's death is seen
constexpr int kSpins = 64;                 // looks before the first yield: a microsecond or two
constexpr int kYields = 4;                 // then lets the ranks that share the core run

void pause_briefly() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// The doorbell is shared between processes, hence no FUTEX_PRIVATE_FLAG.
void futex_wait(uint32_t* word, uint32_t expected, uint64_t timeout_ns) {
  const timespec timeout = {static_cast<time_t>(timeout_ns / 1'000'000'000), static_cast<long>(timeout_ns % 1'000'000'000)};
  syscall(SYS_futex, word, FUTEX_WAIT, expected, &timeout, nullptr, 0);
}

void futex_wake(uint32_t* word) { syscall(SYS_futex, word, FUTEX_WAKE, 1, nullptr, nullptr, 0); }

// Both sides of the sleep are in one total order (seq_cst): either the peer's look at `waiting_for` comes after the sleeper's
// announcement, or the sleeper's look at `rings` comes after the peer's increment, which it acquires: then it sees the word.
void ring_doorbell(Buffer& buffer, uint32_t peer, bool for_everyone) {
  Doorbell* bell = doorbell_at(buffer.symmetric(peer), buffer.regions);
  std::atomic_ref<uint32_t>(bell->rings).fetch_add(1, std::memory_order_seq_cst);
  const uint64_t waiting = std::atomic_ref<uint64_t>(bell->waiting_for).load(std::memory_order_seq_cst);
  if (for_everyone ? waiting != 0 : in_view(waiting, buffer.rank)) futex_wake(&bell->rings);
}

void announce(Buffer& buffer, const Abort& abort) {
  if (abort.epoch == 0) return;  // not a collective call: no peer waits for it
  for (uint32_t peer = 0; peer < buffer.options.num_ranks; ++peer) {
    if (peer == buffer.rank) continue;
    store_release(abort_at(buffer.symmetric(peer), buffer.regions, buffer.rank), abort_word(abort));
    ring_doorbell(buffer, peer, true);
  }
}

// Whether an abort concerns this operation: not from before a recovery, not by or about a rank that is left out anyway.
bool concerns(const Operation& op, const Abort& abort, uint32_t from) {
  const Buffer& buffer = op.buffer;
  const uint64_t masked = buffer.masked.load(std::memory_order_relaxed);
  return abort.epoch != 0 && abort.epoch <= op.epoch && abort.epoch > buffer.base_epoch.load(std::memory_order_relaxed) &&
         !in_view(masked, from) && !in_view(masked, abort.culprit);
}

// Whether `peer` sleeps because of a rank other than this one: then that rank is to blame, and `peer` will soon say so.
bool waits_for_another(Buffer& buffer, uint32_t peer) {
  Doorbell* bell = doorbell_at(buffer.symmetric(peer), buffer.regions);
  const uint64_t waiting = std::atomic_ref<uint64_t>(bell->waiting_for).load(std::memory_order_relaxed);
  return (waiting & ~(uint64_t{1} << buffer.rank)) != 0;
}

}  // namespace

void ring(Buffer& buffer, uint32_t peer) {
  if (peer != buffer.rank) ring_doorbell(buffer, peer, false);
}

void announce_failure(Operation& op) {
  const uint32_t culprit = op.failure.peer >= 0 ? static_cast<uint32_t>(op.failure.peer) : op.buffer.rank;
  announce(op.buffer, {op.epoch, op.failure.code, culprit, false});
}

void fail_elsewhere(Operation& op, uint32_t peer, int32_t theirs) {
  op.fail({.code = DEEPEP_ERROR_MISMATCH,
           .peer = static_cast<int32_t>(peer),
           .reason = Reason::elsewhere,
           .agreed = 1,
           .expected = op.op,
           .seen = theirs});
}

void fail_refused(Operation& op, uint32_t by, int32_t code) {
  op.fail({.code = DEEPEP_ERROR_ABORTED,
           .peer = static_cast<int32_t>(by),
           .reason = Reason::refused,
           .agreed = 1,
           .a = code});
}

void fail_left_out(Operation& op, uint32_t by) {
  op.fail({.code = DEEPEP_ERROR_ABORTED,
           .peer = static_cast<int32_t>(op.buffer.rank),
           .reason = Reason::left_out,
           .a = static_cast<int32_t>(by)});
  announce_failure(op);
}

void fail_without_send(Operation& op) {
  op.fail({.code = DEEPEP_ERROR_ABORTED, .reason = Reason::no_send, .agreed = 1, .expected = static_cast<int64_t>(op.epoch)});
}

bool is_overtaken(Operation& op) {
  Buffer& buffer = op.buffer;
  if (!buffer.mask_on_timeout) return false;
  std::atomic_thread_fence(std::memory_order_acquire);  // The rows were read before the words below are.
  for (uint32_t from = 0; from < buffer.options.num_ranks; ++from) {
    if (from == buffer.rank) continue;
    // Pairs with announce() of that rank, which comes before it writes where this rank may still read.
    const Abort abort = abort_from_word(load_acquire(abort_at(buffer.symmetric(buffer.rank), buffer.regions, from)));
    if (!abort.goes_on || abort.culprit != buffer.rank) continue;
    if (abort.epoch <= buffer.base_epoch.load(std::memory_order_relaxed)) continue;
    fail_left_out(op, from);
    return true;
  }
  return false;
}

bool is_left_out(Operation& op) {
  Buffer& buffer = op.buffer;
  for (uint32_t from = 0; from < buffer.options.num_ranks; ++from) {
    if (from == buffer.rank) continue;
    // Pairs with announce() of that rank.
    const Abort abort = abort_from_word(load_acquire(abort_at(buffer.symmetric(buffer.rank), buffer.regions, from)));
    if (abort.culprit != buffer.rank || !concerns(op, abort, from)) continue;
    fail_left_out(op, from);
    return true;
  }
  return false;
}

PeerWait::PeerWait(Operation& op, int kind, int64_t* wait_stats)
    : op_(op), buffer_(op.buffer), kind_(kind), wait_stats_(wait_stats), deadline_ns_(now_ns() + op.timeout_ns) {}

Arrival PeerWait::wait_for(uint32_t peer, const uint64_t* word, uint64_t at_least, const Awaited& awaited) {
  if (in_view(buffer_.masked.load(std::memory_order_relaxed), peer)) return Arrival::left_out;
  if (load_acquire(word) >= at_least) return Arrival::arrived;  // Pairs with the release before the peer's ring.
  const uint64_t begin_ns = now_ns();
  Arrival arrival = Arrival::failed;
  bool arrived = false;
  for (int i = 0; i < kSpins + kYields && !arrived; ++i) {
    if (i < kSpins) pause_briefly();
    else sched_yield();
    arrived = load_acquire(word) >= at_least;  // Pairs with the same.
  }
  arrival = arrived ? Arrival::arrived : sleep_until(peer, word, at_least, awaited, begin_ns);
  const auto waited_ns = static_cast<int64_t>(now_ns() - begin_ns);
  // Only this stream writes the statistics; a reader may look at any time.
  if (kind_ >= 0) std::atomic_ref<int64_t>(buffer_.wait_ns(kind_)[peer]).fetch_add(waited_ns, std::memory_order_relaxed);
  if (wait_stats_ != nullptr) wait_stats_[peer] += waited_ns;
  return arrival;
}

Arrival PeerWait::sleep_until(uint32_t peer, const uint64_t* word, uint64_t at_least, const Awaited& awaited,
                              uint64_t begin_ns) {
  Doorbell* bell = doorbell_at(buffer_.symmetric(buffer_.rank), buffer_.regions);
  std::atomic_ref<uint64_t> waiting_for(bell->waiting_for);
  std::atomic_ref<uint32_t> rings(bell->rings);
  waiting_for.store(uint64_t{1} << peer, std::memory_order_seq_cst);
  uint64_t alive_ns = begin_ns;  // when the peer was last known to be alive
  Arrival arrival = Arrival::arrived;
  for (;;) {
    const uint32_t seen_rings = rings.load(std::memory_order_seq_cst);
    const uint64_t seen = std::atomic_ref<uint64_t>(*const_cast<uint64_t*>(word)).load(std::memory_order_seq_cst);
    if (seen >= at_least) break;  // Pairs with the release before the peer's ring.
    uint64_t now = now_ns();
    if (awaited.satisfied_by_abort) {
      const Abort abort = abort_from_word(load_acquire(abort_at(buffer_.symmetric(buffer_.rank), buffer_.regions, peer)));
      if (!abort.goes_on && abort.epoch >= at_least) break;  // Pairs with announce() of a peer that will not read again.
    }
    arrival = is_elsewhere(peer, awaited.message) ? Arrival::failed : heed_aborts(peer, seen, now - begin_ns);
    if (arrival != Arrival::arrived) break;
    if (now - alive_ns >= kSliceNs) {
      // The word once more after the peer was found dead: it may have finished its part and gone.
      if (!buffer_.peer_alive(peer) && load_acquire(word) < at_least) {
        arrival = give_up(peer, DEEPEP_ERROR_PEER_LOST, word, at_least, awaited, now - begin_ns);
        break;
      }
      alive_ns = now = now_ns();
    }
    if (now >= deadline_ns_ && !is_extended_ && waits_for_another(buffer_, peer)) {
      deadline_ns_ += op_.timeout_ns / 2;
      is_extended_ = true;
    }
    if (now >= deadline_ns_) {
      arrival = give_up(peer, DEEPEP_ERROR_TIMEOUT, word, at_least, awaited, now - begin_ns);
      break;
    }
    // Woken by ring() of this peer, or by announce() of any; an untimely ring only costs another look.
    futex_wait(&bell->rings, seen_rings, std::min(kSliceNs, deadline_ns_ - now));
  }
  waiting_for.store(0, std::memory_order_relaxed);
  return arrival;
}

// Whether the peer's message of this call is of another operation, or refuses it: every rank finds that alike, so the
// buffer stays good.
bool PeerWait::is_elsewhere(uint32_t peer, const MessageHeader* message) {
  // Pairs with the release in publish() of the peer.
  if (message == nullptr || load_acquire(&message->epoch) != op_.epoch) return false;
  const Sender theirs = sender_of(*message);
  if (theirs.op == op_.op && theirs.code == 0) return false;
  if (theirs.code != 0) fail_refused(op_, peer, theirs.code);
  else fail_elsewhere(op_, peer, theirs.op);
  return true;
}

// Looks at the abort words. `arrived` here means: nothing concerns this wait, go on waiting.
Arrival PeerWait::heed_aborts(uint32_t peer, uint64_t seen, uint64_t waited_ns) {
  for (uint32_t from = 0; from < buffer_.options.num_ranks; ++from) {
    if (from == buffer_.rank) continue;
    // Pairs with announce() of that rank.
    const Abort abort = abort_from_word(load_acquire(abort_at(buffer_.symmetric(buffer_.rank), buffer_.regions, from)));
    if (!concerns(op_, abort, from)) continue;
    const bool gone = abort.code == DEEPEP_ERROR_TIMEOUT || abort.code == DEEPEP_ERROR_PEER_LOST;
    if (buffer_.mask_on_timeout && abort.culprit != buffer_.rank && (gone || abort.culprit == from)) {
      // What one rank has found out, all do: so they go on with the same ranks.
      buffer_.mask_now(abort.culprit);
      announce(buffer_, {op_.epoch, abort.code, abort.culprit, true});
      if (abort.culprit == peer) return Arrival::left_out;
      continue;
    }
    op_.fail({.code = DEEPEP_ERROR_ABORTED,
              .peer = static_cast<int32_t>(abort.culprit),
              .reason = Reason::gave_up,
              .a = static_cast<int32_t>(from),
              .b = abort.code,
              .expected = static_cast<int64_t>(abort.epoch),
              .seen = static_cast<int64_t>(seen),
              .waited_ns = static_cast<int64_t>(waited_ns)});
    announce_failure(op_);
    return Arrival::failed;
  }
  return Arrival::arrived;
}

Arrival PeerWait::give_up(uint32_t peer, int32_t code, const uint64_t* word, uint64_t at_least, const Awaited& awaited,
                          uint64_t waited_ns) {
  if (buffer_.mask_on_timeout) {
    buffer_.mask_now(peer);
    announce(buffer_, {op_.epoch, code, peer, true});
    return Arrival::left_out;
  }
  op_.fail({.code = code,
            .peer = static_cast<int32_t>(peer),
            .reason = awaited.reason,
            .expected = static_cast<int64_t>(at_least),
            .seen = static_cast<int64_t>(load_acquire(word)),
            .waited_ns = static_cast<int64_t>(waited_ns)});
  announce_failure(op_);
  return Arrival::failed;
}

}  // namespace deepep
