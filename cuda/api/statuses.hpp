// The failures that a buffer keeps for deepep_get_status: the last 64.
//
// In: the failure of an operation, under its ids. Out: the same, to whoever asks by id, or for the latest. Any thread.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>

#include "../common/failure.hpp"

namespace deepep {

// The record of an operation that failed, with its number.
struct Status {
  Failure failure;
  uint64_t epoch = 0;
};

class Statuses {
 public:
  // Keeps a failure under up to two ids; 0 is none.
  void keep(uint64_t id_0, uint64_t id_1, std::shared_ptr<const Status> status) {
    const std::lock_guard lock(mutex_);
    kept_[num_kept_++ % kept_.size()] = {{id_0, id_1}, std::move(status)};
  }

  // The failure with this id, or the latest for 0; nullptr when there is none.
  std::shared_ptr<const Status> find(uint64_t id) {
    const std::lock_guard lock(mutex_);
    const uint64_t oldest = num_kept_ > kept_.size() ? num_kept_ - kept_.size() : 0;
    for (uint64_t i = num_kept_; i-- > oldest;) {
      const Kept& kept = kept_[i % kept_.size()];
      if (id == 0 || kept.ids[0] == id || kept.ids[1] == id) return kept.status;
    }
    return nullptr;
  }

 private:
  struct Kept {
    uint64_t ids[2] = {};
    std::shared_ptr<const Status> status;
  };
  std::mutex mutex_;
  std::array<Kept, 64> kept_;
  uint64_t num_kept_ = 0;
};

}  // namespace deepep
