// Rows pushed: each row of a token is read once and written to every place it belongs to.
//
// In: rows, and a function that tells where each goes. Out: bytes in (peers') memory, complete when the caller passes its next
// barrier. A warp keeps several pieces under way: while one is stored to its destinations the next ones are loaded, by TMA into
// shared memory; through registers where there is no TMA, or little to move. Callers: dispatch; combine, which copies rows into
// the expert-output region with one destination each.
#pragma once

#include "pieces.cuh"

namespace deepep {

struct PushRows {
  const uint8_t* x;    // u8 [tokens, x_stride], 16-byte aligned
  uint64_t x_stride;   // bytes between rows, a multiple of 16
  uint32_t row_bytes;  // a multiple of 16
  uint32_t hops;       // destinations a token can have: at most 64
  uint32_t begin;      // tokens of this block, or of all blocks if they share them
  uint32_t end;
  Plan plan;
  uint32_t* claims = nullptr;  // see TokenShare

  __device__ TokenShare share() const { return {begin, end, claims}; }
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
  PieceCursor cursor(p.share(), p.plan, p.row_bytes, p.plan.chunk_bytes);
  if (cursor.left == 0) return;
  const uint32_t warp = threadIdx.x / kWarpLanes;
  const bool leader = lane_id() == 0;
  const uint32_t stages = p.plan.stages;
  const uint32_t stage_bytes = static_cast<uint32_t>(align_up(p.plan.chunk_bytes, 128));
  const uint32_t header_bytes = push_stage_bytes(0, p.hops);
  uint8_t* pieces = shared + warp * stages * stage_bytes;
  uint8_t* headers = shared + p.plan.warps * stages * stage_bytes + warp * stages * header_bytes;
  barriers += warp * stages;
  if (leader) {
    // Rows, and this shared memory, were last touched by plain accesses.
    fence_proxy_async();
    for (uint32_t stage = 0; stage < stages; ++stage) barrier_init(barriers + stage, 1);
    fence_barrier_init();
  }
  __syncwarp();

  LaneHops<uint8_t> destinations;
  uint32_t known = cursor.token - 1;
  uint32_t load_stage = 0;
  uint32_t num_loaded = 0;
  // Starts the next load that has a destination; the stage must be free.
  auto load = [&] {
    for (; cursor.left != 0; cursor.skip()) {
      if (known != cursor.token) {
        known = cursor.token;
        destinations.look_up(p.hops, [&](uint32_t hop, float&) { return dst(known, hop); });
      }
      if (destinations.count() != 0) break;
    }
    if (cursor.left == 0) return;
    const uint32_t offset = cursor.piece * cursor.bytes;
    const uint32_t bytes = min(cursor.bytes, p.row_bytes - offset);
    PushStage* stage = reinterpret_cast<PushStage*>(headers + load_stage * header_bytes);
#pragma unroll
    for (uint32_t pass = 0; pass < LaneHops<uint8_t>::kPasses; ++pass) {
      uint8_t* row = destinations.row[pass];
      if (row != nullptr) stage->to()[destinations.place[pass]] = row + offset;
    }
    if (leader) {
      *stage = {known, offset, bytes, destinations.count()};
      barrier_arrive_expect(barriers + load_stage, bytes);
      bulk_load(pieces + load_stage * stage_bytes, p.x + known * p.x_stride + offset, bytes, barriers + load_stage);
    }
    cursor.advance();
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
    if (cursor.left != 0) {
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

// A piece that goes through registers, 2 KB at most.
constexpr uint32_t kPushVectors = 4;
constexpr uint32_t kPushStep = kPushVectors * kWarpLanes * 16;
struct PieceValues {
  uint4 v[kPushVectors];  // this lane's

  __device__ void load(const uint8_t* from, uint32_t bytes) {
#pragma unroll
    for (uint32_t i = 0; i < kPushVectors; ++i) {
      const uint32_t at = (i * kWarpLanes + lane_id()) * 16;
      if (at < bytes) v[i] = load_stream(from + at);
    }
  }
  __device__ void store(uint8_t* to, uint32_t bytes) const {
#pragma unroll
    for (uint32_t i = 0; i < kPushVectors; ++i) {
      const uint32_t at = (i * kWarpLanes + lane_id()) * 16;
      if (at < bytes) store_stream(to + at, v[i]);
    }
  }
};
__host__ __device__ constexpr uint32_t push_pieces(uint32_t row_bytes) { return (row_bytes + kPushStep - 1) / kPushStep; }

template <class Dst, class Meta>
__device__ void push_rows_plain(const PushRows& p, Dst& dst, Meta& meta) {
  PieceCursor cursor(p.share(), p.plan, p.row_bytes, kPushStep);
  LaneHops<uint8_t> destinations;
  uint32_t known = cursor.token - 1;
  while (cursor.left != 0) {
    const uint32_t token = cursor.token, offset = cursor.piece * cursor.bytes;
    const uint32_t bytes = min(cursor.bytes, p.row_bytes - offset);
    PieceValues values;
    values.load(p.x + token * p.x_stride + offset, bytes);
    // What travels beside the row, and where it goes, is looked up while the row comes: one trip to memory for all.
    if (offset == 0) {
      meta(token);
      __syncwarp();
    }
    if (known != token) {
      known = token;
      destinations.look_up(p.hops, [&](uint32_t hop, float&) { return dst(known, hop); });
    }
    if (destinations.count() == 0) {
      cursor.skip();
      continue;
    }
#pragma unroll
    for (uint32_t pass = 0; pass < LaneHops<uint8_t>::kPasses; ++pass) {
      for (uint32_t left = destinations.present[pass]; left != 0; left &= left - 1) {
        const uint64_t row = __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(destinations.row[pass]), __ffs(left) - 1);
        values.store(reinterpret_cast<uint8_t*>(row) + offset, bytes);
      }
    }
    cursor.advance();
  }
}

// Pushes rows; all threads of all blocks that share them call. `dst(token, hop)` is called by whole converged warps: the
// address of the row that this lane's hop becomes, nullptr = none; hops past p.hops may be asked for and are ignored. It must
// be pure, several warps can share a token, and with shared claims any block can get any token. `meta(token)` is called by one
// whole converged warp for every token that has a destination, and for some that have none, to write by plain stores what
// travels beside the row.
//
// `shared` is the block's dynamic shared memory, aligned to 128 bytes, `barriers` u64 [warps * stages] of its static one; both
// are free again after the caller's next __syncthreads. When a thread returns, every bulk store that it issued is complete,
// so __syncthreads and a release at system scope by any thread of the block publish the rows.
template <bool kTma, class Dst, class Meta>
__device__ __forceinline__ void push_rows(const PushRows& p, uint8_t* shared, uint64_t* barriers, Dst dst, Meta meta) {
  if constexpr (kTma && kHasTma) {
    if (!is_little(p.share(), p.plan, p.row_bytes)) return push_rows_bulk(p, shared, barriers, dst, meta);
  }
  push_rows_plain(p, dst, meta);
}

}  // namespace deepep
