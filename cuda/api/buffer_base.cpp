// What all buffers have in common; see buffer_base.hpp.

#include "buffer_base.hpp"

#include "../common/failure.hpp"
#include "../common/partition.hpp"
#include "options.hpp"

namespace deepep {

void BufferBase::take_options(uint64_t device, const deepep_buffer_create_args& args) {
  options = checked_options(device, args);
  if (args.queue) queue_use_.begin(args.queue);
  regions = make_regions(options);
  rank = args.rank;
  const ExpertRange experts = local_experts(options.num_experts, options.num_ranks, args.rank);
  first_expert = experts.first;
  num_local_experts = experts.count;
  mask_on_timeout = (args.flags & DEEPEP_BUFFER_MASK_ON_TIMEOUT) != 0;
  queue_ = args.queue;
  slots.resize(options.num_slots);
}

void BufferBase::tell_sizes(deepep_buffer_create_args& args) {
  fill_sizes(args, options);
  timeout_ns = uint64_t{args.timeout_ms} * 1'000'000;
}

void BufferBase::check_handle(const deepep_peer_handle& handle) const {
  compare_options(handle, options, rank);
  if (handle.rank >= options.num_ranks) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "the handle's rank is %u, num_ranks %u", handle.rank, options.num_ranks);
  }
}

void BufferBase::fill_facts(deepep_buffer_info& out) const {
  out.rank = rank;
  out.num_ranks = options.num_ranks;
  out.num_local_experts = num_local_experts;
  out.first_local_expert = first_expert;
  out.free_slots = slots.free_bits();
  out.max_recv_tokens = options.max_recv_tokens;
}

void BufferBase::check_open() const {
  if (closed_) reject(DEEPEP_ERROR_CLOSED, "the buffer was destroyed");
}

void BufferBase::check_usable() const {
  check_open();
  if (!connected_) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "the buffer is not connected");
}

void BufferBase::check_id(uint64_t id, const char* name) const {
  if (id == 0 || queue_ != 0) return;
  reject(DEEPEP_ERROR_INVALID_ARGUMENT, "%s is %llu, but the buffer has no completion queue", name,
         static_cast<unsigned long long>(id));
}

void BufferBase::complete(uint64_t id, int32_t code) const {
  if (id != 0 && queue_ != 0) queue_push(queue_, id, code);
}

}  // namespace deepep
