// Rows pulled: a block reads the rows that its tokens have become and writes their sum, once.
//
// In: a function that tells where the rows of a token are (peers' memory) and what they weigh. Out: bf16 [tokens, hidden]. A
// warp owns a ring of pieces of rows in shared memory, filled by TMA in the order of their use, so that absent rows take no
// room; it sums a piece of a token in registers. Without TMA the rows come straight into registers. Bits are those of
// cuda/cpu/rows.cpp: bias first, then the rows in order of their hops, every product and every sum rounded to f32.
// Callers: combine.
#pragma once

#include "rows_push.cuh"

namespace deepep {

struct PullRows {
  uint32_t hidden;  // channels, a multiple of 8
  uint32_t hops;    // rows a token can have: at most 64
  uint32_t begin;   // tokens of this block
  uint32_t end;
  const uint16_t* bias_0;  // bf16 [end, hidden] or nullptr
  const uint16_t* bias_1;  // likewise
  uint16_t* out;           // bf16 [end, hidden]
  Plan plan;
};

// Two neighbouring channels of a bf16 row, the first one in the lower half.
__device__ __forceinline__ float bf16_low(uint32_t both) { return __uint_as_float(both << 16); }
__device__ __forceinline__ float bf16_high(uint32_t both) { return __uint_as_float(both & 0xffff0000); }

// Nearest, ties to even; NaN becomes 0x7fff.
__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

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

// The rows of a token, spread over the lanes of a warp as Destinations are.
struct Sources {
  static constexpr uint32_t kPasses = 2;
  const uint8_t* from[kPasses];
  float weight[kPasses];
  uint32_t present[kPasses];
  uint32_t place[kPasses];  // this lane's among those present

  template <class Src>
  __device__ void find(uint32_t token, uint32_t hops, Src& src) {
    const uint32_t lane = lane_id();
#pragma unroll
    for (uint32_t pass = 0; pass < kPasses; ++pass) {
      const uint32_t hop = pass * kWarpLanes + lane;
      from[pass] = nullptr;
      weight[pass] = 0;
      if (pass * kWarpLanes < hops) {
        const uint16_t* address = src(token, hop, weight[pass]);
        if (hop < hops) from[pass] = reinterpret_cast<const uint8_t*>(address);
      }
      present[pass] = __ballot_sync(kAllLanes, from[pass] != nullptr);
      place[pass] = __popc(present[pass] & ((1u << lane) - 1)) + (pass == 0 ? 0 : __popc(present[0]));
    }
  }

  __device__ uint32_t count() const { return __popc(present[0]) + __popc(present[1]); }
};

// A warp's ring of pieces. Batches of up to kBatch pieces of one token arrive together and share a barrier.
template <bool kWeighted, uint32_t kVectors, uint32_t kBatch>
struct PullRing {
  static constexpr uint32_t kPieceBytes = PieceSum<kVectors>::kBytes;
  static constexpr uint32_t kLastOfToken = 1u << 31;

  uint32_t slots;  // pieces, and batches: a batch has one piece at least, or none
  uint8_t* pieces;
  float* weights;      // by slot
  uint32_t* batches;   // by batch: pieces | kLastOfToken
  uint64_t* barriers;  // by batch
  uint32_t free;
  uint32_t free_batches;
  uint32_t tail = 0;  // slot and batch to fill next
  uint32_t tail_batch = 0;
  uint32_t head = 0;  // to use next
  uint32_t head_batch = 0;
  uint32_t parity = 0;

  __device__ PullRing(const PullRows& p, uint8_t* shared, uint64_t* all_barriers) {
    const uint32_t warp = threadIdx.x / kWarpLanes;
    slots = p.plan.stages;
    const uint32_t all = p.plan.warps * slots;
    pieces = shared + warp * slots * kPieceBytes;
    weights = reinterpret_cast<float*>(shared + all * kPieceBytes) + warp * slots;
    batches = reinterpret_cast<uint32_t*>(shared + all * (kPieceBytes + 4)) + warp * slots;
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

  __device__ uint32_t wrap(uint32_t slot) const { return slot < slots ? slot : slot - slots; }

  // Loads rows [row, row + count) of a token; there must be room.
  __device__ __forceinline__ void fill(const Sources& s, uint32_t row, uint32_t count, uint32_t offset, uint32_t bytes,
                                       bool last) {
    uint64_t* barrier = barriers + tail_batch;
    if (lane_id() == 0) {
      batches[tail_batch] = count | (last ? kLastOfToken : 0);
      barrier_arrive_expect(barrier, count * bytes);
    }
#pragma unroll
    for (uint32_t pass = 0; pass < Sources::kPasses; ++pass) {
      const uint32_t nth = s.place[pass] - row;
      if (s.from[pass] != nullptr && nth < count) {
        const uint32_t slot = wrap(tail + nth);
        if constexpr (kWeighted) weights[slot] = s.weight[pass];
        bulk_load(pieces + slot * kPieceBytes, s.from[pass] + offset, bytes, barrier);
      }
    }
    __syncwarp();
    tail = wrap(tail + count);
    tail_batch = wrap(tail_batch + 1);
    free -= count;
    --free_batches;
  }

  template <uint32_t kCount>
  __device__ __forceinline__ void add(PieceSum<kVectors>& sum) const {
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
  }

  // Adds the next batch and frees it. True when it was its token's last.
  __device__ __forceinline__ bool use(PieceSum<kVectors>& sum) {
    const uint32_t batch = batches[head_batch];
    const uint32_t count = batch & ~kLastOfToken;
    barrier_wait(barriers + head_batch, parity);
    if constexpr (kBatch >= 8) {
      if (count == 8) add<8>(sum);
      if (count == 7) add<7>(sum);
      if (count == 6) add<6>(sum);
      if (count == 5) add<5>(sum);
    }
    if (count == 4) add<4>(sum);
    if (count == 3) add<3>(sum);
    if (count == 2) add<2>(sum);
    if (count == 1) add<1>(sum);
    // The pieces are read before TMA writes the slots again.
    fence_proxy_async_shared();
    __syncwarp();
    head = wrap(head + count);
    head_batch = wrap(head_batch + 1);
    if (head_batch == 0) parity ^= 1;
    free += count;
    ++free_batches;
    return (batch & kLastOfToken) != 0;
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
  PieceRun load(p.begin, p.end, row_bytes, Ring::kPieceBytes, p.plan.warps);
  PieceRun sum = load;
  if (load.remaining == 0) return;
  Ring ring(p, shared, barriers);

  Sources sources;
  uint32_t num_rows = 0;
  uint32_t next_row = 0;
  uint32_t known = load.token - 1;
  // Loads as much as there is room for.
  auto fill = [&] {
    while (load.remaining != 0 && ring.free_batches != 0) {
      if (known != load.token) {
        known = load.token;
        sources.find(known, p.hops, src);
        num_rows = sources.count();
      }
      const uint32_t left = num_rows - next_row;
      // Equal batches: 5 are 3 and 2, not 4 and 1.
      const uint32_t count = left <= kBatch ? left : left <= 2 * kBatch ? (left + 1) / 2 : kBatch;
      if (count > ring.free) break;
      const uint32_t offset = load.piece * load.bytes;
      ring.fill(sources, next_row, count, offset, min(load.bytes, row_bytes - offset), count == left);
      next_row += count;
      if (count == left) {
        next_row = 0;
        load.advance();
      }
    }
    __syncwarp();
  };

  fill();
  for (; sum.remaining != 0; sum.advance()) {
    const uint32_t within = sum.piece * sum.bytes;
    const uint32_t bytes = min(sum.bytes, row_bytes - within);
    const uint64_t offset = uint64_t{sum.token} * row_bytes + within;
    PieceSum<kVectors> piece;
    piece.begin(p, offset, bytes);
    for (bool last = false; !last; fill()) last = ring.use(piece);
    piece.end(p, offset, bytes);
  }
  ring.end();
}

template <bool kWeighted, class Src>
__device__ void pull_rows_plain(const PullRows& p, Src& src) {
  constexpr uint32_t kVectors = 2;
  constexpr uint32_t kBatch = 4;
  using Piece = PieceSum<kVectors>;
  const uint32_t row_bytes = p.hidden * 2;
  PieceRun run(p.begin, p.end, row_bytes, Piece::kBytes, p.plan.warps);
  Sources sources;
  uint32_t known = run.token - 1;
  for (; run.remaining != 0; run.advance()) {
    if (known != run.token) {
      known = run.token;
      sources.find(known, p.hops, src);
    }
    const uint32_t within = run.piece * run.bytes;
    const uint32_t bytes = min(run.bytes, row_bytes - within);
    const uint64_t offset = uint64_t{run.token} * row_bytes + within;
    Piece piece;
    piece.begin(p, offset, bytes);
#pragma unroll
    for (uint32_t pass = 0; pass < Sources::kPasses; ++pass) {
      for (uint32_t left = sources.present[pass]; left != 0;) {
        uint4 rows[kBatch][kVectors];
        float weights[kBatch];
        uint32_t count = 0;
#pragma unroll
        for (uint32_t i = 0; i < kBatch; ++i) {
          if (left == 0) continue;
          const int32_t lane = __ffs(left) - 1;
          left &= left - 1;
          const uint64_t address = __shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(sources.from[pass]), lane);
          if constexpr (kWeighted)
            weights[i] = __shfl_sync(kAllLanes, sources.weight[pass], lane);
          else
            weights[i] = 0;
#pragma unroll
          for (uint32_t v = 0; v < kVectors; ++v) {
            if (Piece::at(v) < bytes)
              rows[i][v] = load_stream(reinterpret_cast<const uint8_t*>(address) + within + Piece::at(v));
          }
          count = i + 1;
        }
#pragma unroll
        for (uint32_t i = 0; i < kBatch; ++i) {
          if (i >= count) continue;
#pragma unroll
          for (uint32_t v = 0; v < kVectors; ++v) piece.sums[v].template add<kWeighted>(rows[i][v], weights[i]);
        }
      }
    }
    piece.end(p, offset, bytes);
  }
}

// Pulls and sums the rows of a block's tokens; all its threads call. `src(token, hop, weight)` is called by whole converged
// warps: the row of this lane's hop, bf16 [hidden], 16-byte aligned, nullptr = none, and its weight; hops past p.hops may be
// asked for and are ignored. It must be pure: several warps can share a token. What it names must have been acquired by this
// thread (a barrier after the acquire will do). Tokens without rows become their bias, or zeros.
//
// `shared` and `barriers` as for push_rows. Every piece of `out` is written by plain stores of this block.
template <bool kTma, bool kWeighted, class Src>
__device__ __forceinline__ void pull_rows(const PullRows& p, uint8_t* shared, uint64_t* barriers, Src src) {
  if constexpr (kTma && kHasTma) {
    pull_rows_bulk<kWeighted, kPullPieceBytes / (kWarpLanes * 16), kPullBatch>(p, shared, barriers, src);
  } else {
    pull_rows_plain<kWeighted>(p, src);
  }
}

}  // namespace deepep
