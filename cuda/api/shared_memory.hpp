// A rank's symmetric memory: an anonymous file that peers map, in this process or in another.
//
// In: a size, or the opaque bytes of a peer's handle. Out: a mapping, and an answer to "is its owner alive". The file has no
// name, so nothing is left behind after kill -9; pages are committed when touched, so sizes may be far beyond the memory.
// Peers in one process share one mapping. Peers in another open /proc/<pid>/fd/<fd> and check magic, nonce and size there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace deepep {

// The opaque bytes of a peer handle.
constexpr size_t kRegionHandleBytes = 256;

class SharedMemory {
 public:
  // New memory, all zeros. Rejects with OUT_OF_MEMORY or SYSTEM.
  static std::shared_ptr<SharedMemory> create(uint64_t bytes);
  // A peer's memory. Rejects with INVALID_ARGUMENT, PEER_LOST or SYSTEM, naming `rank`.
  static std::shared_ptr<SharedMemory> import(const char (&handle)[kRegionHandleBytes], uint64_t bytes, uint32_t rank);

  ~SharedMemory();
  SharedMemory(const SharedMemory&) = delete;
  SharedMemory& operator=(const SharedMemory&) = delete;

  // The first byte that a rank may use, on a page boundary.
  uint8_t* data() const;
  uint64_t bytes() const { return bytes_; }
  void export_to(char (&handle)[kRegionHandleBytes]) const;

  // Says to all who map it that the owner is gone. Only the owner calls it.
  void retire();
  // False once the owner has retired it or its process has ended (a zombie has ended). A system call at most.
  bool alive() const;

 private:
  SharedMemory() = default;
  struct Header;

  uint8_t* base_ = nullptr;  // the header's page, then the data
  uint64_t bytes_ = 0;       // of data
  int fd_ = -1;              // of the file, in the owner only
  int pidfd_ = -1;           // of the owner's process, in importers of another process
  int32_t pid_ = 0;          // of the owner
  uint64_t start_time_ = 0;  // of the owner, in clock ticks since boot
  uint64_t nonce_[2] = {};
};

}  // namespace deepep
