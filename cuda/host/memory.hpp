// Device and pinned memory: what a buffer is made of, and what deepep_alloc hands out.
//
// In: sizes. Out: blocks. A rule stands behind all of it: while some rank's kernels may spin for another's, nothing is freed
// to CUDA, because cudaFree waits for every kernel of the device, and the event loop would stand still that must launch the
// kernel the others wait for. So what is given up goes to a store: it is used again for the same size, or freed once no buffer
// of this process is left. Callers: the creation of a buffer, its pools, its peers.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>

#include "../api/memory_pool.hpp"

namespace deepep {

// A block of cudaMalloc, whole units of 2 MiB, so that an IPC handle is of its beginning. In one process peers hold the owner's
// block alive: a late one must never write into memory that is gone.
class DeviceBlock {
 public:
  // Rejects with OUT_OF_MEMORY, naming `what` and the bytes.
  static std::shared_ptr<DeviceBlock> allocate(int device, uint64_t bytes, const char* what);
  ~DeviceBlock();
  DeviceBlock(const DeviceBlock&) = delete;
  DeviceBlock& operator=(const DeviceBlock&) = delete;

  uint8_t* data() const { return data_; }
  uint64_t bytes() const { return bytes_; }
  // Another process has mapped it and may be late: never used again, only freed.
  void keep_apart() { reusable_ = false; }

 private:
  DeviceBlock(int device, uint8_t* data, uint64_t bytes) : device_(device), data_(data), bytes_(bytes) {}
  int device_;
  uint8_t* data_;
  uint64_t bytes_;
  bool reusable_ = true;
};

// Another process's block, mapped here. Mapped once a process and device, however many buffers import it.
class IpcMapping {
 public:
  // Rejects with SYSTEM, naming `rank`.
  static std::shared_ptr<IpcMapping> open(int device, const cudaIpcMemHandle_t& handle, uint32_t rank);
  ~IpcMapping();
  IpcMapping(const IpcMapping&) = delete;
  IpcMapping& operator=(const IpcMapping&) = delete;

  uint8_t* data() const { return data_; }

 private:
  IpcMapping(int device, uint8_t* data) : device_(device), data_(data) {}
  int device_;
  uint8_t* data_;
};

// Counts the buffers of this process; when the last is gone, the store is emptied.
class LiveBuffer {
 public:
  LiveBuffer();
  ~LiveBuffer();
  LiveBuffer(const LiveBuffer&) = delete;
  LiveBuffer& operator=(const LiveBuffer&) = delete;
};

// Blocks of a device from a stream-ordered pool that never gives memory back.
std::unique_ptr<BlockSource> device_memory(int device);
// Makes what that pool of `other` gives reachable from `device`, as cudaDeviceEnablePeerAccess makes what cudaMalloc gives.
void reach_memory(int device, int other);
// Pinned blocks that every device reaches, cut from chunks that are never freed. The present device must be selected.
std::unique_ptr<BlockSource> pinned_memory();
// Makes the first chunk, so that later small blocks need no call of CUDA.
void reserve_pinned();

}  // namespace deepep
