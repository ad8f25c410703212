// What the buffers of all backends have in common: options and what follows from them, slots, failures, and whether the buffer
// can be used.
//
// In: deepep_buffer_create_args, peers' handles. Out: facts, and rejections in the same words. Each backend's Buffer derives
// from it and adds memory and streams.
#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>

#include "../abi/deepep.h"
#include "../common/regions.hpp"
#include "injections.hpp"
#include "queue.hpp"
#include "slots.hpp"
#include "statuses.hpp"

namespace deepep {

class BufferBase {
 public:
  // Facts. They do not change.
  Options options;
  Regions regions;
  uint32_t rank = 0;
  uint32_t first_expert = 0;
  uint32_t num_local_experts = 0;
  bool mask_on_timeout = false;
  uint64_t timeout_ns = 0;

  std::mutex mutex;
  uint64_t generation = 0;  // under mutex: failures that have ended so far, by a recovery or by a mask; and other recoveries
  Slots slots;              // under mutex
  Statuses statuses;
  Injections injections;

  // Reject with CLOSED; check_usable also before connect(). Hold `mutex` where the answer must last.
  void check_open() const;
  void check_usable() const;
  // Rejects an id other than 0 when the buffer has no completion queue.
  void check_id(uint64_t id, const char* name) const;
  // Queues a completion now; id 0 is none.
  void complete(uint64_t id, int32_t code) const;
  uint64_t queue() const { return queue_; }

 protected:
  BufferBase() = default;
  ~BufferBase() = default;
  // The first and the second part of a creation: checks options and queue, then writes the [out] sizes.
  void take_options(uint64_t device, const deepep_buffer_create_args& args);
  void tell_sizes(deepep_buffer_create_args& args);
  // Rejects a handle of a rank that there is not, or with other options.
  void check_handle(const deepep_peer_handle& handle) const;
  // The last part of a destruction: nothing is queued any more.
  void leave_queue() { queue_use_.end(); }
  // Writes what does not depend on the backend. The caller holds `mutex`.
  void fill_facts(deepep_buffer_info& out) const;

  std::atomic<bool> connected_{false};
  std::atomic<bool> closed_{false};

 private:
  uint64_t queue_ = 0;  // also after its use has ended, when other threads may still look
  QueueUse queue_use_;
};

}  // namespace deepep
