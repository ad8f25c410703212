// A rank's buffer: its symmetric memory and its peers', its communication stream, its slots, and what went wrong.
//
// In: options, peers' handles, operations. Out: every operation is one kernel on one serial communication stream, between the
// caller's stream and event, and ends in a completion and a status. The operations themselves are declared in
// ../api/operations.hpp; this file knows nothing of rows. Life: create, import every peer, connect, operate, destroy.
//
// How the host learns of ends. The device writes to pinned memory (HostState): the number of the latest operation whose counts
// are known, of the latest that has ended, and what went wrong. reap() compares them with the operations that are pending, in
// their order, keeps failures, and queues ids. It runs at the start of every call on the buffer, when the buffer's queue is
// drained, on the notifier's thread while it is armed, and now and then on the watchdog's. It never waits.
//
// Locking. The API layer holds Buffer::mutex during every function of operations.hpp. What only the device changes needs none.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <unordered_set>
#include <vector>

#include "../abi/deepep.h"
#include "../api/buffer_base.hpp"
#include "../api/fields.hpp"
#include "../api/queue.hpp"
#include "../common/describe.hpp"
#include "../common/failure.hpp"
#include "../kernels/launch.hpp"
#include "device.hpp"
#include "memory.hpp"
#include "params.hpp"
#include "peers.hpp"
#include "stream.hpp"

namespace deepep {

struct Graph;

// Which part of a call an operation is. Calls of normal mode are whole.
enum class Halves { both, send, receive, none };

// What an operation is, for enqueue().
struct Enqueued {
  int32_t op = 0;
  bool collective = false;                // it takes the next epoch
  Halves halves = Halves::both;           // whose phases it enters
  CaptureId send_capture = 0;             // of a receive half: the capture that its send half is part of
  uint64_t counts_id = 0;                 // queued when the host counts are filled, or at the end
  int32_t counts_slot = -1;               // that has them
  int32_t borrowed_slot = -1;             // this operation's alone: later ones may take it
  std::shared_ptr<void> needs = nullptr;  // must live until then, and as long as a graph that has captured it
};

// Counting a routing touches no peer, so it goes on when the buffer has failed.
constexpr bool needs_peers(int32_t op) { return op != DEEPEP_OP_LAYOUT; }

// Launches an operation's kernel with the params that concern every operation.
using Launch = std::function<cudaError_t(const CallParams&, Place)>;

class Buffer : public BufferBase, public Source, public std::enable_shared_from_this<Buffer> {
 public:
  // Life cycle; called by the API layer.
  static std::shared_ptr<Buffer> create(uint64_t device, deepep_buffer_create_args& args);
  void export_handle(deepep_peer_handle& handle);
  void import_peer(const deepep_peer_handle& handle);
  void connect();
  void destroy();
  void info(deepep_buffer_info& out);
  void stats(deepep_buffer_stats& out);
  void recover(const deepep_buffer_recover_args& args);
  void mask(const deepep_mask_args& args);
  ~Buffer() override;

  // Facts. They do not change; from `topology` on they are known once connected.
  const Device* device = nullptr;
  Topology topology;
  bool launches_early = false;  // calls that are not captured: see Place
  uint64_t turned_with = 0;     // ranks with which low latency exchanges scales in columns as rows: those on other GPUs
  uint32_t turned_tokens = 0;   // from how many tokens on that are theirs, were they spread evenly
  int32_t wanted_sms = 0;       // deepep_buffer_create_args.num_sms
  int32_t default_sms = 0;      // of an operation that says nothing

  // Rank r's symmetric memory as this device sees it: regions' offsets count from it.
  uint8_t* symmetric(uint32_t r) const { return peers_->symmetric(r); }

  std::unique_ptr<MemoryPool> device_pool;
  std::unique_ptr<MemoryPool> pinned_pool;

  // Enqueues an operation behind the one before: on `stream` itself where that is this buffer's and waits for the operation,
  // else on the communication stream. First makes it wait for previous_event, or for the present work of `stream`, and for the
  // earlier readers of slots that this call took; then launches; then marks its record, which `event` may name, and unless
  // ASYNC_FINISH makes `stream` wait for all that. The ids are queued by reap(). On a stream that is captured
  // all this is recorded. Returns the operation's epoch as far as the host knows. Rejects with NEEDS_RECOVERY, CLOSED or
  // INVALID_ARGUMENT, and has then enqueued nothing. The caller holds `mutex`.
  uint64_t enqueue(const StreamFields& fields, Enqueued what, const Launch& launch);
  // How an operation is launched; work.num_sms is what it asked for, or 0. Rejects what does not fit beside the other ranks.
  Plan plan(Work work) const;
  // The same for a kernel that has no plan.
  int32_t sms(int32_t asked) const;
  // Rejects more multiprocessors than all ranks of the device can have at once, with the arithmetic.
  void check_sms(int32_t wanted) const;

  // What every call on a connected buffer begins with: selects the device, takes note of what has ended, and rejects a buffer
  // that is not usable. The caller holds `mutex`.
  void enter();
  // Takes note of what has ended. The caller holds `mutex`.
  void reap();
  // Source: the same from outside, and cheap when there is nothing new.
  void poll() noexcept override;
  bool is_pending() const noexcept override { return num_pending_.load(std::memory_order_relaxed) != 0; }
  // For the watchdog: tells the device which peers are gone, ends the process if an injection says so, and finds out when CUDA
  // itself has failed. True when it must look again soon.
  bool watch() noexcept;

  // Queues `id` when the record is done, with its status. The caller holds `mutex`.
  void complete_when_done(std::shared_ptr<Record> record, uint64_t id);
  // Calls `done` when the record is done, or the buffer destroyed. The caller holds `mutex`, as when it marked the record.
  void call_when_done(std::shared_ptr<Record> record, std::function<void()> done);
  // The failure with this id, or the latest for 0; nullptr when there is none.
  std::shared_ptr<const Status> status(uint64_t id);

  // Streams and events made from this buffer.
  uint64_t create_stream();
  void end_stream(uint64_t stream);
  uint64_t create_event(uint64_t done_id);
  void forget_event(uint64_t id);
  cudaStream_t comm() const { return comm_; }

  // The capture that the communication stream takes part in, or 0. The caller holds `mutex`.
  CaptureId present_capture();
  // Keeps what a capture needs as long as its graph, or for good when the graph is another library's.
  void keep_for_capture(std::shared_ptr<void> needs);
  // The capture begun by deepep_graph_begin and not ended; under mutex.
  std::shared_ptr<Graph> capturing;
  // Puts the communication stream behind all operations so far. The caller holds `mutex`.
  void settle();
  // Makes `after` wait for the present work of `before`; both are part of `capture`, or will be by this.
  void order(cudaStream_t before, cudaStream_t after, CaptureId capture);
  // A replay of a graph is enqueued: `ended` marks its end. Failures of captured operations are then its failures.
  // `num_collective`: the collective calls in it.
  void note_replay(std::shared_ptr<Record> ended, uint64_t done_id, std::shared_ptr<Graph> graph);
  // Rejects when the buffer needs a recovery. The caller holds `mutex`.
  void check_good() const;
  bool has_failed() const { return failed_; }
  // Of the last recovery: calls up to it were given up. Under mutex.
  uint64_t base_epoch = 0;

  // Memory of a dispatch that has no handle, or of low latency; how the device's part of a slot's counts reach the host.
  RoutingParams own_routing() const { return own_routing_; }
  LowLatencyRouting low_latency_routing(uint32_t slot) const { return low_latency_routing_[slot]; }
  int32_t* host_counts(uint32_t slot) const { return host_counts_ + size_t{slot} * num_counts(); }
  uint64_t* host_count_words(uint32_t slot) const { return host_count_words_ + size_t{slot} * num_counts(); }
  size_t num_counts() const { return 2 + num_local_experts + options.num_ranks; }

 private:
  struct Pending {
    uint64_t seq = 0;
    int32_t op = 0;
    bool collective = false;
    uint64_t done_id = 0;
    uint64_t counts_id = 0;  // not yet queued; 0 afterwards
    int32_t counts_slot = -1;
    std::shared_ptr<Record> record = nullptr;  // its end, for those who may wait: it has a done_id, or was given an event
    std::shared_ptr<void> needs = nullptr;
  };
  // What look() has seen of the device.
  struct Seen {
    DeviceState state;
    int64_t wait_ns[2 * DEEPEP_MAX_RANKS];  // the state's as [2, num_ranks], dense
    uint64_t ended;                         // all operations up to this one had ended, and none was under way
  };
  // Something that ends when a record is done.
  struct Watched {
    std::shared_ptr<Record> record = nullptr;
    bool marked_last = false;  // after the records of all before it here that are of its stream
    uint64_t id = 0;
    std::shared_ptr<void> needs = nullptr;
    std::function<void()> done = nullptr;
    bool is_replay = false;
    bool needs_peers = false;  // a replay
    std::shared_ptr<const Status> failure = nullptr;  // of a replay, or of CUDA
    uint64_t first_epoch = 0, end_epoch = 0;          // of a replay's collective calls: first … end - 1
    bool ended = false;
  };

  Buffer() = default;
  void allocate(const deepep_buffer_create_args& args);
  void fill_call();
  void wait_for(const std::shared_ptr<Record>& record, cudaStream_t stream, CaptureId capture);
  // Makes `next` wait for the last operation, which may have run on another stream. Whoever then launches there sets last_.
  void follow(cudaStream_t next);
  bool is_own(cudaStream_t stream) const;
  CaptureId check_capture(const StreamFields& fields, const Enqueued& what, cudaStream_t stream);
  CallParams call_params(const StreamFields& fields, const Enqueued& what, CaptureId capture);
  bool has_news() const;
  void reap_ended(uint64_t ended_seq);
  void reap_captured();
  // Hands out the counts of a dispatch as far as they have come; whether all have.
  bool take_counts(const Pending& op);
  std::shared_ptr<const Status> keep_finding(const Finding& finding, int32_t op, uint64_t id_0, uint64_t id_1);
  void blame_replay(uint64_t epoch, const std::shared_ptr<const Status>& status);
  void blame_later_replays();
  void blame_lost(uint64_t epoch);
  void finish(Pending& op, const Finding* finding);
  void finish(Pending& op, std::shared_ptr<const Status> status, int32_t counts_code);
  void poll_watched();
  void fail_everything(cudaError_t error);
  void note_pending();
  // The end of the operation with this done_id; one that is not pending has ended.
  std::shared_ptr<Record> end_of(uint64_t done_id);
  void look();
  uint64_t epoch_beyond(uint64_t ended) const;
  uint64_t shown_epoch() const;
  uint64_t seen_epoch() const;
  uint64_t shown_masked();
  uint64_t num_under_way() const;
  void update(UpdateParams params);

  std::unique_ptr<LiveBuffer> live_;  // goes last: with the last of all, memory that is kept goes too
  std::unique_ptr<Peers> peers_;
  std::shared_ptr<DeviceBlock> local_;    // what peers do not see: state, scratch, own routing
  HostState* host_ = nullptr;             // pinned, from pinned_pool, as is the next
  uint64_t* host_count_words_ = nullptr;  // [num_slots, num_counts()]; the device's: host_count()
  int32_t* host_counts_ = nullptr;        // likewise, behind them in the same block; the caller's
  Seen seen_ = {};
  DeviceState* state_ = nullptr;
  RoutingParams own_routing_ = {};
  LowLatencyRouting low_latency_routing_[kMaxSlots] = {};
  CallParams call_ = {};  // what does not change from call to call
  cudaStream_t comm_ = nullptr;
  cudaStream_t last_ = nullptr;        // where the last operation was launched: comm_, or a stream of deepep_stream_create
  std::shared_ptr<Record> last_end_;   // its end, where that is not comm_
  cudaEvent_t order_event_ = nullptr;  // recorded again and again: a wait takes what it has recorded then

  // Under mutex.
  uint64_t seq_ = 0;  // operations enqueued so far
  std::deque<Pending> pending_;
  std::vector<Watched> watched_;
  uint64_t failures_seen_ = 0, captured_failures_seen_ = 0;
  uint64_t epoch_ = 0;               // of the last collective call enqueued, with those of the replays enqueued here
  uint64_t masked_ = 0;              // what deepep_mask and recoveries come to, while an update is under way
  std::shared_ptr<Record> updated_;  // the end of the last update
  CaptureId capture_ = 0;            // that the communication stream has joined last
  std::vector<std::shared_ptr<void>> kept_for_good_;
  bool failed_ = false;
  int32_t failed_peer_ = -1;
  Failure first_failure_;  // what made the buffer fail; of use while `failed_`
  bool is_lost_ = false;   // CUDA itself has failed
  std::vector<cudaStream_t> streams_;
  std::unordered_set<uint64_t> events_;

  // Looked at without it.
  std::atomic<uint32_t> num_pending_{0};  // pending_ and watched_
  std::atomic<uint32_t> num_watched_{0};
  std::atomic<uint64_t> reaped_ended_{0}, reaped_captured_failures_{0};
  std::atomic<const uint64_t*> awaited_count_{nullptr};  // the first of the counts that are awaited
  std::atomic<uint64_t> awaited_seq_{0};                 // of the operation that they are of
  std::atomic<bool> is_captured_{false};                 // replays may run at any time, without this library's doing
};

}  // namespace deepep
