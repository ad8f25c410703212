// Which pieces of which rows a warp moves, and where a token's rows are.
//
// In: the tokens, and a counter that all blocks share. Out: a cursor over the pieces of this warp, claim by claim. A warp that
// is done claims more: multiprocessors differ by a third in the bandwidth that they get (two of one TPC share a port), and
// equal shares wait for the slowest (on one H100 with 8 ranks of 4, 8, 16 multiprocessors a push then takes 17, 10, 2 %
// longer). Callers: rows_push.cuh, rows_pull.cuh.
#pragma once

#include "../common/plan.hpp"
#include "primitives.cuh"

namespace deepep {

// The tokens whose rows are moved.
struct TokenShare {
  uint32_t begin;
  uint32_t end;
  // u32 on the device, shared by all blocks of the grid, 0 when the first of them starts: how often they have claimed work.
  // The tokens are then those of the whole grid; with nullptr they are this block's own.
  uint32_t* claims;

  __device__ uint32_t count() const { return end > begin ? end - begin : 0; }
  // Warps that share the tokens.
  __device__ uint32_t workers(const Plan& plan) const { return plan.warps * (claims != nullptr ? gridDim.x : 1); }
};

// The first of `all` claims that a warp has, of `warps` in each block. What one block has warps for is the leader's, which
// hears of it first; of more the leader's block has the last, since it has most to do besides.
__device__ inline uint32_t first_claim(uint32_t all, uint32_t warp, uint32_t warps) {
  return all <= warps ? blockIdx.x * warps + warp : warp * gridDim.x + (gridDim.x - 1 - blockIdx.x);
}

// Walks over a warp's pieces. The whole converged warp holds one.
struct PieceCursor {
  uint32_t token = 0;
  uint32_t piece = 0;
  uint32_t left = 0;  // pieces of the claim, this one included; 0 = no work is left
  uint32_t per_row;   // pieces a row
  uint32_t bytes;     // a piece; the last of a row may be shorter

  __device__ __forceinline__ PieceCursor(const TokenShare& share, const Plan& plan, uint32_t row_bytes, uint32_t piece_bytes)
      : per_row((row_bytes + piece_bytes - 1) / piece_bytes),
        bytes(piece_bytes),
        begin_(share.begin),
        workers_(share.workers(plan)),
        claims_(share.claims) {
    // Whole rows first; the last ones by pieces, so that all warps end together, and so that few tokens occupy all warps.
    const uint32_t tokens = share.count();
    whole_ = tokens > workers_ ? tokens - workers_ : 0;
    num_claims_ = whole_ + (tokens - whole_) * per_row;
    const uint32_t warp = threadIdx.x / kWarpLanes;
    start(claims_ == nullptr ? warp : first_claim(num_claims_, warp, plan.warps));
  }

  __device__ void advance() {
    ++piece;
    if (--left == 0) start(__shfl_sync(kAllLanes, following_, 0));
  }

  // Leaves the rest of the row, as far as it is this warp's.
  __device__ void skip() {
    left = 1;
    advance();
  }

 private:
  uint32_t begin_;
  uint32_t workers_;
  uint32_t* claims_;
  uint32_t whole_;
  uint32_t num_claims_;
  uint32_t following_ = 0;  // lane 0's: the claim after this one

  __device__ void start(uint32_t claim) {
    left = 0;
    if (claim >= num_claims_) return;
    // Asked for now, needed when this claim is done.
    following_ = claim + workers_;
    if (claims_ != nullptr && num_claims_ > workers_ && lane_id() == 0) following_ = workers_ + add_relaxed_gpu(claims_, 1);
    if (claim < whole_) {
      token = begin_ + claim, piece = 0, left = per_row;
    } else {
      const uint32_t nth = claim - whole_;
      token = begin_ + whole_ + nth / per_row, piece = nth % per_row, left = 1;
    }
  }
};

// Whether there is so little that barriers and stages do not pay.
__device__ inline bool is_little(const TokenShare& share, const Plan& plan, uint32_t row_bytes) {
  return uint64_t{share.count()} * row_bytes <= uint64_t{share.workers(plan)} * plan.little_bytes;
}

// The rows of a token, spread over the lanes of a warp: hop i is lane i % 32's, in pass i / 32.
template <class T>
struct LaneHops {
  static constexpr uint32_t kPasses = 2;
  T* row[kPasses];  // nullptr = none
  float weight[kPasses];
  uint32_t present[kPasses];
  uint32_t place[kPasses];  // this lane's among those present

  // `find(hop, weight)` gives the row of this lane's hop.
  template <class Find>
  __device__ void look_up(uint32_t hops, Find&& find) {
    const uint32_t lane = lane_id();
    uint32_t before = 0;
#pragma unroll
    for (uint32_t pass = 0; pass < kPasses; ++pass) {
      const uint32_t hop = pass * kWarpLanes + lane;
      row[pass] = nullptr;
      weight[pass] = 0;
      if (pass * kWarpLanes < hops) {
        T* found = find(hop, weight[pass]);
        if (hop < hops) row[pass] = found;
      }
      present[pass] = __ballot_sync(kAllLanes, row[pass] != nullptr);
      place[pass] = before + __popc(present[pass] & ((1u << lane) - 1));
      before += __popc(present[pass]);
    }
  }

  __device__ uint32_t count() const { return __popc(present[0]) + __popc(present[1]); }
};

// Neighbouring hops of a token, of one pass. Rows that are absent have their place: to look for the next one that is there
// would make each load wait for the one before.
template <class T>
struct HopBatch {
  uint32_t first;    // its lane
  uint32_t present;  // bit i = the i-th is there
  uint64_t mine;     // this lane's row, and its weight
  float my_weight;

  __device__ HopBatch(const LaneHops<T>& hops, uint32_t hop) : first(hop % kWarpLanes) {
    const bool upper = hop >= kWarpLanes;
    present = (upper ? hops.present[1] : hops.present[0]) >> first;
    mine = reinterpret_cast<uint64_t>(upper ? hops.row[1] : hops.row[0]);
    my_weight = upper ? hops.weight[1] : hops.weight[0];
  }
  __device__ bool has(uint32_t i) const { return (present >> i & 1) != 0; }
  __device__ T* row(uint32_t i) const {
    return reinterpret_cast<T*>(__shfl_sync(kAllLanes, mine, static_cast<int32_t>(first + i)));
  }
  __device__ float weight(uint32_t i) const { return __shfl_sync(kAllLanes, my_weight, static_cast<int32_t>(first + i)); }
};

}  // namespace deepep
