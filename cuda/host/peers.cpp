// The ranks of a buffer, as this rank reaches them: see peers.hpp.

#include "peers.hpp"

#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <atomic>
#include <bit>
#include <map>
#include <mutex>
#include <new>

#include "../abi/deepep.h"

namespace deepep {
namespace {

constexpr uint64_t kMagic = 0x3361647563706564;  // "depcuda3": the layout of page and control area, and its version
constexpr uint64_t kPageBytes = 4096;
static_assert(sizeof(cudaIpcMemHandle_t) == sizeof PeerPage::ipc);
static_assert(sizeof(PeerPage) <= kPageBytes);

// The blocks of this process's ranks, by their pages.
struct Blocks {
  std::mutex mutex;
  std::map<const SharedMemory*, std::weak_ptr<DeviceBlock>> by_page;
};

Blocks& blocks() {
  static Blocks* const leaked = new Blocks;
  return *leaked;
}

// The device with this identity as this process numbers it; -1 when it is hidden from it.
int index_of(const char (&uuid)[16]) {
  for (int i = 0; i < num_devices(); ++i) {
    if (memcmp(find_device(static_cast<uint64_t>(i)).uuid, uuid, sizeof uuid) == 0) return i;
  }
  return -1;
}

bool time_slicing_allowed() {
  const char* const value = getenv("DEEPEP_ALLOW_TIME_SLICING");
  return value && strcmp(value, "1") == 0;
}

}  // namespace

bool can_access(int device, int other, int32_t* performance_rank) {
  if (performance_rank) *performance_rank = 0;
  if (device == other) return true;
  int can = 0;
  DEEPEP_CUDA("ask for peer access", cudaDeviceCanAccessPeer(&can, device, other));
  if (performance_rank && can) {
    DEEPEP_CUDA("ask for the link", cudaDeviceGetP2PAttribute(performance_rank, cudaDevP2PAttrPerformanceRank, device, other));
  }
  return can != 0;
}

void Peers::publish_own(std::shared_ptr<DeviceBlock> memory, uint64_t symmetric_bytes, int32_t wanted_sms) {
  Peer& own = peers_[rank_];
  own.page = SharedMemory::create(kPageBytes);
  own.symmetric = memory->data();
  PeerPage& page = *new (own.page->data()) PeerPage{};
  page.magic = kMagic;
  page.symmetric_bytes = symmetric_bytes;
  page.address = reinterpret_cast<uint64_t>(memory->data());
  page.pid = getpid();
  page.device = device_.index;
  page.num_sms = device_.num_sms;
  page.wanted_sms = wanted_sms;
  page.compute_capability = device_.compute_capability;
  memcpy(page.uuid, device_.uuid, sizeof page.uuid);
  cudaIpcMemHandle_t ipc;
  // Where the driver has no IPC (some virtual machines), ranks of one process still work: the importer finds zeros and says so.
  if (cudaIpcGetMemHandle(&ipc, memory->data()) == cudaSuccess) memcpy(page.ipc, &ipc, sizeof page.ipc);
  cudaGetLastError();
  Blocks& all = blocks();
  const std::lock_guard lock(all.mutex);
  all.by_page[own.page.get()] = memory;
  own.block = std::move(memory);
}

void Peers::enable_access(int other) const {
  if (other == device_.index) return;
  use_device(device_.index);
  const cudaError_t error = cudaDeviceEnablePeerAccess(other, 0);
  if (error == cudaErrorPeerAccessAlreadyEnabled)
    cudaGetLastError();
  else
    DEEPEP_CUDA("enable peer access", error);
  reach_memory(device_.index, other);
  use_device(device_.index);
}

// What stands in the way of a peer's memory, before CUDA is asked for it and answers with less.
void Peers::check_reach(const PeerPage& page, uint32_t rank) const {
  const bool same_device = memcmp(page.uuid, device_.uuid, sizeof page.uuid) == 0;
  if (page.pid != getpid() && same_device && !device_.mps && !time_slicing_allowed()) {
    reject(DEEPEP_ERROR_UNSUPPORTED,
           "rank %u in process %d shares %s with this process without CUDA MPS: their kernels would take turns of "
           "milliseconds and wait for each other. Start MPS (nvidia-cuda-mps-control -d) before both, put the ranks into one "
           "process, or set DEEPEP_ALLOW_TIME_SLICING=1",
           rank, page.pid, device_name(device_).c_str());
  }
  if (same_device) return;
  const int other = index_of(page.uuid);
  if (other < 0) return;  // hidden: CUDA IPC decides
  if (can_access(device_.index, other)) return;
  reject(DEEPEP_ERROR_UNSUPPORTED, "%s cannot reach the memory of rank %u on %s: there is neither NVLink nor PCIe peer access",
         device_name(device_).c_str(), rank, device_name(find_device(static_cast<uint64_t>(other))).c_str());
}

void Peers::import(const char (&handle)[kRegionHandleBytes], uint32_t rank) {
  Peer& peer = peers_[rank];
  if (rank != rank_ && peer.page) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "rank %u was imported already", rank);
  auto memory = SharedMemory::import(handle, kPageBytes, rank);
  if (rank == rank_) {
    if (memory == peer.page) return;
    reject(DEEPEP_ERROR_MISMATCH, "rank %u is this rank, but the handle is another buffer's: two ranks have one number", rank);
  }
  if (!memory->alive()) reject(DEEPEP_ERROR_PEER_LOST, "the buffer of rank %u was destroyed", rank);
  PeerPage& page = page_of(*memory);
  if (page.magic != kMagic) reject(DEEPEP_ERROR_MISMATCH, "rank %u uses another backend, or another version of this one", rank);
  if (page.symmetric_bytes != this->page(rank_).symmetric_bytes) {
    reject(DEEPEP_ERROR_MISMATCH, "rank %u has %llu bytes of symmetric memory, this rank %llu", rank,
           static_cast<unsigned long long>(page.symmetric_bytes),
           static_cast<unsigned long long>(this->page(rank_).symmetric_bytes));
  }
  check_reach(page, rank);
  Peer found;
  if (page.pid == getpid()) {
    // Another copy of the library in this process has a table of its own: its block cannot be held, but it can be reached.
    Blocks& all = blocks();
    const std::lock_guard lock(all.mutex);
    if (const auto block = all.by_page.find(memory.get()); block != all.by_page.end()) found.block = block->second.lock();
    found.symmetric = reinterpret_cast<uint8_t*>(page.address);
    enable_access(page.device);
  } else {
    cudaIpcMemHandle_t ipc;
    memcpy(&ipc, page.ipc, sizeof ipc);
    const cudaIpcMemHandle_t none = {};
    if (memcmp(&ipc, &none, sizeof ipc) == 0) {
      reject(DEEPEP_ERROR_UNSUPPORTED, "rank %u could not make a CUDA IPC handle: put the ranks into one process", rank);
    }
    std::atomic_ref<uint32_t>(page.mapped).store(1, std::memory_order_relaxed);
    found.mapping = IpcMapping::open(device_.index, ipc, rank);
    found.symmetric = found.mapping->data();
  }
  // Once more: its owner may have destroyed it meanwhile. Pairs with the fence in leave(): either this sees it gone, or the
  // owner sees `mapped`, and a block of this process is held, or was not there to be found.
  std::atomic_thread_fence(std::memory_order_seq_cst);
  if (!memory->alive()) reject(DEEPEP_ERROR_PEER_LOST, "the buffer of rank %u was destroyed", rank);
  found.page = std::move(memory);
  peer = std::move(found);
}

void Peers::check_complete() const {
  for (uint32_t rank = 0; rank < peers_.size(); ++rank) {
    if (!peers_[rank].page) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "rank %u was not imported", rank);
  }
}

uint64_t Peers::ranks_on_device() const {
  uint64_t ranks = 0;
  for (uint32_t rank = 0; rank < peers_.size(); ++rank) {
    if (memcmp(page(rank).uuid, device_.uuid, sizeof device_.uuid) == 0) ranks |= uint64_t{1} << rank;
  }
  return ranks;
}

bool Peers::all_near() const {
  for (uint32_t rank = 0; rank < peers_.size(); ++rank) {
    if (page(rank).pid != getpid()) return false;
  }
  return static_cast<size_t>(std::popcount(ranks_on_device())) == peers_.size();
}

void Peers::leave() {
  Peer& own = peers_[rank_];
  own.page->retire();
  std::atomic_thread_fence(std::memory_order_seq_cst);  // Pairs with the one in import().
  {
    Blocks& all = blocks();
    const std::lock_guard lock(all.mutex);
    all.by_page.erase(own.page.get());
  }
  if (own.block && std::atomic_ref<uint32_t>(page_of(*own.page).mapped).load(std::memory_order_relaxed) != 0) {
    own.block->keep_apart();
  }
  peers_.clear();
}

}  // namespace deepep
