// Rows pushed: a block reads each row of its tokens once and writes it to every place it belongs to.
//
// In: a contiguous run of rows, and a function that tells where each goes. Out: bytes in (peers') memory, complete when the
// caller passes its next barrier. A warp keeps several pieces under way: while one is stored to its destinations the next ones
// are loaded, by TMA into shared memory, or through registers where there is none. Callers: dispatch; combine, which copies
// rows into the expert-output region with one destination each.
#pragma once

#include "../common/plan.hpp"
#include "primitives.cuh"

namespace deepep {

struct PushRows {
  const uint8_t* x;    // u8 [end, x_stride], 16-byte aligned
  uint64_t x_stride;   // bytes between rows, a multiple of 16
  uint32_t row_bytes;  // a multiple of 16
  uint32_t hops;       // destinations a token can have: at most 64
  uint32_t begin;      // tokens of this block
  uint32_t end;
  Plan plan;
};

// A warp's share of a block's work: consecutive pieces, equally many for each warp, so that few tokens occupy all warps too.
struct PieceRun {
  uint32_t token;  // the next piece is this token's
  uint32_t piece;
  uint32_t remaining;  // pieces
  uint32_t per_row;
  uint32_t bytes;  // of a piece; the last of a row may be shorter

  __device__ PieceRun(uint32_t begin, uint32_t end, uint32_t row_bytes, uint32_t piece_bytes, uint32_t warps) {
    const uint32_t warp = threadIdx.x / kWarpLanes;
    bytes = piece_bytes;
    per_row = static_cast<uint32_t>(ceil_div(row_bytes, piece_bytes));
    const uint32_t pieces = (end > begin ? end - begin : 0) * per_row;
    const uint32_t each = pieces / warps;
    const uint32_t more = pieces % warps;
    const uint32_t first = warp * each + (warp < more ? warp : more);
    remaining = each + (warp < more ? 1 : 0);
    token = begin + first / per_row;
    piece = first % per_row;
  }

  __device__ void skip_row() {
    const uint32_t pieces = per_row - piece;
    remaining -= pieces < remaining ? pieces : remaining;
    piece = 0;
    ++token;
  }

  __device__ void advance() {
    --remaining;
    if (++piece == per_row) piece = 0, ++token;
  }
};

// With fewer rows than warps, rows are cut further.
__device__ inline uint32_t push_piece_bytes(const PushRows& p) {
  constexpr uint32_t kLeastBytes = 1024;
  const uint32_t tokens = p.end > p.begin ? p.end - p.begin : 1;
  const uint32_t wanted = static_cast<uint32_t>(ceil_div(p.plan.warps, tokens));
  const uint32_t most = static_cast<uint32_t>(larger(align_up(ceil_div(p.row_bytes, wanted), 128), kLeastBytes));
  return piece_bytes(p.row_bytes, most < p.plan.chunk_bytes ? most : p.plan.chunk_bytes);
}

// The destinations of a token, spread over the lanes of a warp: hop i is lane i % 32's, in pass i / 32.
struct Destinations {
  static constexpr uint32_t kPasses = 2;
  uint8_t* to[kPasses];
  uint32_t present[kPasses];

  template <class Dst>
  __device__ void find(uint32_t token, uint32_t hops, Dst& dst) {
    const uint32_t lane = lane_id();
#pragma unroll
    for (uint32_t pass = 0; pass < kPasses; ++pass) {
      const uint32_t hop = pass * kWarpLanes + lane;
      to[pass] = nullptr;
      if (pass * kWarpLanes < hops) {
        uint8_t* address = dst(token, hop);
        if (hop < hops) to[pass] = address;
      }
      present[pass] = __ballot_sync(kAllLanes, to[pass] != nullptr);
    }
  }

  __device__ bool none() const { return (present[0] | present[1]) == 0; }
  __device__ uint32_t count() const { return __popc(present[0]) + __popc(present[1]); }

  // This lane's place among those present.
  __device__ uint32_t place(uint32_t pass) const {
    const uint32_t below = __popc(present[pass] & ((1u << lane_id()) - 1));
    return pass == 0 ? below : below + __popc(present[0]);
  }
};

// What a warp must know of a piece when it has arrived. In shared memory; `num` addresses follow.
struct alignas(16) PushStage {
  uint32_t token;
  uint32_t offset;
  uint32_t bytes;
  uint32_t num;

  __device__ uint8_t** to() { return reinterpret_cast<uint8_t**>(this + 1); }
};
static_assert(sizeof(PushStage) == kPushHeaderBytes);

// Leaves as many groups of stores unread as `lag` says, 3 at most.
__device__ __forceinline__ void bulk_wait_read_but(uint32_t lag) {
  if (lag == 0)
    bulk_wait_read<0>();
  else if (lag == 1)
    bulk_wait_read<1>();
  else if (lag == 2)
    bulk_wait_read<2>();
  else
    bulk_wait_read<3>();
}

template <class Dst, class Meta>
__device__ void push_rows_bulk(const PushRows& p, uint8_t* shared, uint64_t* barriers, Dst& dst, Meta& meta) {
  PieceRun run(p.begin, p.end, p.row_bytes, push_piece_bytes(p), p.plan.warps);
  if (run.remaining == 0) return;
  const uint32_t warp = threadIdx.x / kWarpLanes;
  const bool leader = lane_id() == 0;
  const uint32_t stages = p.plan.stages;
  const uint32_t stage_bytes = static_cast<uint32_t>(align_up(p.plan.chunk_bytes, 128));
  const uint32_t header_bytes = push_stage_bytes(0, p.hops);
  uint8_t* pieces = shared + warp * stages * stage_bytes;
  uint8_t* headers = shared + p.plan.warps * stages * stage_bytes + warp * stages * header_bytes;
  barriers += warp * stages;
  if (leader) {
    for (uint32_t stage = 0; stage < stages; ++stage) barrier_init(barriers + stage, 1);
    fence_barrier_init();
  }
  __syncwarp();

  Destinations destinations;
  uint32_t known = run.token - 1;
  uint32_t load_stage = 0;
  uint32_t num_loaded = 0;
  // Starts the next load that has a destination; the stage must be free.
  auto load = [&] {
    for (; run.remaining != 0; run.skip_row()) {
      if (known != run.token) {
        known = run.token;
        destinations.find(known, p.hops, dst);
      }
      if (!destinations.none()) break;
    }
    if (run.remaining == 0) return;
    const uint32_t offset = run.piece * run.bytes;
    const uint32_t bytes = min(run.bytes, p.row_bytes - offset);
    PushStage* stage = reinterpret_cast<PushStage*>(headers + load_stage * header_bytes);
#pragma unroll
    for (uint32_t pass = 0; pass < Destinations::kPasses; ++pass) {
      uint8_t* to = destinations.to[pass];
      if (to != nullptr) stage->to()[destinations.place(pass)] = to + offset;
    }
    if (leader) {
      *stage = {run.token, offset, bytes, destinations.count()};
      barrier_arrive_expect(barriers + load_stage, bytes);
      bulk_load(pieces + load_stage * stage_bytes, p.x + run.token * p.x_stride + offset, bytes, barriers + load_stage);
    }
    run.advance();
    ++num_loaded;
    if (++load_stage == stages) load_stage = 0;
  };

  const uint32_t lag = stages > 6 ? 3 : stages > 3 ? 2 : stages > 1 ? 1 : 0;
  for (uint32_t i = lag; i < stages; ++i) load();
  __syncwarp();
  uint32_t store_stage = 0;
  uint32_t parity = 0;
  for (uint32_t num_stored = 0; num_stored < num_loaded; ++num_stored) {
    PushStage* stage = reinterpret_cast<PushStage*>(headers + store_stage * header_bytes);
    const uint32_t token = stage->token;
    const uint32_t offset = stage->offset;
    if (leader) {
      const uint32_t bytes = stage->bytes;
      const uint32_t num = stage->num;
      barrier_wait(barriers + store_stage, parity);
      for (uint32_t i = 0; i < num; ++i) bulk_store(stage->to()[i], pieces + store_stage * stage_bytes, bytes);
      bulk_commit();
    }
    __syncwarp();
    if (offset == 0) {
      meta(token);
      __syncwarp();
    }
    if (run.remaining != 0) {
      if (leader) bulk_wait_read_but(lag);
      __syncwarp();
      load();
      __syncwarp();
    }
    if (++store_stage == stages) store_stage = 0, parity ^= 1;
  }
  if (leader) {
    // The whole group, not its reads alone: the caller publishes what was written.
    bulk_wait<0>();
    fence_proxy_async();
    for (uint32_t stage = 0; stage < stages; ++stage) barrier_invalidate(barriers + stage);
  }
  __syncwarp();
}

template <class Dst, class Meta>
__device__ void push_rows_plain(const PushRows& p, Dst& dst, Meta& meta) {
  constexpr uint32_t kVectors = 4;
  constexpr uint32_t kStep = kVectors * kWarpLanes * 16;
  const uint32_t lane = lane_id();
  // Pieces of the plan's size would do as well, but here nothing limits them.
  PieceRun run(p.begin, p.end, p.row_bytes, piece_bytes(p.row_bytes, kStep), p.plan.warps);
  Destinations destinations;
  uint32_t known = run.token - 1;
  while (run.remaining != 0) {
    if (known != run.token) {
      known = run.token;
      destinations.find(known, p.hops, dst);
    }
    if (destinations.none()) {
      run.skip_row();
      continue;
    }
    const uint32_t offset = run.piece * run.bytes;
    const uint32_t bytes = min(run.bytes, p.row_bytes - offset);
    const uint8_t* from = p.x + run.token * p.x_stride + offset;
    uint4 values[kVectors];
#pragma unroll
    for (uint32_t v = 0; v < kVectors; ++v) {
      const uint32_t at = (v * kWarpLanes + lane) * 16;
      if (at < bytes) values[v] = load_stream(from + at);
    }
#pragma unroll
    for (uint32_t pass = 0; pass < Destinations::kPasses; ++pass) {
      for (uint32_t left = destinations.present[pass]; left != 0; left &= left - 1) {
        const uint64_t address = __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(destinations.to[pass]), __ffs(left) - 1);
        uint8_t* to = reinterpret_cast<uint8_t*>(address) + offset;
#pragma unroll
        for (uint32_t v = 0; v < kVectors; ++v) {
          const uint32_t at = (v * kWarpLanes + lane) * 16;
          if (at < bytes) store_stream(to + at, values[v]);
        }
      }
    }
    if (offset == 0) {
      meta(run.token);
      __syncwarp();
    }
    run.advance();
  }
}

// Pushes the rows of a block; all its threads call. `dst(token, hop)` is called by whole converged warps: the address of the
// row that this lane's hop becomes, nullptr = none; hops past p.hops may be asked for and are ignored. It must be pure:
// several warps can share a token. Tokens without a destination are not read. `meta(token)` is called by one whole converged
// warp for every other token, to write by plain stores what travels beside the row.
//
// `shared` is the block's dynamic shared memory, aligned to 128 bytes, `barriers` u64 [warps * stages] of its static one; both
// are free again after the caller's next __syncthreads. When a thread returns, every bulk store that it issued is complete,
// so __syncthreads and a release at system scope by any thread of the block publish the rows.
template <bool kTma, class Dst, class Meta>
__device__ __forceinline__ void push_rows(const PushRows& p, uint8_t* shared, uint64_t* barriers, Dst dst, Meta meta) {
  if constexpr (kTma && kHasTma)
    push_rows_bulk(p, shared, barriers, dst, meta);
  else
    push_rows_plain(p, dst, meta);
}

}  // namespace deepep
