// Where the memory of deepep_alloc comes from on the CPU backend: plain host memory of either kind, committed when touched.
//
// In: sizes. Out: blocks for a MemoryPool. Caller: the creation of a buffer.
#pragma once

#include <memory>

#include "../api/memory_pool.hpp"

namespace deepep {

std::unique_ptr<BlockSource> host_memory();

}  // namespace deepep
