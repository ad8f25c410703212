// Where everything lies in a rank's symmetric memory: one control area, then num_slots equal slots.
//
// In: the options that all ranks agree about. Out: byte offsets and sizes, the same on every rank and every backend, so
// that a rank can compute an address in a peer's memory from the peer's base alone. Callers: buffer creation (sizes),
// every operation (addresses). Pure arithmetic, no state; usable in constant expressions and in device code.
//
// Every region begins at a multiple of 256 bytes. Normal and low-latency mode share a slot (a slot has one holder), so a
// region is as large as the more demanding of the two modes.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define DEEPEP_HOST_DEVICE __host__ __device__
#else
#define DEEPEP_HOST_DEVICE
#endif

namespace deepep {

// The options of a buffer that every rank must agree about, named as in deepep_buffer_create_args.
struct Options {
  uint32_t num_ranks = 0;
  uint32_t hidden = 0;
  uint32_t num_experts = 0;
  uint32_t num_topk = 0;
  uint32_t max_tokens_per_rank = 0;
  uint32_t max_low_latency_tokens_per_rank = 0;
  uint32_t max_recv_tokens = 0;
  uint32_t num_slots = 0;
  uint32_t max_row_bytes = 0;
  uint32_t max_scale_bytes = 0;
};

constexpr uint32_t kFp8BlockChannels = 128;  // channels that share a scale when low latency casts to FP8
constexpr uint64_t kRegionAlignment = 256;
constexpr uint64_t kLineBytes = 64;            // what one writer owns in a control area: no two writers share a line
constexpr uint32_t kMaxSlots = 8;              // DEEPEP_MAX_SLOTS: a rank's per-slot words fill exactly one line
constexpr uint32_t kMaxBlocks = 256;           // of an operation on a GPU
constexpr uint32_t kNumCountInfos = 2;         // words after the counts of a low-latency dispatch
constexpr uint64_t kMessageHeaderBytes = 256;  // protocol.hpp checks that its header fits

DEEPEP_HOST_DEVICE constexpr uint64_t align_up(uint64_t value, uint64_t alignment) {
  return (value + alignment - 1) / alignment * alignment;
}
DEEPEP_HOST_DEVICE constexpr uint64_t ceil_div(uint64_t value, uint64_t divisor) { return (value + divisor - 1) / divisor; }
DEEPEP_HOST_DEVICE constexpr uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }
DEEPEP_HOST_DEVICE constexpr uint64_t smaller(uint64_t a, uint64_t b) { return a < b ? a : b; }

// Replaces the zeros that stand for "the default" by the default, as the ABI documents it.
constexpr void resolve_defaults(Options& options) {
  if (options.max_recv_tokens == 0) options.max_recv_tokens = options.max_tokens_per_rank * options.num_ranks;
  if (options.num_slots == 0) options.num_slots = 2;
  if (options.max_row_bytes == 0) options.max_row_bytes = options.hidden * 2;
  if (options.max_scale_bytes == 0) {
    options.max_scale_bytes = static_cast<uint32_t>(ceil_div(options.hidden, kFp8BlockChannels) * 4);
  }
}

// Offsets of the control area count from the region's base, offsets of a slot from the slot's base.
struct Regions {
  uint64_t control_bytes = 0;
  uint64_t slot_bytes = 0;
  uint64_t symmetric_bytes = 0;  // control_bytes + num_slots * slot_bytes

  // Control area. A part indexed by `src` is written by that rank only.
  uint64_t doorbell = 0;     // one Doorbell: where this rank sleeps
  uint64_t aborts = 0;       // [src] one line each: an abort word
  uint64_t pushed = 0;       // [src] one line each: u64 [kMaxSlots], epoch of the dispatch that src has finished pushing, on a
                             // GPU where ranks may be left out
  uint64_t pushed_view = 0;  // [src] one line each: u64 [kMaxSlots], ranks that src counted in for it
  uint64_t views = 0;        // [src] one line each: a View, for agreement under MASK_ON_TIMEOUT
  uint64_t pulled = 0;       // [src] one line each: u64 [kMaxSlots], epoch of the combine that src has finished pulling
  uint64_t ready = 0;        // [src][kMaxSlots] one line each: low-latency combine's announcement
  // On a GPU: what blocks tell other ranks without their leader.
  uint64_t row_flags = 0;      // [src] u64 [kMaxBlocks]: row_flag() of the dispatch whose rows that block of src has pushed
  uint64_t count_words = 0;    // [src][ring] u64 [num_experts + kNumCountInfos]: protocol.hpp
  uint64_t messages = 0;       // [src][ring] message_bytes each
  uint64_t message_bytes = 0;  // header, then count words: tokens_per_rank [num_ranks], entries_per_expert [num_experts]
  uint32_t message_ring = 0;   // messages kept per source, a power of two: epoch % message_ring

  // A slot.
  uint64_t recv_x = 0, recv_x_bytes = 0;
  uint64_t recv_scales = 0, recv_scales_bytes = 0;  // scale_rows included
  uint64_t scale_rows = 0;                          // [max_local_experts, low_latency_rows] rows of scales, to be turned
  uint64_t expert_output = 0, expert_output_bytes = 0;
  uint64_t recv_topk_idx = 0;      // int32 or int64 [max_recv_tokens, num_topk]
  uint64_t recv_topk_weights = 0;  // f32 [max_recv_tokens, num_topk]
  uint64_t expert_weights = 0;     // f32 [max_recv_tokens, num_topk]: the weights that combine brings back
  uint64_t recv_src_idx = 0;       // i32 [max_recv_tokens], or [max_local_experts, low_latency_rows]
  uint64_t counts = 0;             // i32 [2], [max_local_experts], [num_ranks]: host_counts and its parts
  uint64_t layout_range = 0;       // i64 [max_local_experts, num_ranks]
  uint64_t metadata_bytes = 0;     // everything of a slot that is not rows, scales or expert output

  uint32_t max_local_experts = 0;  // experts of the rank that owns most
  uint32_t low_latency_rows = 0;   // rows an expert can hold in low-latency mode
};

// Needs resolved options.
DEEPEP_HOST_DEVICE constexpr Regions make_regions(const Options& options) {
  Regions r;
  const uint64_t ranks = options.num_ranks;
  r.max_local_experts = static_cast<uint32_t>(ceil_div(options.num_experts, ranks ? ranks : 1));
  r.low_latency_rows = options.max_low_latency_tokens_per_rank * options.num_ranks;
  // A rank can be ahead of a slow reader by one message for each low-latency combine whose receive half is still to come
  // (at most one a slot), and by one more of an operation that waits for the reader (protocol.hpp has the argument).
  r.message_ring = 4;
  while (r.message_ring < 2 * options.num_slots + 2) r.message_ring *= 2;
  r.message_bytes = align_up(kMessageHeaderBytes + 8 * (ranks + options.num_experts), kLineBytes);

  uint64_t at = 0;
  r.doorbell = at, at += kRegionAlignment;
  r.aborts = at, at = align_up(at + ranks * kLineBytes, kRegionAlignment);
  r.pushed = at, at = align_up(at + ranks * kLineBytes, kRegionAlignment);
  r.pushed_view = at, at = align_up(at + ranks * kLineBytes, kRegionAlignment);
  r.views = at, at = align_up(at + ranks * kLineBytes, kRegionAlignment);
  r.pulled = at, at = align_up(at + ranks * kLineBytes, kRegionAlignment);
  r.ready = at, at = align_up(at + ranks * kMaxSlots * kLineBytes, kRegionAlignment);
  r.row_flags = at, at += ranks * kMaxBlocks * 8;
  if (options.max_low_latency_tokens_per_rank > 0) {
    r.count_words = at;
    at = align_up(at + ranks * r.message_ring * 8 * (options.num_experts + kNumCountInfos), kRegionAlignment);
  }
  r.messages = at, at += ranks * r.message_ring * r.message_bytes;
  r.control_bytes = align_up(at, 4096);  // whole pages, so that slots can be advised and mapped apart from control

  const uint64_t rows = options.max_recv_tokens;
  const uint64_t ll_rows = uint64_t{r.max_local_experts} * r.low_latency_rows;
  const uint64_t most_rows = larger(rows, ll_rows);
  at = 0;
  r.recv_x = at, r.recv_x_bytes = align_up(most_rows * options.max_row_bytes, kRegionAlignment), at += r.recv_x_bytes;
  // Column-major scales pad the rows to 16 bytes a column, hence the alignment by 16 rows.
  r.recv_scales = at;
  r.recv_scales_bytes =
      align_up(larger(align_up(rows, 16), r.max_local_experts * align_up(r.low_latency_rows, 16)) * options.max_scale_bytes,
               kRegionAlignment);
  r.scale_rows = r.recv_scales + r.recv_scales_bytes;
  // What a cast can make of a row: api/low_latency.cpp lets no more through.
  const uint64_t cast_scales = align_up(ceil_div(options.max_row_bytes / 2, kFp8BlockChannels), 4) * 4;
  r.recv_scales_bytes += align_up(ll_rows * smaller(cast_scales, options.max_scale_bytes), kRegionAlignment);
  at += r.recv_scales_bytes;
  r.expert_output = at;
  r.expert_output_bytes = align_up(most_rows * options.hidden * 2, kRegionAlignment);
  at += r.expert_output_bytes;
  const uint64_t metadata = at;
  r.recv_topk_idx = at, at = align_up(at + rows * options.num_topk * 8, kRegionAlignment);
  r.recv_topk_weights = at, at = align_up(at + rows * options.num_topk * 4, kRegionAlignment);
  r.expert_weights = at, at = align_up(at + rows * options.num_topk * 4, kRegionAlignment);
  r.recv_src_idx = at, at = align_up(at + most_rows * 4, kRegionAlignment);
  r.counts = at, at = align_up(at + 4 * (2 + r.max_local_experts + ranks), kRegionAlignment);
  r.layout_range = at, at = align_up(at + 8 * r.max_local_experts * ranks, kRegionAlignment);
  r.metadata_bytes = at - metadata;
  r.slot_bytes = align_up(at, 4096);
  r.symmetric_bytes = r.control_bytes + options.num_slots * r.slot_bytes;
  return r;
}

// Offset of a slot's base from the region's.
DEEPEP_HOST_DEVICE constexpr uint64_t slot_offset(const Regions& regions, uint32_t slot) {
  return regions.control_bytes + slot * regions.slot_bytes;
}

// Where what a dispatch of normal mode receives lies in a slot, on any rank.
struct SlotView {
  uint8_t* x;
  uint8_t* scales;
  uint8_t* topk_idx;
  float* topk_weights;
  int32_t* src_idx;
};
DEEPEP_HOST_DEVICE inline SlotView slot_view(const Regions& regions, uint8_t* slot) {
  return {slot + regions.recv_x, slot + regions.recv_scales, slot + regions.recv_topk_idx,
          reinterpret_cast<float*>(slot + regions.recv_topk_weights), reinterpret_cast<int32_t*>(slot + regions.recv_src_idx)};
}

}  // namespace deepep
