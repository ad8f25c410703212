// What host code and kernels of the CUDA backend share: the state of a buffer, and the one struct into every kernel.
//
// In: filled by cuda/host from the args of the ABI. Out: read by cuda/kernels. DeviceState lives in device memory and is what
// makes graph replays legal: epochs and flags are there, never in kernel parameters. HostState lives in pinned memory: the
// device writes how calls ended, host code polls it.
#pragma once

#include <cstdint>

#include "../abi/deepep.h"
#include "../common/finding.hpp"
#include "../common/partition.hpp"
#include "../common/plan.hpp"
#include "../common/protocol.hpp"
#include "../common/regions.hpp"

namespace deepep {

constexpr uint32_t kNumBarriers = 5;       // grid-wide meetings a call can have, its end included
constexpr uint32_t kMostPending = 2048;  // operations of a buffer that have not ended: twice what a stream takes
// Failures of captured calls that are kept until the host has seen them.
#ifdef DEEPEP_MOST_CAPTURED_KEPT
constexpr uint32_t kMostCapturedKept = DEEPEP_MOST_CAPTURED_KEPT;  // so few that tests get there
#else
constexpr uint32_t kMostCapturedKept = 2048;
#endif

// How the rows of a dispatch lie. A cached one may have other ranks than those before it with the same handle.
struct SlotRows {
  uint64_t view;     // ranks that took part
  uint32_t routing;  // RoutingParams::name
  uint32_t reserved;
};

// One rank's own state. Zeros at creation. Only kernels of the communication stream touch it, one at a time.
struct DeviceState {
  uint64_t epoch;       // collective calls that have ended, or a recovery's epoch
  uint64_t base_epoch;  // of the last recovery: flags up to it mean nothing
  uint64_t masked;      // ranks left out
  uint32_t failed;      // 1 = a call failed half-way: calls that need peers end at once
  uint32_t reserved;
  uint64_t launches;    // kernels with a grid-wide meeting so far: names a verdict
  uint64_t num_blocks;  // sum of their grids: counters of meetings only grow
  uint64_t arrivals[kNumBarriers];
  uint64_t verdict;                   // of the running kernel: collective.cuh
  uint64_t bad_entry;                 // of the running call: ~position of the first wrong topk_idx entry; 0 = none
  Readers readers[kMaxSlots];         // of the slots' expert-output regions
  SlotRows rows[kMaxSlots];           // of the slots' latest dispatches
  uint64_t view;                      // ranks that take part in the running call, and the slot that each uses
  uint32_t peer_slots[DEEPEP_MAX_RANKS];
  uint32_t claims[2];  // of the running call: how often warps have claimed rows to push, and to pull; 0 when a call begins
  uint64_t num_rows;   // this rank's rows in the running call, padding included
  int64_t wait_ns[2][DEEPEP_MAX_RANKS];
  uint64_t num_dispatches, num_combines, rows_sent, bytes_sent, rows_pulled, num_failures;
  uint64_t num_told, num_told_captured;  // of the failures, those that were told to the host
  uint64_t lost;    // HostState::lost, as waits have last seen it
  Finding finding;  // of the running call; empty between calls
};

// What calls have found, the i-th at i % kSize.
template <uint32_t kSize>
struct Findings {
  uint64_t count;  // so far
  Finding kept[kSize];
};

// Pinned. Each word has one writer.
struct HostState {
  // By the device.
  uint64_t ended_seq;     // the latest operation that has ended; stored after everything else below
  uint64_t epoch;         // as DeviceState's, but for calls of replays
  uint64_t masked;        // as DeviceState's
  uint32_t exit_requested;  // deepep_inject EXIT: the phase was reached, the process shall end
  uint32_t reserved;
  // Of operations, which are never more than that: none is overwritten before the host has seen it.
  Findings<kMostPending> failures;
  // Of captured calls, but for those that only find that the buffer needs a recovery.
  Findings<kMostCapturedKept> captured_failures;
  uint64_t failed_epoch;  // collective calls that had ended with the one that has left the buffer to be recovered
  // By the host.
  alignas(256) uint64_t lost;  // bit r: rank r's process has ended, or its buffer was destroyed
};

// A count of a dispatch as the device tells it to the host: the operation's number above the count, so that the word is to be
// believed without any other.
DEEPEP_HOST_DEVICE constexpr uint64_t host_count(uint64_t seq, int32_t count) {
  return seq << 32 | static_cast<uint32_t>(count);
}
DEEPEP_HOST_DEVICE constexpr bool is_host_count_of(uint64_t word, uint64_t seq) {
  return static_cast<uint32_t>(word >> 32) == static_cast<uint32_t>(seq);
}

// What deepep_inject wants in a phase; by phase.
struct Injection {
  uint32_t wanted = 0;  // 1 + DEEPEP_INJECT_*; 0 = nothing
  uint32_t reserved = 0;
  uint64_t ns = 0;
};
constexpr uint32_t kNumPhases = 6;

// Rows of scratch before the blocks' counts: where this rank's rows begin on every rank (by rank or expert); where the groups
// of this rank's own experts begin, and how many entries each has (expert layout).
constexpr uint32_t kScratchRows = 3;

// What every kernel of an operation gets.
struct CallParams {
  DeviceState* state;
  HostState* host;                       // its address on the device
  uint32_t* scratch;                     // u32 [kScratchRows + multiprocessors, num_ranks + num_experts]: see above
  uint8_t* symmetric[DEEPEP_MAX_RANKS];  // by rank
  Regions regions;
  Options options;
  Partition partition;
  uint32_t rank;
  uint32_t first_expert;
  uint32_t num_local_experts;
  uint32_t slot;     // of this rank, where the operation has one
  uint32_t one_gpu;  // 1 = all ranks are on this GPU and in this process: what is released to it reaches them
  int32_t op;        // DEEPEP_OP_*
  uint32_t mask_on_timeout;
  uint64_t seq;         // 0 = captured
  uint64_t timeout_ns;  // of each wait
  uint64_t lost;        // HostState::lost when the call was enqueued
  Injection inject[kNumPhases];
  // What all ranks must say alike, as far as the host knows it, with agreed_hash() of that.
  uint32_t agreed[kNumAgreed];
  uint32_t agreed_hash;
};

// Whether the blocks of a low-latency dispatch go by the leader's word: where ranks may be left out, and where deepep_inject
// wants something.
DEEPEP_HOST_DEVICE inline bool is_led_dispatch(const CallParams& call) {
  const Injection& notify = call.inject[DEEPEP_PHASE_NOTIFY];
  const Injection& send = call.inject[DEEPEP_PHASE_SEND];
  return call.mask_on_timeout != 0 || notify.wanted != 0 || send.wanted != 0;
}

// A row that a token becomes: the index-th of this rank's rows for the key (handle.hpp of the CPU backend has the same).
struct DeviceHop {
  int32_t key;  // rank or expert; -1 = none
  uint32_t index;
};

struct RoutingHeader {
  uint64_t epoch;  // of the dispatch that made the routing
  uint64_t view;   // ranks that took part in the latest dispatch with it
  uint32_t valid;  // RoutingParams::name once that dispatch has succeeded; 0 = not
  uint32_t reserved;
};

// Where every token of a dispatch went: device memory of a handle, or the buffer's own for dispatches without one.
struct RoutingParams {
  RoutingHeader* header;
  DeviceHop* hops;    // [num_tokens, width]
  int32_t* experts;   // [num_tokens, num_topk]
  uint32_t* tokens;   // the count matrix: [num_ranks, num_ranks]
  uint32_t* entries;  // [num_ranks, num_experts]
  uint32_t name;      // of the handle, unlike those that had the memory before: what they left says nothing
  uint32_t layout;    // DEEPEP_LAYOUT_*
  uint32_t expert_alignment;
  uint32_t num_tokens;
  uint32_t num_topk;  // 0 = routed by is_token_in_rank
  uint32_t topk_idx_bytes;
  uint32_t width;  // hops a token
};

// What a slot remembers on the device of a low-latency dispatch, and of a combine whose receive half is still to come.
struct LowLatencyHeader {
  uint64_t epoch;                          // of the dispatch
  uint64_t view;                           // ranks that take part
  uint32_t valid;                          // 1 once the dispatch's send half has succeeded
  uint32_t peer_slots[DEEPEP_MAX_RANKS];   // that the ranks use: rows are there, and expert outputs will be
  Finding failure;                         // of the dispatch's send half, when every rank has found it alike
  uint64_t combine_epoch;                  // of the latest combine whose send half has come to its end
  uint64_t num_rows;                       // that it will pull
  Readers earlier;                         // of the region, when that combine was announced
  Finding refusal;                         // an error in the arguments of that combine
};

// Where every token of a low-latency dispatch went, and what the send half of a combine takes over for its receive half.
struct LowLatencyRouting {
  LowLatencyHeader* header;
  uint32_t* rows;         // [num_tokens, num_topk]: row in the region of its expert
  int32_t* experts;       // [num_tokens, num_topk], -1 = none
  int32_t* kept_experts;  // [num_tokens, num_topk], -1 = left out by the combine
  float* kept_weights;    // [num_tokens, num_topk]
  uint32_t num_tokens;
  uint32_t num_topk;
};

// How scale elements lie where they arrive, and how far apart they are where they come from.
struct LowLatencyScales {
  uint32_t num;  // a row; 0 = none
  uint32_t elem_bytes;
  uint64_t from_elem_stride;
  uint64_t to_row_stride;
  uint64_t to_elem_stride;
  uint64_t expert_stride;
};

struct LowLatencyDispatchParams {
  CallParams call;
  deepep_low_latency_dispatch_args args;  // with its [out] addresses
  LowLatencyRouting routing;
  LowLatencyScales scales;
  uint32_t row_bytes;  // as received: e4m3 with FLAG_FP8
  uint32_t receives;   // 1 = both halves
  Plan plan;
  // Filled in by launch_low_latency_dispatch().
  uint32_t blocks_a_token;  // that share the tokens which they have in common
  uint32_t place_shift;     // 1 << place_shift of these have other places each
  uint32_t piece_units;     // of a row that a warp moves at once
  uint32_t row_pieces;      // a row
  uint32_t listeners;       // warps of a block that take counts, the first
  uint32_t first_mover;     // the warp from which on they move rows
  // Ranks to and from which scales in columns go as rows, where they say the same of this one. 0 = none: another kernel.
  uint64_t turns_scales_of;
};

// The receive half of a dispatch; or a combine's, when nobody will ask for it any more.
struct LowLatencyReceiveParams {
  CallParams call;
  LowLatencyRouting routing;
  LowLatencyScales scales;
  uint32_t row_bytes;
  uint32_t reserved;
  uint64_t wait_stats;  // as in the args of the send half
};

struct LowLatencyCombineParams {
  CallParams call;
  deepep_low_latency_combine_args args;  // of the send half, for the receive half too
  LowLatencyRouting routing;
  uint32_t sends;     // 1 = this is the send half, or both
  uint32_t receives;  // 1 = this is the receive half, or both
  Plan plan;
};

struct DispatchParams {
  CallParams call;
  deepep_dispatch_args args;  // with its [out] addresses; host_counts are the words that host_count() makes
  RoutingParams routing;
  Plan plan;
  // Filled in by launch_dispatch(). Of few tokens a warp does one part: a piece of a row, or what travels beside one.
  uint32_t few_pieces = 0;      // of a row
  uint32_t few_parts = 0;       // of a token; 0 = there are more tokens
  uint32_t sending_blocks = 0;  // the first so many may push rows, and say when they have
};

struct CombineParams {
  CallParams call;
  deepep_combine_args args;
  RoutingParams routing;
  uint32_t has_slot;  // the caller named the slot; otherwise x must be given where there are rows
  uint32_t reserved;
  Plan plan;
  Plan copy;  // of the rows that are copied into the slot; launch_combine() makes it
};

// Barrier and refusal: nothing but messages.
struct MessageParams {
  CallParams call;
  int32_t refusal;  // DEEPEP_ERROR_* of deepep_refuse, 0 = a barrier
  uint32_t reserved;
};

// deepep_expert_output: waits until nobody reads call.slot's expert-output region. Not collective.
struct ReadersParams {
  CallParams call;
};

struct LayoutParams {
  CallParams call;
  deepep_dispatch_layout_args args;
};

// Changes of the state in stream order.
struct UpdateParams {
  CallParams call;
  uint64_t mask;          // ranks to leave out
  uint64_t unmask;        // ranks to take in again
  uint64_t epoch;         // of a recovery: the state continues there
  uint32_t recover;       // 1 = a recovery: masked = `mask`, no readers, not failed
  uint32_t clear_failed;  // 1 = the culprit is masked
};

}  // namespace deepep
