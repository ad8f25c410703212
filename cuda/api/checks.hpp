// What can be found wrong with the args of an operation without its peers, on the caller's thread.
//
// In: args structs whose size, reserved fields and flag bits are right, with Buffer::mutex held. Out: nothing, or a rejection
// that names the field and the values; for a dispatch also the plan of its routing and the places of its outputs. Callers:
// the operations of both backends, which therefore refuse the same with the same words.
#pragma once

#include <cstdint>

#include "../abi/deepep.h"
#include "../common/failure.hpp"
#include "../common/regions.hpp"
#include "buffer.hpp"
#include "handles.hpp"
#include "routing_plan.hpp"

namespace deepep {

// Rejects an address that code which loads `alignment` bytes at once cannot take. 0 passes.
inline void check_address(const char* name, uint64_t address, uint64_t alignment) {
  if (address % alignment == 0) return;
  reject(DEEPEP_ERROR_INVALID_ARGUMENT, "%s is at address 0x%llx, it must be aligned to %llu bytes", name,
         static_cast<unsigned long long>(address), static_cast<unsigned long long>(alignment));
}

// Rejects `bytes` from an address on that are past the end of the address space. 0 passes.
void check_span(const char* name, uint64_t address, uint64_t bytes);
// The same of `count` rows, `stride` bytes apart.
void check_rows(const char* name, uint64_t address, uint64_t count, uint64_t stride, uint64_t row_bytes);

void check_copy(const deepep_copy_args& args);
void check_fill(const deepep_fill_args& args);

// Checks the fields that every args struct with a routing shares; `most_tokens` is the mode's limit.
template <class Args>
void check_routing(const Buffer& buffer, const Args& args, uint32_t most_tokens) {
  if (args.num_tokens < 0 || static_cast<uint32_t>(args.num_tokens) > most_tokens) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "x has %d tokens, the buffer holds %u a rank", args.num_tokens, most_tokens);
  }
  if (args.num_topk < 0 || static_cast<uint32_t>(args.num_topk) > buffer.options.num_topk) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "num_topk is %d, the buffer has at most %u", args.num_topk, buffer.options.num_topk);
  }
  if (args.num_topk > 0 && args.topk_idx_bytes != 4 && args.topk_idx_bytes != 8) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "topk_idx_bytes is %u, an entry has 4 or 8", args.topk_idx_bytes);
  }
  if (args.num_topk > 0) check_address("topk_idx", args.topk_idx, args.topk_idx_bytes);
  if constexpr (requires { args.topk_weights; }) check_address("topk_weights", args.topk_weights, sizeof(float));
  if constexpr (requires { args.expert_stats; }) check_address("expert_stats", args.expert_stats, sizeof(int32_t));
  if constexpr (requires { args.wait_stats; }) check_address("wait_stats", args.wait_stats, sizeof(int64_t));
}

// Rejects a payload that the buffer cannot hold.
template <class Args>
void check_payload(const Buffer& buffer, const Args& args) {
  if (args.row_bytes == 0 || args.row_bytes % 16 != 0 || args.row_bytes > buffer.options.max_row_bytes) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "row_bytes is %u, it must be a multiple of 16 up to the buffer's %u", args.row_bytes,
           buffer.options.max_row_bytes);
  }
  if (args.num_tokens > 0 && args.x == 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "x is missing");
  check_address("x", args.x, 16);
  if (args.num_tokens > 1 && (args.x_stride % 16 != 0 || args.x_stride < args.row_bytes)) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "x_stride is %llu, it must be a multiple of 16 and at least row_bytes, %u",
           static_cast<unsigned long long>(args.x_stride), args.row_bytes);
  }
  check_rows("x", args.x, static_cast<uint32_t>(args.num_tokens), args.x_stride, args.row_bytes);
  if (args.num_scales == 0) return;
  const uint32_t elem = args.scale_elem_bytes;
  if (elem != 1 && elem != 2 && elem != 4 && elem != 8 && elem != 16) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "scale_elem_bytes is %u, it must be 1, 2, 4, 8 or 16", elem);
  }
  if (uint64_t{args.num_scales} * elem > buffer.options.max_scale_bytes) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "a row has %u scales of %u bytes, the buffer holds %u bytes", args.num_scales, elem,
           buffer.options.max_scale_bytes);
  }
  if (args.num_tokens > 0 && args.scales == 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "scales are missing");
  check_address("scales", args.scales, elem);
  if (args.num_tokens > 1 && args.scales_row_stride % elem != 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "scales_row_stride is %llu, it must be a multiple of scale_elem_bytes, %u",
           static_cast<unsigned long long>(args.scales_row_stride), elem);
  }
  if (args.num_tokens > 0 && args.num_scales > 1 && args.scales_elem_stride % elem != 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "scales_elem_stride is %llu, it must be a multiple of scale_elem_bytes, %u",
           static_cast<unsigned long long>(args.scales_elem_stride), elem);
  }
}

// Strides of received scales, bytes.
struct ScaleStrides {
  uint64_t row = 0;
  uint64_t elem = 0;
};
// Row-major, or column-major with every column padded to 16 bytes so that TMA can load it; as in lib/layout.ts.
ScaleStrides scale_strides(uint32_t max_rows, uint32_t num_scales, uint32_t elem_bytes, bool column_major);

// How the scales of one row or of many are copied.
struct ScaleCopy {
  uint32_t num_scales = 0;
  uint32_t elem_bytes = 0;
  ScaleStrides to;
  uint64_t from_elem_stride = 0;
};

// Checks a dispatch; answers the plan of its routing: its own, or with CACHED that of `handle`, which may be nullptr without.
RoutingPlan check_dispatch(const Buffer& buffer, const deepep_dispatch_args& args, const HandleFacts* handle);
// Writes the [out] fields for args.slot. host_counts is where the device counts are: a backend that has them elsewhere says so.
void name_outputs(const Buffer& buffer, const RoutingPlan& plan, deepep_dispatch_args& args);

// Checks a combine of what `plan` has dispatched.
void check_combine(const Buffer& buffer, const deepep_combine_args& args, const RoutingPlan& plan);
// Rejects x when it overlaps the slot's expert-output region without being it (`x_stride` must then be the region's,
// `row_bytes`), because copying it in would overwrite it.
void check_expert_rows(const Buffer& buffer, uint32_t slot, uint64_t x, uint64_t x_stride, uint64_t row_bytes);

void check_layout(const Buffer& buffer, const deepep_dispatch_layout_args& args);
void check_refusal(const deepep_refuse_args& args);

// Checks what deepep_buffer_recover and deepep_mask are given. `epoch` is this rank's, `num_pending` its operations under way.
void check_recovery(const Buffer& buffer, const deepep_buffer_recover_args& args, uint64_t epoch, uint64_t num_pending);
void check_mask(const Buffer& buffer, const deepep_mask_args& args);

}  // namespace deepep
