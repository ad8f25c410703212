// The life cycle of a buffer, its failures and its injections: see buffer.hpp. How operations run is in buffer_run.cpp.

#include "buffer.hpp"

#include <signal.h>
#include <string.h>
#include <unistd.h>

#include <chrono>
#include <thread>
#include <utility>

#include "../api/checks.hpp"
#include "../api/options.hpp"
#include "../api/registry.hpp"
#include "expert_region.hpp"

namespace deepep {

std::shared_ptr<Buffer> Buffer::create(uint64_t device, deepep_buffer_create_args& args) {
  std::shared_ptr<Buffer> buffer(new Buffer);
  buffer->take_options(device, args);
  const Options& options = buffer->options;
  buffer->peers_.resize(options.num_ranks);
  buffer->peers_[args.rank] = SharedMemory::create(buffer->regions.symmetric_bytes);
  void* const wait_ns = buffer->memory.allocate_own(local_bytes(options));
  memset(wait_ns, 0, local_bytes(options));
  buffer->wait_ns_ = static_cast<int64_t*>(wait_ns);
  buffer->tell_sizes(args);
  buffer->comm_ = Stream::start("ep" + std::to_string(args.rank) + "-comm");
  buffer->comm_->owned_by_buffer = true;
  buffer->comm_->owner = buffer;
  buffer->comm_->id = publish(Kind::stream, buffer->comm_);
  buffer->streams_.push_back(buffer->comm_);
  return buffer;
}

Buffer::~Buffer() {
  if (!comm_) return;
  retire_if_present(Kind::stream, comm_->id);
  comm_->close();  // Matters only when creation failed half-way: destroy() has done it otherwise.
}

void Buffer::export_handle(deepep_peer_handle& handle) {
  const std::lock_guard lock(mutex);
  check_open();
  handle.rank = rank;
  fill_options(handle, options);
  peers_[rank]->export_to(handle.bytes);
}

void Buffer::import_peer(const deepep_peer_handle& handle) {
  const std::lock_guard lock(mutex);
  check_open();
  check_handle(handle);
  if (handle.rank != rank && peers_[handle.rank]) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "rank %u was imported already", handle.rank);
  }
  auto memory_of_peer = SharedMemory::import(handle.bytes, regions.symmetric_bytes, handle.rank);
  if (handle.rank == rank) {
    if (memory_of_peer != peers_[rank]) {
      reject(DEEPEP_ERROR_MISMATCH, "rank %u is this rank, but the handle is another buffer's: two ranks have one number",
             rank);
    }
    return;
  }
  if (!memory_of_peer->alive()) reject(DEEPEP_ERROR_PEER_LOST, "the buffer of rank %u was destroyed", handle.rank);
  peers_[handle.rank] = std::move(memory_of_peer);
}

void Buffer::connect() {
  const std::lock_guard lock(mutex);
  check_open();
  for (uint32_t r = 0; r < options.num_ranks; ++r) {
    if (!peers_[r]) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "rank %u was not imported", r);
  }
  connected_ = true;
}

// Ends what was made from this buffer, then says to the peers that it is gone, then lets go of their memory.
void Buffer::destroy() {
  std::vector<std::shared_ptr<Stream>> streams;
  std::unordered_set<uint64_t> events;
  {
    const std::lock_guard lock(mutex);
    if (closed_.exchange(true)) return;
    streams = streams_;
    events.swap(events_);
  }
  for (const uint64_t event : events) retire_if_present(Kind::event, event);
  for (const auto& stream : streams) {
    retire_if_present(Kind::stream, stream->id);
    stream->close();
  }
  // Pairs with the end of each stream's thread: its operations have deadlines, and what it waits for was enqueued before.
  for (const auto& stream : streams) stream->join();
  const std::lock_guard lock(mutex);
  streams_.clear();
  peers_[rank]->retire();
  peers_.clear();
  for (Slot& slot : slots) slot = {};
  leave_queue();
}

void Buffer::info(deepep_buffer_info& out) {
  const std::lock_guard lock(mutex);
  check_open();
  fill_facts(out);
  out.failed = failed ? 1 : 0;
  out.num_sms = 0;
  out.ranks_on_device = options.num_ranks;  // one PID namespace, so one machine
  out.masked_ranks = masked_next_;
  out.epoch = epoch;
  out.captured = 0;
  out.comm_stream = comm_->id;
}

void Buffer::stats(deepep_buffer_stats& out) {
  const std::lock_guard lock(mutex);
  check_open();
  out.epoch = epoch;
  out.wait_ns = reinterpret_cast<uint64_t>(wait_ns_);
  out.num_dispatches = counters.num_dispatches;
  out.num_combines = counters.num_combines;
  out.rows_sent = counters.rows_sent;
  out.bytes_sent = counters.bytes_sent;
  out.rows_pulled = counters.rows_pulled;
  out.num_failures = counters.num_failures;
}

void Buffer::recover(const deepep_buffer_recover_args& args) {
  const std::lock_guard lock(mutex);
  check_usable();
  check_recovery(*this, args, epoch, num_pending_);
  // In stream order, after what deepep_mask may have enqueued.
  const bool pushed = comm_->push([this, ranks = args.masked_ranks] { masked = ranks; });
  if (!pushed) reject(DEEPEP_ERROR_CLOSED, "the buffer was destroyed");
  epoch = args.epoch;
  base_epoch = args.epoch;
  masked_next_ = args.masked_ranks;
  // Nobody reads what earlier combines left in the slots: no survivor has work enqueued.
  for (Readers& of_slot : readers) of_slot = {};
  generation += 1;
  failed_peer_ = -1;
  failed = false;
}

void Buffer::mask(const deepep_mask_args& args) {
  const std::lock_guard lock(mutex);
  check_usable();
  check_mask(*this, args);
  const bool mask_it = args.masked != 0;
  const uint64_t bit = uint64_t{1} << args.rank;
  const bool forgives = mask_it && failed && failed_peer_ == static_cast<int32_t>(args.rank);
  const bool pushed = comm_->push([self = this, bit, mask_it, forgiven = forgives ? epoch : 0] {
    if (mask_it) {
      self->masked.fetch_or(bit);
    } else {
      self->masked.fetch_and(~bit);
    }
    if (forgiven != 0) end_all_reading(*self, forgiven);
  });
  if (!pushed) reject(DEEPEP_ERROR_CLOSED, "the buffer was destroyed");
  masked_next_ = mask_it ? masked_next_ | bit : masked_next_ & ~bit;
  if (!forgives) return;
  // What was enqueued before still ends with NEEDS_RECOVERY: the generation tells it from what comes now.
  generation += 1;
  failed_peer_ = -1;
  failed = false;
}

void Buffer::mask_now(uint32_t peer) {
  const std::lock_guard lock(mutex);
  masked_next_ |= uint64_t{1} << peer;
  masked.fetch_or(uint64_t{1} << peer);
}

uint64_t Buffer::create_stream() {
  const std::lock_guard lock(mutex);
  check_open();
  std::erase_if(streams_, [](const auto& stream) { return stream->has_ended(); });
  streams_.reserve(streams_.size() + 1);
  auto stream = Stream::start("ep" + std::to_string(rank) + "-s" + std::to_string(streams_made_++));
  stream->owner = weak_from_this();
  streams_.push_back(stream);
  stream->id = publish(Kind::stream, stream);
  return stream->id;
}

uint64_t Buffer::create_event(uint64_t done_id) {
  const std::lock_guard lock(mutex);
  check_open();
  auto event = std::make_shared<Event>();
  event->owner = weak_from_this();
  if (done_id != 0) event->set(end_of(done_id));
  const uint64_t id = publish(Kind::event, event);
  event->id = id;
  events_.insert(id);
  return id;
}

std::shared_ptr<Record> Buffer::end_of(uint64_t done_id) {
  if (const auto found = ends_.find(done_id); found != ends_.end()) return found->second;
  auto ended = std::make_shared<Record>();
  ended->ends_on = comm_.get();
  ended->complete(statuses.find(done_id));
  return ended;
}

void Buffer::forget_event(uint64_t id) {
  const std::lock_guard lock(mutex);
  events_.erase(id);
}

bool inject(Operation& op, int32_t phase) {
  op.phase = phase;
  deepep_inject_args injection;
  if (!op.buffer.injections.take(op.op, phase, injection)) return true;
  if (injection.action == DEEPEP_INJECT_DELAY) {
    std::this_thread::sleep_for(std::chrono::microseconds(injection.delay_us));
    return true;
  }
  if (injection.action == DEEPEP_INJECT_EXIT) {
    kill(getpid(), SIGKILL);
    for (;;) pause();
  }
  // STALL: half as long again as the deadline, so that the peers' own deadlines, which began later, have passed too and
  // each of them finds out by itself.
  const uint64_t stall_ns = op.timeout_ns + op.timeout_ns / 2;
  std::this_thread::sleep_for(std::chrono::nanoseconds(stall_ns));
  op.fail({.code = DEEPEP_ERROR_TIMEOUT,
           .peer = static_cast<int32_t>(op.buffer.rank),
           .reason = Reason::stalled,
           .waited_ns = static_cast<int64_t>(stall_ns)});
  return false;
}

// i64 wait_ns [2, num_ranks].
uint64_t local_bytes(const Options& options) { return align_up(2 * sizeof(int64_t) * options.num_ranks, kRegionAlignment); }

uint64_t handle_bytes(const Options&) { return 0; }

}  // namespace deepep
