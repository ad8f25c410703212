// How a buffer learns that operations have ended: Buffer::reap. See buffer.hpp.
//
// In: what the device has written to pinned memory. Out, for each operation in order: its failure is kept, the buffer marked,
// the record of its event completed, and its ids queued. So whoever sees a completion finds everything else done. Words of
// HostState are read with acquire: each pairs with the release in call_end of the kernels.

#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "buffer.hpp"
#include "graph.hpp"
#include "read_device.hpp"
#include "watchdog.hpp"

namespace deepep {
namespace {

uint64_t load(const uint64_t& word) {
  return std::atomic_ref<uint64_t>(const_cast<uint64_t&>(word)).load(std::memory_order_acquire);
}

// The findings of captured calls from the `first`-th to the `end`-th. The device writes on meanwhile: `first` becomes that of
// the earliest which it has not come to again.
std::vector<Finding> copy_findings(const Findings<kMostCapturedKept>& findings, uint64_t& first, uint64_t end) {
  const auto intact_from = [](uint64_t written) { return written < kMostCapturedKept ? 0 : written - kMostCapturedKept + 1; };
  const uint64_t begin = std::max(first, intact_from(end));
  std::vector<Finding> copied;
  for (uint64_t i = begin; i < end; ++i) copied.push_back(findings.kept[i % kMostCapturedKept]);
  std::atomic_thread_fence(std::memory_order_acquire);  // What was copied was read before what follows.
  first = std::clamp(intact_from(load(findings.count)), begin, end);
  copied.erase(copied.begin(), copied.begin() + static_cast<std::ptrdiff_t>(first - begin));
  return copied;
}

// deepep_inject EXIT: as kill -9 would.
void heed_exit(HostState& host) {
  if (std::atomic_ref<uint32_t>(host.exit_requested).load(std::memory_order_acquire) == 0) return;
  kill(getpid(), SIGKILL);
  for (;;) pause();
}

}  // namespace

void Buffer::note_pending() {
  num_watched_.store(static_cast<uint32_t>(watched_.size()), std::memory_order_relaxed);
  num_pending_.store(static_cast<uint32_t>(pending_.size() + watched_.size()), std::memory_order_relaxed);
  // Operations run one after another: only the first that has not ended can have news of its counts.
  const bool awaits = !pending_.empty() && pending_.front().counts_id != 0;
  if (awaits) awaited_seq_.store(pending_.front().seq, std::memory_order_relaxed);
  awaited_count_.store(awaits ? host_count_words(static_cast<uint32_t>(pending_.front().counts_slot)) : nullptr,
                       std::memory_order_release);
}

bool Buffer::take_counts(const Pending& op) {
  if (op.counts_slot < 0) return false;
  const uint64_t* words = host_count_words(static_cast<uint32_t>(op.counts_slot));
  int32_t* counts = host_counts(static_cast<uint32_t>(op.counts_slot));
  bool all_came = true;
  for (size_t i = 0; i < num_counts(); ++i) {
    const uint64_t word = load(words[i]);
    if (is_host_count_of(word, op.seq))
      counts[i] = static_cast<int32_t>(word);
    else
      all_came = false;
  }
  return all_came;
}

bool Buffer::has_news() const {
  const uint64_t* count = awaited_count_.load(std::memory_order_acquire);
  return load(host_->ended_seq) != reaped_ended_.load(std::memory_order_relaxed) ||
         (count && is_host_count_of(load(*count), awaited_seq_.load(std::memory_order_relaxed))) ||
         load(host_->captured_failures.count) != reaped_captured_failures_.load(std::memory_order_relaxed) ||
         num_watched_.load(std::memory_order_relaxed) != 0;
}

void Buffer::poll() noexcept {
  if (closed_.load(std::memory_order_relaxed) || !has_news()) return;
  const std::lock_guard lock(mutex);
  if (closed_) return;
  try {
    reap();
  } catch (...) {
    // What could not be noted now is noted at the next look.
  }
}

void Buffer::reap() {
  heed_exit(*host_);
  const uint64_t ended = load(host_->ended_seq);
  reap_ended(ended);
  if (!pending_.empty() && pending_.front().counts_id != 0 && take_counts(pending_.front())) {
    complete(std::exchange(pending_.front().counts_id, 0), DEEPEP_OK);
  }
  reaped_ended_.store(ended, std::memory_order_relaxed);
  if (!watched_.empty()) poll_watched();
  note_pending();
}

// Ends the operations up to `ended`, each with its finding if it has one. Findings are in the order of the operations.
void Buffer::reap_ended(uint64_t ended) {
  reap_captured();  // Why operations have found that the buffer needs a recovery may be there.
  const uint64_t num_failures = load(host_->failures.count);  // after ended_seq: what has ended has left its finding
  while (!pending_.empty() && pending_.front().seq <= ended) {
    Pending op = std::move(pending_.front());
    pending_.pop_front();
    const Finding next = failures_seen_ < num_failures ? host_->failures.kept[failures_seen_ % kMostPending] : Finding{};
    const bool found = next.seq == op.seq;
    if (found) failures_seen_ += 1;
    finish(op, found ? &next : nullptr);
  }
  if (failed_) blame_later_replays();
}

// Notes the failures of captured calls.
void Buffer::reap_captured() {
  const uint64_t end = load(host_->captured_failures.count);
  uint64_t first = captured_failures_seen_;
  if (first == end) return;
  const std::vector<Finding> findings = copy_findings(host_->captured_failures, first, end);
  const uint64_t seen = std::exchange(captured_failures_seen_, end);
  reaped_captured_failures_.store(end, std::memory_order_relaxed);
  if (first != seen) blame_lost(findings.empty() ? load(host_->epoch) : findings.front().epoch);
  for (const Finding& finding : findings) keep_finding(finding, finding.op, 0, 0);
}

// The device has overwritten findings of captured calls that nobody has looked at in time. These were refused: one that has
// left the buffer to be recovered is the last to be told. Any replay under way that began before `epoch` may have had some.
void Buffer::blame_lost(uint64_t epoch) {
  Failure failure;
  failure.code = DEEPEP_ERROR_ABORTED;
  set_message(failure, "so many captured calls were refused that it is not known any more whether this replay's were");
  for (Watched& watched : watched_) {
    if (!watched.needs_peers || watched.failure || watched.first_epoch > epoch) continue;
    watched.failure = std::make_shared<Status>(Status{failure, watched.first_epoch});
  }
}

// Keeps a failure, and marks the buffer when something was left half-way.
std::shared_ptr<const Status> Buffer::keep_finding(const Finding& finding, int32_t op, uint64_t id_0, uint64_t id_1) {
  Failure failure = finding.reason == Reason::needs_recovery && first_failure_.code != 0 ? needs_recovery(first_failure_, rank)
                                                                                         : describe(finding, rank);
  failure.op = op;
  auto status = std::make_shared<Status>(Status{failure, finding.epoch});
  statuses.keep(id_0, id_1, status);
  if (needs_peers(op) && finding.agreed == 0 && !is_harmless(finding.code)) {
    failed_ = true;
    failed_peer_ = finding.peer;
    first_failure_ = failure;
  }
  // One that is not collective has no epoch: it has failed after the calls that had ended then.
  const uint64_t epoch = finding.epoch == 0 && finding.agreed == 0 ? host_->failed_epoch : finding.epoch;
  if (finding.seq == 0) blame_replay(epoch, status);
  return status;
}

// A call that was captured has failed: of the replay with its epoch. Where that cannot be told, since the call was not
// collective or others start replays too, of the oldest under way that has not failed yet.
void Buffer::blame_replay(uint64_t epoch, const std::shared_ptr<const Status>& status) {
  Watched* blamed = nullptr;
  for (Watched& watched : watched_) {
    if (!watched.is_replay) continue;
    if (epoch >= watched.first_epoch && epoch < watched.end_epoch) {
      blamed = &watched;
      break;
    }
    if (!blamed && !watched.failure) blamed = &watched;
  }
  if (blamed && !blamed->failure) blamed->failure = status;
}

// Replays that began after the failure find that the buffer needs a recovery, and say nothing.
void Buffer::blame_later_replays() {
  for (Watched& watched : watched_) {
    if (!watched.needs_peers || watched.failure || watched.first_epoch <= host_->failed_epoch) continue;
    watched.failure = std::make_shared<Status>(Status{needs_recovery(first_failure_, rank), watched.first_epoch});
  }
}

void Buffer::finish(Pending& op, const Finding* finding) {
  if (!finding) return finish(op, nullptr, DEEPEP_OK);
  // A dispatch that has failed after its counts were known has filled them.
  const bool counted = op.op == DEEPEP_OP_DISPATCH && finding->phase > DEEPEP_PHASE_NOTIFY &&
                       !(finding->reason == Reason::stalled && finding->phase == DEEPEP_PHASE_SEND);
  if (!counted && op.counts_slot >= 0) {
    std::fill_n(host_counts(static_cast<uint32_t>(op.counts_slot)), num_counts(), 0);
  }
  finish(op, keep_finding(*finding, op.op, op.done_id, op.counts_id), counted ? DEEPEP_OK : finding->code);
}

void Buffer::finish(Pending& op, std::shared_ptr<const Status> status, int32_t counts_code) {
  const int32_t code = status ? status->failure.code : DEEPEP_OK;
  op.needs = nullptr;  // It goes before anybody is told that the operation has ended.
  take_counts(op);     // Those of rows that will not come have changed.
  if (op.record) op.record->complete(std::move(status));
  complete(op.counts_id, counts_code);
  complete(op.done_id, code);
}

void Buffer::poll_watched() {
  bool has_replay = false;
  std::vector<unsigned long long> busy;  // streams that have not come to one of their records: nor to those marked later
  for (Watched& watched : watched_) {
    const unsigned long long stream = watched.record->stream();
    if (watched.marked_last && std::ranges::find(busy, stream) != busy.end()) continue;
    try {
      watched.ended = watched.record->done();
    } catch (const Rejected& rejected) {
      // CUDA has failed: nothing will come any more.
      watched.ended = true;
      if (!watched.failure) watched.failure = std::make_shared<Status>(Status{rejected.failure, 0});
    }
    if (!watched.ended) busy.push_back(stream);
    has_replay |= watched.ended && watched.is_replay;
  }
  // Once more: a replay that was not over at the last look may have failed since, and left its finding before its end.
  if (has_replay) reap_ended(load(host_->ended_seq));
  std::vector<Watched> ended;
  for (size_t i = 0; i < watched_.size();) {
    if (!watched_[i].ended) {
      ++i;
      continue;
    }
    ended.push_back(std::move(watched_[i]));
    watched_.erase(watched_.begin() + static_cast<std::ptrdiff_t>(i));
  }
  for (Watched& watched : ended) {
    if (watched.is_replay || watched.failure) watched.record->complete(watched.failure);
    const auto failure = watched.record->failure();
    if (failure && watched.id != 0) statuses.keep(watched.id, 0, failure);
    watched.needs = nullptr;
    if (watched.done) watched.done();
    complete(watched.id, failure ? failure->failure.code : DEEPEP_OK);
  }
}

std::shared_ptr<Record> Buffer::end_of(uint64_t done_id) {
  for (const Pending& op : pending_) {
    if (op.done_id == done_id) return op.record;
  }
  auto ended = std::make_shared<Record>(device->index);
  ended->belong_to_operation();
  ended->complete(statuses.find(done_id));
  return ended;
}

void Buffer::complete_when_done(std::shared_ptr<Record> record, uint64_t id) {
  watched_.push_back({.record = std::move(record), .id = id});
  note_pending();
  watchdog_wake();
}

void Buffer::call_when_done(std::shared_ptr<Record> record, std::function<void()> done) {
  watched_.push_back({.record = std::move(record), .marked_last = true, .done = std::move(done)});
  note_pending();
  watchdog_wake();
}

void Buffer::note_replay(std::shared_ptr<Record> ended, uint64_t done_id, std::shared_ptr<Graph> graph) {
  const uint64_t num_collective = graph->num_collective;
  if (num_under_way() == 0) epoch_ = shown_epoch();  // Others may have started replays meanwhile.
  watched_.push_back({.record = std::move(ended),
                      .marked_last = true,
                      .id = done_id,
                      .needs = graph,
                      .is_replay = true,
                      .needs_peers = graph->needs_peers,
                      .first_epoch = epoch_ + 1,
                      .end_epoch = epoch_ + 1 + num_collective});
  epoch_ += num_collective;
  note_pending();
  watchdog_wake();
}

std::shared_ptr<const Status> Buffer::status(uint64_t id) {
  const std::lock_guard lock(mutex);
  if (!closed_) reap();
  return statuses.find(id);
}

uint64_t Buffer::num_under_way() const {
  uint64_t replays = 0;
  for (const Watched& watched : watched_) replays += watched.is_replay ? 1 : 0;
  return pending_.size() + replays;
}

// Collective calls enqueued so far, of which the device has ended `ended`: others may start replays, too.
uint64_t Buffer::epoch_beyond(uint64_t ended) const {
  for (const Pending& op : pending_) ended += op.collective ? 1 : 0;
  return ended > epoch_ ? ended : epoch_;
}

// As far as the host has heard.
uint64_t Buffer::shown_epoch() const { return is_captured_ ? epoch_beyond(load(host_->epoch)) : epoch_; }

// As of the last look, where replays tell the host nothing: low latency has no time for it.
uint64_t Buffer::seen_epoch() const { return is_captured_ ? epoch_beyond(seen_.state.epoch) : epoch_; }

// The device knows best, but for what is still under way to it.
uint64_t Buffer::shown_masked() {
  if (updated_ && updated_->done()) updated_ = nullptr;
  return updated_ ? masked_ : load(host_->masked);
}

// What the device has counted, as of now, into seen_: a call's end tells the host no more than it must, because the next kernel
// waits for that. The copy needs no multiprocessor, so kernels that spin do not hold it up; rejects when something else does.
void Buffer::look() {
  constexpr uint64_t kUnknown = ~uint64_t{0};
  if (is_lost_) reject(DEEPEP_ERROR_SYSTEM, "%s", first_failure_.message);
  const uint64_t ended = pending_.empty() && !is_captured_ ? seq_ : kUnknown;
  if (ended == seen_.ended && ended != kUnknown) return;
  static_assert(sizeof(DeviceState) <= kMostRead);
  read_device(device->index, &seen_.state, state_, sizeof(DeviceState));
  for (uint32_t kind = 0; kind < 2; ++kind) {
    for (uint32_t r = 0; r < options.num_ranks; ++r) {
      seen_.wait_ns[kind * options.num_ranks + r] = seen_.state.wait_ns[kind][r];
    }
  }
  seen_.ended = ended;
}

bool Buffer::watch() noexcept {
  const std::lock_guard lock(mutex);
  if (closed_ || !connected_) return false;
  try {
    use_device(device->index);
    const Relaxed relaxed;
    uint64_t lost = host_->lost;
    for (uint32_t peer = 0; peer < options.num_ranks; ++peer) {
      if (peer != rank && (lost >> peer & 1) == 0 && !peers_->alive(peer)) lost |= uint64_t{1} << peer;
    }
    // Pairs with the look of a kernel that waits: who sees a rank gone looks once more for what it has left.
    std::atomic_ref<uint64_t>(host_->lost).store(lost, std::memory_order_release);
    reap();
    if (num_pending_ != 0 && present_capture() == 0) {
      const cudaError_t error = cudaStreamQuery(comm_);
      if (error == cudaErrorNotReady)
        cudaGetLastError();
      else if (error != cudaSuccess)
        fail_everything(error);
    }
  } catch (...) {
    // The next look may have more luck.
  }
  return num_pending_ != 0 || is_captured_;
}

// CUDA itself has failed, by an illegal access or a machine's fault: no kernel of this process ends any more, or begins.
void Buffer::fail_everything(cudaError_t error) {
  cudaGetLastError();
  Failure failure;
  failure.code = DEEPEP_ERROR_SYSTEM;
  set_message(failure, "CUDA has failed in this process, which must be started anew: %s (%s)", cudaGetErrorString(error),
              cudaGetErrorName(error));
  is_lost_ = failed_ = true;
  failed_peer_ = static_cast<int32_t>(rank);
  first_failure_ = failure;
  while (!pending_.empty()) {
    Pending op = std::move(pending_.front());
    pending_.pop_front();
    failure.op = op.op;
    auto status = std::make_shared<Status>(Status{failure, 0});
    statuses.keep(op.done_id, op.counts_id, status);
    finish(op, std::move(status), DEEPEP_ERROR_SYSTEM);
  }
  for (Watched& watched : watched_) {
    auto status = std::make_shared<Status>(Status{failure, 0});
    watched.record->complete(status);
    watched.is_replay = false;
  }
  poll_watched();
  note_pending();
}

}  // namespace deepep
