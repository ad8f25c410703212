// Rows pulled: the rows that a token has become are read once, and their sum is written once.
//
// In: a function that tells where the rows of a token are (peers' memory) and what they weigh. Out: bf16 [tokens, hidden]. A
// warp owns a ring of pieces of rows in shared memory, filled by TMA in the order of their use, so that absent rows take no
// room; it sums a piece of a token in registers. Without TMA the rows come straight into registers. Bits are those of
// cuda/cpu/rows.cpp: bias first, then the rows in order of their hops, every product and every sum rounded to f32.
// Callers: combine.
#pragma once

#include "pieces.cuh"

namespace deepep {

struct PullRows {
  uint32_t hidden;  // channels, a multiple of 8
  uint32_t hops;    // rows a token can have: at most 64
  uint32_t begin;   // tokens of this block, or of all blocks if they share them
  uint32_t end;
  const uint16_t* bias_0;  // bf16 [tokens, hidden] or nullptr
  const uint16_t* bias_1;  // likewise
  uint16_t* out;           // bf16 [tokens, hidden]
  Plan plan;
  uint32_t* claims = nullptr;  // see TokenShare

  __device__ TokenShare share() const { return {begin, end, claims}; }
};

// Two neighbouring channels of a bf16 row, the first one in the lower half.
__device__ __forceinline__ float bf16_low(uint32_t both) { return __uint_as_float(both << 16); }
__device__ __forceinline__ float bf16_high(uint32_t both) { return __uint_as_float(both & 0xffff0000); }

// 8 channels of a token, summed in f32.
struct Sum8 {
  float v[8];

  __device__ __forceinline__ void zero() {
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) v[i] = 0;
  }

  __device__ __forceinline__ void set(const uint4& row) {
    const uint32_t words[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      v[2 * i] = bf16_low(words[i]);
      v[2 * i + 1] = bf16_high(words[i]);
    }
  }

  template <bool kWeighted>
  __device__ __forceinline__ void add(const uint4& row, float weight) {
    const uint32_t words[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      float low = bf16_low(words[i]);
      float high = bf16_high(words[i]);
      if constexpr (kWeighted) low = __fmul_rn(low, weight), high = __fmul_rn(high, weight);
      v[2 * i] = __fadd_rn(v[2 * i], low);
      v[2 * i + 1] = __fadd_rn(v[2 * i + 1], high);
    }
  }

  __device__ __forceinline__ uint4 round() const {
    return {bf16_pair(v[0], v[1]), bf16_pair(v[2], v[3]), bf16_pair(v[4], v[5]), bf16_pair(v[6], v[7])};
  }
};

// A piece of a token: kVectors vectors of 8 channels a lane, the lanes side by side.
template <uint32_t kVectors>
struct PieceSum {
  static constexpr uint32_t kBytes = kVectors * kWarpLanes * 16;
  Sum8 sums[kVectors];

  __device__ static uint32_t at(uint32_t vector) { return (vector * kWarpLanes + lane_id()) * 16; }

  // `offset` in bytes from the start of the tokens' rows.
  __device__ __forceinline__ void begin(const PullRows& p, uint64_t offset, uint32_t bytes) {
    const uint8_t* bias_0 = reinterpret_cast<const uint8_t*>(p.bias_0);
    const uint8_t* bias_1 = reinterpret_cast<const uint8_t*>(p.bias_1);
#pragma unroll
    for (uint32_t v = 0; v < kVectors; ++v) {
      sums[v].zero();
      if (bias_0 != nullptr && at(v) < bytes) sums[v].set(load_stream(bias_0 + offset + at(v)));
    }
    if (bias_1 == nullptr) return;
#pragma unroll
    for (uint32_t v = 0; v < kVectors; ++v) {
      if (at(v) < bytes) sums[v].template add<false>(load_stream(bias_1 + offset + at(v)), 0);
    }
  }

  __device__ __forceinline__ void end(const PullRows& p, uint64_t offset, uint32_t bytes) const {
    uint8_t* out = reinterpret_cast<uint8_t*>(p.out) + offset;
#pragma unroll
    for (uint32_t v = 0; v < kVectors; ++v) {
      if (at(v) < bytes) *reinterpret_cast<uint4*>(out + at(v)) = sums[v].round();
    }
  }
};

// What a warp must know of the pieces that arrive together.
struct alignas(16) PullBatch {
  uint32_t token;
  uint32_t piece;
  uint32_t count;    // pieces: one of each row, or 0
  uint32_t is_last;  // of its token's piece
};
static_assert(sizeof(PullBatch) + 4 == pull_stage_bytes() - kPullPieceBytes);

// A warp's ring of pieces. Batches of up to kBatch of them arrive together and share a barrier.
template <bool kWeighted, uint32_t kVectors, uint32_t kBatch>
struct PullRing {
  static constexpr uint32_t kPieceBytes = PieceSum<kVectors>::kBytes;
  static constexpr uint32_t kAtOnce = kBatch < 16 / kVectors ? kBatch : 16 / kVectors;  // pieces in registers

  uint32_t slots;  // of pieces, and of batches
  uint8_t* pieces;
  float* weights;  // by slot
  PullBatch* batches;
  uint64_t* barriers;  // by batch
  uint32_t free;
  uint32_t free_batches;
  uint32_t tail = 0;  // to fill next
  uint32_t tail_batch = 0;
  uint32_t head = 0;  // to use next
  uint32_t head_batch = 0;
  uint32_t parity = 0;

  __device__ PullRing(const PullRows& p, uint8_t* shared, uint64_t* all_barriers) {
    const uint32_t warp = threadIdx.x / kWarpLanes;
    slots = p.plan.stages;
    const uint32_t all = p.plan.warps * slots;
    pieces = shared + warp * slots * kPieceBytes;
    batches = reinterpret_cast<PullBatch*>(shared + all * kPieceBytes) + warp * slots;
    weights = reinterpret_cast<float*>(shared + all * (kPieceBytes + sizeof(PullBatch))) + warp * slots;
    barriers = all_barriers + warp * slots;
    free = slots;
    free_batches = slots;
    if (lane_id() == 0) {
      for (uint32_t i = 0; i < slots; ++i) barrier_init(barriers + i, 1);
      fence_barrier_init();
    }
    // Rows that other GPUs or kernels have written by plain stores, and the caller has acquired, are read by TMA from here on.
    fence_proxy_async();
    __syncwarp();
  }

  __device__ bool empty() const { return free_batches == slots; }
  __device__ const PullBatch& next() const { return batches[head_batch]; }
  __device__ uint32_t wrap(uint32_t slot) const { return slot < slots ? slot : slot - slots; }

  // Loads from rows [first, first + batch.count) of a token; there must be room.
  __device__ __forceinline__ void fill(const LaneHops<const uint8_t>& rows, uint32_t first, const PullBatch& batch,
                                       uint32_t offset, uint32_t bytes) {
    uint64_t* barrier = barriers + tail_batch;
    if (lane_id() == 0) {
      batches[tail_batch] = batch;
      barrier_arrive_expect(barrier, batch.count * bytes);
    }
#pragma unroll
    for (uint32_t pass = 0; pass < LaneHops<const uint8_t>::kPasses; ++pass) {
      const uint32_t nth = rows.place[pass] - first;
      if (rows.row[pass] != nullptr && nth < batch.count) {
        const uint32_t slot = wrap(tail + nth);
        if constexpr (kWeighted) weights[slot] = rows.weight[pass];
        bulk_load(pieces + slot * kPieceBytes, rows.row[pass] + offset, bytes, barrier);
      }
    }
    __syncwarp();
    tail = wrap(tail + batch.count);
    tail_batch = wrap(tail_batch + 1);
    free -= batch.count;
    --free_batches;
  }

  template <uint32_t kCount>
  __device__ __forceinline__ void add(PieceSum<kVectors>& sum) {
    uint4 rows[kCount][kVectors];
    float weight[kCount];
#pragma unroll
    for (uint32_t i = 0; i < kCount; ++i) {
      const uint32_t slot = wrap(head + i);
      weight[i] = kWeighted ? weights[slot] : 0;
#pragma unroll
      for (uint32_t v = 0; v < kVectors; ++v) {
        rows[i][v] = *reinterpret_cast<const uint4*>(pieces + slot * kPieceBytes + PieceSum<kVectors>::at(v));
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < kCount; ++i) {
#pragma unroll
      for (uint32_t v = 0; v < kVectors; ++v) sum.sums[v].template add<kWeighted>(rows[i][v], weight[i]);
    }
    head = wrap(head + kCount);
  }

  // Adds the next `left` <= kMost pieces; the count is a constant where they are added.
  template <uint32_t kMost>
  __device__ __forceinline__ void add_rest(PieceSum<kVectors>& sum, uint32_t left) {
    if (left == kMost)
      add<kMost>(sum);
    else if constexpr (kMost > 1)
      add_rest<kMost - 1>(sum, left);
  }

  // Adds the next batch and frees it. True when it was the last of its piece.
  __device__ __forceinline__ bool use(PieceSum<kVectors>& sum) {
    const uint32_t count = next().count;
    const bool is_last = next().is_last != 0;
    barrier_wait(barriers + head_batch, parity);
    uint32_t left = count;
    for (; left > kAtOnce; left -= kAtOnce) add<kAtOnce>(sum);
    add_rest<kAtOnce>(sum, left);
    // The pieces are read before TMA writes the slots again.
    fence_proxy_async_shared();
    __syncwarp();
    head_batch = wrap(head_batch + 1);
    if (head_batch == 0) parity ^= 1;
    free += count;
    ++free_batches;
    return is_last;
  }

  __device__ void end() {
    if (lane_id() == 0) {
      for (uint32_t i = 0; i < slots; ++i) barrier_invalidate(barriers + i);
    }
    __syncwarp();
  }
};

template <bool kWeighted, uint32_t kVectors, uint32_t kBatch, class Src>
__device__ void pull_rows_bulk(const PullRows& p, uint8_t* shared, uint64_t* barriers, Src& src) {
  using Ring = PullRing<kWeighted, kVectors, kBatch>;
  const uint32_t row_bytes = p.hidden * 2;
  PieceCursor cursor(p.share(), p.plan, row_bytes, Ring::kPieceBytes);
  if (cursor.left == 0) return;
  Ring ring(p, shared, barriers);

  LaneHops<const uint8_t> rows;
  uint32_t num_rows = 0;
  uint32_t next_row = 0;
  uint32_t known = cursor.token - 1;
  const uint32_t most = min(kBatch, ring.slots);
  // Loads as much as there is room for.
  auto fill = [&] {
    while (cursor.left != 0 && ring.free_batches != 0) {
      if (known != cursor.token) {
        known = cursor.token;
        rows.look_up(p.hops,
                     [&](uint32_t hop, float& weight) { return reinterpret_cast<const uint8_t*>(src(known, hop, weight)); });
        num_rows = rows.count();
      }
      const uint32_t left = num_rows - next_row;
      // Equal batches: 5 are 3 and 2, not 4 and 1.
      const uint32_t count = left <= most ? left : left <= 2 * most ? (left + 1) / 2 : most;
      if (count > ring.free) break;
      const uint32_t offset = cursor.piece * cursor.bytes;
      ring.fill(rows, next_row, {known, cursor.piece, count, count == left}, offset, min(cursor.bytes, row_bytes - offset));
      next_row += count;
      if (count == left) {
        next_row = 0;
        cursor.advance();
      }
    }
  };

  fill();
  while (!ring.empty()) {
    const uint32_t within = ring.next().piece * Ring::kPieceBytes;
    const uint32_t bytes = min(Ring::kPieceBytes, row_bytes - within);
    const uint64_t offset = uint64_t{ring.next().token} * row_bytes + within;
    PieceSum<kVectors> sum;
    sum.begin(p, offset, bytes);
    for (bool is_last = false; !is_last; fill()) is_last = ring.use(sum);
    sum.end(p, offset, bytes);
  }
  ring.end();
}

// A lane loads kVectors vectors of kBatch rows at once. `come()` waits until rows may be read, or answers false; what can be
// worked out without them is done before. Called by whole warps, with work or without.
template <bool kWeighted, uint32_t kVectors, uint32_t kBatch, class Src, class Come>
__device__ void pull_rows_plain(const PullRows& p, Src& src, Come come) {
  static_assert(kWarpLanes % kBatch == 0);  // a batch is of one pass
  using Piece = PieceSum<kVectors>;
  const uint32_t row_bytes = p.hidden * 2;
  PieceCursor cursor(p.share(), p.plan, row_bytes, Piece::kBytes);
  LaneHops<const uint8_t> rows;
  uint32_t known = cursor.token - 1;
  const auto look_up = [&] {
    if (cursor.left == 0 || known == cursor.token) return;
    known = cursor.token;
    rows.look_up(p.hops,
                 [&](uint32_t hop, float& weight) { return reinterpret_cast<const uint8_t*>(src(known, hop, weight)); });
  };
  look_up();
  if (!come()) return;
  for (; cursor.left != 0; cursor.advance(), look_up()) {
    const uint32_t within = cursor.piece * cursor.bytes;
    const uint32_t bytes = min(cursor.bytes, row_bytes - within);
    const uint64_t offset = uint64_t{known} * row_bytes + within;
    Piece sum;
    sum.begin(p, offset, bytes);
#pragma unroll 1
    for (uint32_t first = 0; first < p.hops; first += kBatch) {
      const HopBatch<const uint8_t> batch(rows, first);
      uint4 values[kBatch][kVectors];
      float weights[kBatch];
#pragma unroll
      for (uint32_t i = 0; i < kBatch; ++i) {
        const uint8_t* const row = batch.row(i);
        weights[i] = kWeighted ? batch.weight(i) : 0;
#pragma unroll
        for (uint32_t v = 0; v < kVectors; ++v) {
          if (row != nullptr && Piece::at(v) < bytes) values[i][v] = load_stream(row + within + Piece::at(v));
        }
      }
#pragma unroll
      for (uint32_t i = 0; i < kBatch; ++i) {
        if (!batch.has(i)) continue;
#pragma unroll
        for (uint32_t v = 0; v < kVectors; ++v) sum.sums[v].template add<kWeighted>(values[i][v], weights[i]);
      }
    }
    sum.end(p, offset, bytes);
  }
}

// Pulls and sums the rows of tokens; all threads of all blocks that share them call. `src(token, hop, weight)` is called by
// whole converged warps: the row of this lane's hop, bf16 [hidden], 16-byte aligned, nullptr = none, and its weight; hops past
// p.hops may be asked for and are ignored. It must be pure: several warps can share a token. What it names must have been
// acquired by this thread (a barrier after the acquire will do). Tokens without rows become their bias, or zeros.
//
// `shared` and `barriers` as for push_rows. Every piece of `out` is written by plain stores of one of the blocks.
template <bool kTma, bool kWeighted, class Src>
__device__ __forceinline__ void pull_rows(const PullRows& p, uint8_t* shared, uint64_t* barriers, Src src) {
  if constexpr (kTma && kHasTma) {
    if (!is_little(p.share(), p.plan, p.hidden * 2)) {
      return pull_rows_bulk<kWeighted, kPullPieceBytes / (kWarpLanes * 16), kPullBatch>(p, shared, barriers, src);
    }
  }
  pull_rows_plain<kWeighted, 2, 4>(p, src, [] { return true; });
}

}  // namespace deepep
