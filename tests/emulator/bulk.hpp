// Bulk copies between shared and global memory, and barriers in shared memory, as the tensor memory accelerator has them.
//
// In: calls of the primitives. Out: copies that happen as late as they may: a load when somebody looks at its barrier, the
// reading of a store when its thread waits for that, the writing when it waits for the whole. So a wait that is missing leaves
// garbage, and the tests find it. Callers: primitives.cuh.
#pragma once

#include <cstdint>
#include <vector>

namespace emulator {

// A store that is not complete.
struct BulkStore {
  void* to;
  const void* from;
  uint32_t bytes;
  uint32_t group;
  const void* at;
  std::vector<uint8_t> read;  // what it has read of shared memory, once it has
};

void bulk_load(void* to_shared, const void* from, uint32_t bytes, uint64_t* barrier);
void bulk_store(void* to, const void* from_shared, uint32_t bytes);
void bulk_commit();
// All but the latest `pending` groups of the thread have read, or with `wholly` are complete.
void bulk_wait(uint32_t pending, bool wholly);

void proxy_fence();

void barrier_init(uint64_t* barrier, uint32_t arrivals);
void barrier_invalidate(uint64_t* barrier);
void barrier_arrive(uint64_t* barrier, uint32_t expected_bytes);
bool barrier_try_wait(uint64_t* barrier, uint32_t parity);

}  // namespace emulator
