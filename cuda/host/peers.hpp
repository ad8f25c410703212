// The ranks of a buffer, as this rank reaches them: their symmetric memory, whether they live, and which GPU they use.
//
// In: a rank's own memory and facts, which it exports in a page of shared memory; peers' handles. Out: addresses valid on this
// rank's device. A rank in this process is reached by its plain pointer, and its block held alive; one in another process by
// CUDA IPC. The page tells also, by its owner's process, whether a peer is alive. Caller: the life cycle of a buffer.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../api/shared_memory.hpp"
#include "device.hpp"
#include "memory.hpp"

namespace deepep {

// What a rank says about itself.
struct PeerPage {
  uint64_t magic;
  uint64_t symmetric_bytes;
  uint64_t address;  // of its symmetric memory, in its process
  int32_t pid;
  int32_t device;      // its index there
  int32_t num_sms;     // of the device
  int32_t wanted_sms;  // its buffer's num_sms; 0 = the plan's choice
  int32_t compute_capability;
  uint32_t mapped;  // set by who maps it from another process
  char uuid[16];    // of the device
  char ipc[64];     // cudaIpcMemHandle_t; all zeros where the driver has no IPC
};

class Peers {
 public:
  Peers(uint32_t num_ranks, uint32_t rank, const Device& device) : device_(device), rank_(rank), peers_(num_ranks) {}

  // Makes this rank's page. Call first.
  void publish_own(std::shared_ptr<DeviceBlock> memory, uint64_t symmetric_bytes, int32_t wanted_sms);
  // The opaque bytes of this rank's handle.
  void export_to(char (&handle)[kRegionHandleBytes]) const { peers_[rank_].page->export_to(handle); }
  // Maps a peer's memory; the own rank is only checked. Rejects a rank that was imported already, is gone, is a rank of another
  // buffer than this one's, or cannot be reached, saying why.
  void import(const char (&handle)[kRegionHandleBytes], uint32_t rank);
  // Rejects unless every rank was imported.
  void check_complete() const;

  uint8_t* symmetric(uint32_t rank) const { return peers_[rank].symmetric; }
  // False once the rank's buffer was destroyed or its process has ended. A system call.
  bool alive(uint32_t rank) const { return peers_[rank].page->alive(); }
  const PeerPage& page(uint32_t rank) const { return page_of(*peers_[rank].page); }
  // Ranks that use this rank's device, itself included: bit r is rank r's.
  uint64_t ranks_on_device() const;
  // Whether all ranks use it, from this process.
  bool all_near() const;

  // Says to the peers that this rank is gone, then lets go of their memory. Nothing of this rank runs any more.
  void leave();

 private:
  struct Peer {
    std::shared_ptr<SharedMemory> page;
    std::shared_ptr<DeviceBlock> block;   // of a rank in this process
    std::shared_ptr<IpcMapping> mapping;  // of a rank in another
    uint8_t* symmetric = nullptr;
  };
  static PeerPage& page_of(const SharedMemory& page) { return *reinterpret_cast<PeerPage*>(page.data()); }
  void check_reach(const PeerPage& page, uint32_t rank) const;
  void enable_access(int other) const;

  const Device& device_;
  const uint32_t rank_;
  std::vector<Peer> peers_;  // by rank
};

// Whether `device` reaches the memory of `other`, and the driver's rank of the link (0 for itself; smaller is faster).
bool can_access(int device, int other, int32_t* performance_rank = nullptr);

}  // namespace deepep
