// The life cycle of a buffer and its failures: see buffer.hpp. How operations run is in run.cpp, how they end in reap.cpp.

#include "buffer.hpp"

#include <bit>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

#include "../api/checks.hpp"
#include "../api/options.hpp"
#include "../api/registry.hpp"
#include "../kernels/launch.hpp"
#include "graph.hpp"
#include "handle.hpp"
#include "low_latency_slot.hpp"
#include "watchdog.hpp"

namespace deepep {
namespace {

// What peers do not see, in one block: the state, scratch memory of the kernels, the routing of dispatches without a handle,
// and for each slot what low latency remembers.
struct Local {
  uint64_t scratch = 0, routing = 0, low_latency = 0, low_latency_bytes = 0, bytes = 0;

  explicit Local(const Options& options) {
    scratch = align_up(sizeof(DeviceState), kRegionAlignment);
    const uint64_t row = uint64_t{options.num_ranks} + options.num_experts;
    routing = align_up(scratch + (kScratchRows + kMaxBlocks) * row * sizeof(uint32_t), kRegionAlignment);
    low_latency = routing + handle_bytes(options);
    cut_low_latency_routing(nullptr, options, low_latency_bytes);
    bytes = low_latency + options.num_slots * low_latency_bytes;
  }
};

}  // namespace

uint64_t local_bytes(const Options& options) { return Local(options).bytes; }

uint64_t handle_bytes(const Options& options) {
  uint64_t bytes = 0;
  cut_routing(nullptr, options, options.max_tokens_per_rank, options.num_topk, bytes);
  return bytes;
}

std::shared_ptr<Buffer> Buffer::create(uint64_t device, deepep_buffer_create_args& args) {
  std::shared_ptr<Buffer> buffer(new Buffer);
  buffer->take_options(device, args);
  buffer->wanted_sms = args.num_sms;
  buffer->device = &prepare_device(device_of(device, args));
  if (args.num_sms > buffer->device->num_sms) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "num_sms is %d, %s has %d multiprocessors", args.num_sms,
           device_name(*buffer->device).c_str(), buffer->device->num_sms);
  }
  buffer->tell_sizes(args);
  buffer->allocate(args);
  watchdog_add(buffer);
  try {
    if (args.queue) queue_add_source(args.queue, buffer);
  } catch (...) {
    watchdog_forget(buffer);
    throw;
  }
  return buffer;
}

// Everything that the buffer will ever need, but for handles and what the user allocates.
void Buffer::allocate(const deepep_buffer_create_args& args) {
  const Relaxed relaxed;
  const int index = device->index;
  live_ = std::make_unique<LiveBuffer>();
  reserve_pinned();
  device_pool = std::make_unique<MemoryPool>(device_memory(index));
  pinned_pool = std::make_unique<MemoryPool>(pinned_memory());
  auto symmetric_block = DeviceBlock::allocate(index, args.symmetric_bytes, "symmetric memory");
  const Local layout(options);
  local_ = DeviceBlock::allocate(index, layout.bytes, "local memory");
  state_ = reinterpret_cast<DeviceState*>(local_->data());
  uint64_t routing_bytes = 0;
  own_routing_ =
      cut_routing(local_->data() + layout.routing, options, options.max_tokens_per_rank, options.num_topk, routing_bytes);
  own_routing_.name = 1;
  for (uint32_t slot = 0; slot < options.num_slots; ++slot) {
    uint8_t* const base = local_->data() + layout.low_latency + slot * layout.low_latency_bytes;
    uint64_t bytes = 0;
    low_latency_routing_[slot] = cut_low_latency_routing(base, options, bytes);
  }
  call_.scratch = reinterpret_cast<uint32_t*>(local_->data() + layout.scratch);
  host_ = new (pinned_pool->allocate_own(sizeof(HostState))) HostState{};
  const size_t num_words = options.num_slots * num_counts();
  const uint64_t counts_bytes = num_words * (sizeof(uint64_t) + sizeof(int32_t));
  host_count_words_ = static_cast<uint64_t*>(pinned_pool->allocate_own(counts_bytes));
  std::memset(host_count_words_, 0, counts_bytes);
  host_counts_ = reinterpret_cast<int32_t*>(host_count_words_ + num_words);
  comm_ = make_comm_stream(weak_from_this());
  streams_.push_back(comm_);
  last_ = comm_;
  order_event_ = make_order_event();
  // Flags are epochs, from 0; the rest must not show what was there before.
  DEEPEP_CUDA("clear memory", cudaMemsetAsync(symmetric_block->data(), 0, args.symmetric_bytes, comm_));
  DEEPEP_CUDA("clear memory", cudaMemsetAsync(local_->data(), 0, layout.bytes, comm_));
  // Pairs with the two fills only: nothing else was enqueued. Peers may write as soon as they have imported.
  DEEPEP_CUDA("clear memory", cudaStreamSynchronize(comm_));
  peers_ = std::make_unique<Peers>(options.num_ranks, rank, *device);
  peers_->publish_own(std::move(symmetric_block), regions.symmetric_bytes, wanted_sms);
}

Buffer::~Buffer() {
  // Matters only when creation failed half-way: destroy() has done it otherwise.
  for (const cudaStream_t stream : streams_) drop_stream(stream);
  if (order_event_ && cudaEventDestroy(order_event_) != cudaSuccess) cudaGetLastError();
}

void Buffer::export_handle(deepep_peer_handle& handle) {
  const std::lock_guard lock(mutex);
  check_open();
  handle.rank = rank;
  fill_options(handle, options);
  peers_->export_to(handle.bytes);
}

void Buffer::import_peer(const deepep_peer_handle& handle) {
  const std::lock_guard lock(mutex);
  check_open();
  check_handle(handle);
  peers_->import(handle.bytes, handle.rank);
}

void Buffer::connect() {
  const std::lock_guard lock(mutex);
  check_open();
  peers_->check_complete();
  const uint64_t here = peers_->ranks_on_device();
  topology = device->topology(static_cast<uint32_t>(std::popcount(here)));
  // For tests of the kernels that serve older devices: rows go by loads and stores here too.
  const char* const tma = getenv("DEEPEP_CUDA_TMA");
  if (tma && std::strcmp(tma, "0") == 0 && topology.compute_capability >= 90) topology.compute_capability = 89;
  const char* const early = getenv("DEEPEP_CUDA_EARLY");
  launches_early = device->launches_early && !(early && std::strcmp(early, "0") == 0);
  const uint64_t others = (~uint64_t{0} >> (64 - options.num_ranks)) & ~(uint64_t{1} << rank);
  turned_with = others & ~here;
  turned_tokens = kTurnedTokens;
  // For tests: ranks, as a bit mask, that do so among themselves on one GPU, and all of them however few tokens there are.
  const char* const turns = getenv("DEEPEP_CUDA_TURN_SCALES");
  const uint64_t turned = turns ? std::strtoull(turns, nullptr, 0) : 0;
  if ((turned >> rank & 1) != 0) turned_with |= others & turned, turned_tokens = 0;
  const uint32_t hops = options.num_topk < options.num_ranks ? options.num_topk : options.num_ranks;
  default_sms = plan({.op = DEEPEP_OP_DISPATCH, .row_bytes = options.max_row_bytes, .hops = hops}).sms;
  fill_call();
  connected_ = true;
}

void Buffer::fill_call() {
  call_.state = state_;
  call_.host = host_;  // Pinned memory has one address for host and device.
  for (uint32_t r = 0; r < options.num_ranks; ++r) call_.symmetric[r] = peers_->symmetric(r);
  call_.regions = regions;
  call_.options = options;
  call_.partition = Partition::of(options.num_experts, options.num_ranks);
  call_.rank = rank;
  call_.first_expert = first_expert;
  call_.num_local_experts = num_local_experts;
  call_.one_gpu = peers_->all_near() ? 1 : 0;
  call_.mask_on_timeout = mask_on_timeout ? 1 : 0;
}

// Ends what was made from this buffer, queues what is still to be queued, then says to the peers that it is gone, then lets go
// of their memory.
void Buffer::destroy() {
  std::vector<cudaStream_t> streams;
  std::unordered_set<uint64_t> events;
  {
    const std::lock_guard lock(mutex);
    if (closed_.exchange(true)) return;
    streams.swap(streams_);
    events.swap(events_);
    if (capturing) abandon_capture(*std::exchange(capturing, nullptr));
  }
  watchdog_forget(shared_from_this());
  for (const uint64_t event : events) retire_if_present(Kind::event, event);
  cudaError_t failure = cudaSetDevice(device->index);  // Goes on whatever it says: nobody can ask once more.
  for (const cudaStream_t stream : streams) {
    const Relaxed relaxed;
    // Operations have deadlines, and what they wait for was enqueued before.
    if (const cudaError_t error = cudaStreamSynchronize(stream); error != cudaSuccess) failure = error;
  }
  if (queue()) queue_remove_source(queue(), this);
  const std::lock_guard lock(mutex);
  reap();
  if (!pending_.empty()) fail_everything(failure);  // CUDA itself has failed: they will not end.
  for (Watched& watched : std::exchange(watched_, {})) {
    // Of streams that are not this buffer's: they may go on, but nobody will look after it any more.
    if (watched.done) watched.done();
    complete(watched.id, DEEPEP_OK);
  }
  note_pending();
  for (const cudaStream_t stream : streams) drop_stream(stream);
  for (Slot& slot : slots) slot = {};
  kept_for_good_.clear();
  updated_ = last_end_ = nullptr;
  last_ = comm_;
  peers_->leave();
  local_ = nullptr;
  pinned_pool->recycle(reinterpret_cast<uint64_t>(host_));
  pinned_pool->recycle(reinterpret_cast<uint64_t>(host_count_words_));
  live_ = nullptr;
  leave_queue();
}

void Buffer::info(deepep_buffer_info& out) {
  const std::lock_guard lock(mutex);
  check_open();
  reap();
  fill_facts(out);
  out.failed = failed_ ? 1 : 0;
  out.masked_ranks = shown_masked();
  out.epoch = shown_epoch();
  out.captured = is_captured_ ? 1 : 0;
  out.num_sms = default_sms;
  out.ranks_on_device = topology.ranks_on_device;
  out.comm_stream = reinterpret_cast<uint64_t>(comm_);
}

void Buffer::stats(deepep_buffer_stats& out) {
  const std::lock_guard lock(mutex);
  check_open();
  reap();
  look();
  out.epoch = seen_epoch();
  out.wait_ns = reinterpret_cast<uint64_t>(seen_.wait_ns);
  out.num_dispatches = seen_.state.num_dispatches;
  out.num_combines = seen_.state.num_combines;
  out.rows_sent = seen_.state.rows_sent;
  out.bytes_sent = seen_.state.bytes_sent;
  out.rows_pulled = seen_.state.rows_pulled;
  out.num_failures = seen_.state.num_failures;
}

void Buffer::recover(const deepep_buffer_recover_args& args) {
  const std::lock_guard lock(mutex);
  enter();
  if (is_captured_) look();
  check_recovery(*this, args, seen_epoch(), num_under_way());
  update({.call = {},
          .mask = args.masked_ranks,
          .unmask = 0,
          .epoch = args.epoch,
          .recover = 1,
          .clear_failed = 1});
  epoch_ = base_epoch = args.epoch;
  generation += 1;
  masked_ = args.masked_ranks;
  failed_peer_ = -1;
  failed_ = false;
}

void Buffer::mask(const deepep_mask_args& args) {
  const std::lock_guard lock(mutex);
  enter();
  check_mask(*this, args);
  const uint64_t bit = uint64_t{1} << args.rank;
  const bool mask_it = args.masked != 0;
  // What was enqueued before still ends with NEEDS_RECOVERY: the update comes after it.
  const bool forgives = mask_it && failed_ && failed_peer_ == static_cast<int32_t>(args.rank);
  const uint64_t before = shown_masked();
  update({.call = {},
          .mask = mask_it ? bit : 0,
          .unmask = mask_it ? 0 : bit,
          .epoch = 0,
          .recover = 0,
          .clear_failed = forgives ? 1u : 0u});
  masked_ = mask_it ? before | bit : before & ~bit;
  if (!forgives) return;
  generation += 1;
  failed_peer_ = -1;
  failed_ = false;
}

void Buffer::enter() {
  check_usable();
  use_device(device->index);
  reap();
  if (is_lost_) reject(DEEPEP_ERROR_SYSTEM, "%s", first_failure_.message);
}

void Buffer::check_good() const {
  if (!failed_) return;
  Rejected rejected{needs_recovery(first_failure_, rank)};
  throw rejected;
}

uint64_t Buffer::create_stream() {
  const std::lock_guard lock(mutex);
  check_open();
  use_device(device->index);
  streams_.reserve(streams_.size() + 1);
  const cudaStream_t stream = make_stream(weak_from_this());
  streams_.push_back(stream);
  return reinterpret_cast<uint64_t>(stream);
}

// All at once, since CUDA may give the number again, to any thread: destroy() never sees a stream that is gone, and a new one
// is never taken for it.
void Buffer::end_stream(uint64_t number) {
  const std::lock_guard lock(mutex);
  check_open();
  const auto stream = reinterpret_cast<cudaStream_t>(number);
  if (capturing && capturing->stream == stream) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "a graph was begun on the stream and not ended");
  }
  destroy_stream(number);
  std::erase(streams_, stream);
  if (last_ == stream) settle();
}

uint64_t Buffer::create_event(uint64_t done_id) {
  const std::lock_guard lock(mutex);
  check_open();
  auto event = std::make_shared<Event>();
  event->owner = weak_from_this();
  event->device = device->index;
  if (done_id != 0) event->set(end_of(done_id));
  const uint64_t id = publish(Kind::event, event);
  event->id = id;
  events_.insert(id);
  return id;
}

void Buffer::forget_event(uint64_t id) {
  const std::lock_guard lock(mutex);
  events_.erase(id);
}

}  // namespace deepep
