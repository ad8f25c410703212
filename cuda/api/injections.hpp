// What deepep_inject has asked for and no operation has met yet.
//
// In: requests of any thread. Out: the request of an operation that enters a phase, once for each time it was asked for.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "../abi/deepep.h"

namespace deepep {

class Injections {
 public:
  // Replaces what was asked for the same phase of the same operation; a count of 0 takes it back.
  void set(const deepep_inject_args& args) {
    const std::lock_guard lock(mutex_);
    std::erase_if(kept_, [&](const auto& kept) { return kept.op == args.op && kept.phase == args.phase; });
    if (args.count != 0) kept_.push_back(args);
    size_ = static_cast<uint32_t>(kept_.size());
  }

  // Takes one off the count of a request. A load when there is none.
  bool take(int32_t op, int32_t phase, deepep_inject_args& out) {
    if (size_.load(std::memory_order_relaxed) == 0) return false;
    const std::lock_guard lock(mutex_);
    for (size_t i = 0; i < kept_.size(); ++i) {
      if (kept_[i].op != op || kept_[i].phase != phase) continue;
      out = kept_[i];
      if (--kept_[i].count == 0) kept_.erase(kept_.begin() + static_cast<std::ptrdiff_t>(i));
      size_ = static_cast<uint32_t>(kept_.size());
      return true;
    }
    return false;
  }

 private:
  std::mutex mutex_;
  std::atomic<uint32_t> size_{0};
  std::vector<deepep_inject_args> kept_;
};

}  // namespace deepep
