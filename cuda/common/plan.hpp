// How an operation is launched: a pure function of shapes and topology, which can be printed and tested without a GPU.
//
// In: bytes a row, rows a token at most, multiprocessors. Out: blocks, warps, and how shared memory is cut into stages.
// Callers: cuda/host before each launch, deepep_plan.
#pragma once

#include <cstdint>

namespace deepep {

// Where an operation runs.
struct Topology {
  int32_t device_sms = 0;
  uint32_t ranks_on_device = 1;
  int32_t compute_capability = 0;  // 10 * major + minor
  uint32_t shared_bytes = 0;       // a block can have
};

// What it moves.
struct Work {
  int32_t op = 0;          // DEEPEP_OP_DISPATCH or DEEPEP_OP_COMBINE
  uint32_t row_bytes = 0;
  uint32_t hops = 0;       // rows a token becomes at most
  int32_t num_sms = 0;     // asked for; 0 = default
};

// Fields as in deepep_plan_args.
struct Plan {
  int32_t sms = 0;
  uint32_t warps = 0;
  uint32_t stages = 0;
  uint32_t chunk_bytes = 0;
  uint32_t block_bytes = 0;  // dynamic shared memory
  uint32_t tma = 0;
};

}  // namespace deepep
