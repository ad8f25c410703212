// A rank's buffer: its symmetric memory and its peers', its communication stream, its slots, and what went wrong.
//
// In: options, peers' handles, operations. Out: every operation runs in order on one serial communication stream, between the
// caller's stream and event, and ends in a completion and a status. The operations themselves are declared in operations.hpp;
// this file knows nothing of rows. Life: create, import every peer, connect, operate, destroy.
//
// Locking. The API layer holds Buffer::mutex during every function of operations.hpp: they take slots, enqueue and read slots
// without locking. Work that runs on the communication stream does not hold it, and locks it where it touches slots.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "../abi/deepep.h"
#include "../api/buffer_base.hpp"
#include "../api/fields.hpp"
#include "../api/shared_memory.hpp"
#include "../common/describe.hpp"
#include "../common/failure.hpp"
#include "../common/protocol.hpp"
#include "memory.hpp"
#include "stream.hpp"

namespace deepep {

class Buffer;

// One enqueued operation; lives until it has ended. Only the communication stream touches it.
struct Operation {
  Buffer& buffer;
  int32_t op = 0;
  uint64_t epoch = 0;        // its number; 0 for operations that are not collective
  uint64_t timeout_ns = 0;   // of each wait
  uint32_t flags = 0;
  uint64_t done_id = 0;
  uint64_t counts_id = 0;    // not yet queued; 0 afterwards
  uint64_t generation = 0;   // recoveries before it was enqueued
  int32_t phase = 0;
  Failure failure;           // code != 0 when it failed; a message is made where it is empty
  // Every rank found this failure alike, or it was announced, before any data moved: the buffer stays good. Without it
  // TIMEOUT, PEER_LOST, ABORTED, SYSTEM and INTERNAL make the buffer need recovery; the other codes never do.
  bool agreed = false;

  // Fills `failure` with the words for a finding, whose op, epoch, phase and seq need not be given, and `agreed`.
  void fail(Finding finding);

  // The host counts are filled: queues counts_id now. Otherwise it is queued when the operation ends, with its status.
  void counts_ready();
};

// What deepep_buffer_stats counts. num_dispatches, num_combines and num_failures are kept by the buffer, the others by the
// operations.
struct Counters {
  std::atomic<uint64_t> num_dispatches{0};
  std::atomic<uint64_t> num_combines{0};
  std::atomic<uint64_t> rows_sent{0};
  std::atomic<uint64_t> bytes_sent{0};
  std::atomic<uint64_t> rows_pulled{0};
  std::atomic<uint64_t> num_failures{0};
};

// At the start of a phase: sets op.phase and does what deepep_inject asked for. False when the operation has failed thereby
// (a stall that outlasted its own deadline): op.failure is filled, the operation ends as after a wait that failed.
bool inject(Operation& op, int32_t phase);

class Buffer : public BufferBase, public std::enable_shared_from_this<Buffer> {
 public:
  // Life cycle; called by the API layer.
  static std::shared_ptr<Buffer> create(uint64_t device, deepep_buffer_create_args& args);
  void export_handle(deepep_peer_handle& handle);
  void import_peer(const deepep_peer_handle& handle);
  void connect();
  void destroy();
  void info(deepep_buffer_info& out);
  void stats(deepep_buffer_stats& out);
  uint64_t present_capture() const { return 0; }  // Nothing is captured on this backend.
  void recover(const deepep_buffer_recover_args& args);
  void mask(const deepep_mask_args& args);
  ~Buffer();

  // Rank r's symmetric memory as mapped here: regions' offsets count from it. Page-aligned. Valid once connected.
  uint8_t* symmetric(uint32_t r) const { return peers_[r]->data(); }
  // False once rank r's buffer was destroyed or its process has ended. A system call: ask every few milliseconds, and look at
  // the awaited word once more after a false, since a peer may finish its part and go.
  bool peer_alive(uint32_t r) const { return peers_[r]->alive(); }

  // Ranks left out, as the running operation sees them: changed by deepep_mask in stream order, and at once by mask_now.
  std::atomic<uint64_t> masked{0};
  // MASK_ON_TIMEOUT: leaves `peer` out from now on. Called by the operation that gave it up.
  void mask_now(uint32_t peer);
  // A failure half-way: calls answer NEEDS_RECOVERY until recover(), or until the rank to blame is masked.
  std::atomic<bool> failed{false};
  bool has_failed() const { return failed; }
  // Flags and aborts of an epoch <= base_epoch are from before a recovery and mean nothing.
  std::atomic<uint64_t> base_epoch{0};
  Counters counters;
  // Nanoseconds waited for each rank, i64 [num_ranks]; kind 0 = dispatch, 1 = combine. Written by the communication stream.
  int64_t* wait_ns(int kind) { return wait_ns_ + static_cast<size_t>(kind) * options.num_ranks; }

  uint64_t epoch = 0;  // under mutex: collective calls enqueued so far
  Readers readers[kMaxSlots] = {};  // under mutex: of the slots' expert-output regions
  // How the rows of a slot's latest dispatch lie: a cached one may have other ranks than those before it with the same handle.
  // Communication stream only.
  struct SlotRows {
    uint64_t view = 0;     // ranks that took part
    uint64_t routing = 0;  // Routing::epoch
  };
  SlotRows rows[kMaxSlots];

  // Runs `work` in order on the communication stream: first waits for previous_event, or for the present work of `stream`,
  // and for the earlier readers of slots that this call took; then works; then completes its record, which `event` may name,
  // queues the ids, and unless ASYNC_FINISH `stream` waits for all that. Failures are kept for deepep_get_status.
  //   collective    takes the next epoch. A receive half passes false and the epoch of its send half.
  //   counts_id     queued by Operation::counts_ready, or at the end.
  //   borrowed_slot is this operation's alone: later ones may take it.
  // Returns the operation's epoch. Rejects with NEEDS_RECOVERY, CLOSED or INVALID_ARGUMENT, and has then enqueued nothing; an
  // operation that finds the buffer failed when its turn comes ends with NEEDS_RECOVERY without running `work`.
  // The caller holds `mutex`.
  uint64_t enqueue(int32_t op, const StreamFields& fields, bool collective, std::function<void(Operation&)> work,
                   uint64_t counts_id = 0, uint64_t epoch_of_send = 0, int32_t borrowed_slot = -1);

  // The failure with this id, or the latest for 0; nullptr when there is none.
  std::shared_ptr<const Status> status(uint64_t id) { return statuses.find(id); }

  // Streams and events made from this buffer.
  uint64_t create_stream();
  uint64_t create_event(uint64_t done_id);
  void forget_event(uint64_t id);
  const std::shared_ptr<Stream>& comm() const { return comm_; }
  // What every call on a connected buffer begins with. The caller holds `mutex`.
  void enter() const { check_usable(); }

  MemoryPool memory{host_memory()};

 private:
  Buffer() = default;
  void run(Operation& op, const std::function<void(Operation&)>& work);
  void finish(Operation& op, Record& record);
  std::shared_ptr<const Status> make_status(Operation& op);
  // The end of the operation with this done_id; one that is not under way has ended. The caller holds `mutex`.
  std::shared_ptr<Record> end_of(uint64_t done_id);

  int64_t* wait_ns_ = nullptr;
  std::vector<std::shared_ptr<SharedMemory>> peers_;  // by rank; fixed once connected
  std::shared_ptr<Stream> comm_;

  // Under mutex.
  uint64_t masked_next_ = 0;         // what `masked` will be when the work enqueued so far has ended
  uint64_t num_pending_ = 0;         // operations enqueued and not ended
  uint64_t num_records_ = 0;         // operations enqueued, ever
  std::unordered_map<uint64_t, std::shared_ptr<Record>> ends_;  // of the pending ones with a done_id, by it
  int32_t failed_peer_ = -1;
  Failure first_failure_;            // what made the buffer fail; of use while `failed`
  std::vector<std::shared_ptr<Stream>> streams_;
  std::unordered_set<uint64_t> events_;
  uint32_t streams_made_ = 0;

  // Operations of this generation or an earlier one end with NEEDS_RECOVERY; -1 = none. Communication stream only.
  int64_t failed_generation_ = -1;
};

}  // namespace deepep
