// Pieces of rows on their way through registers, and their cast to FP8: bf16 channels become e4m3, with a scale for every 128.
//
// In: a row. Out: a piece of it as loaded, or as e4m3 with its scales: f32, or UE8M0 exponents. Bits are those of
// common/cast.hpp. A warp holds a piece of a row, and may store it to many places. Callers: low_latency_dispatch.cuh,
// low_latency_combine.cuh.
#pragma once

#include "../common/cast.hpp"
#include "../common/plan.hpp"
#include "primitives.cuh"

namespace deepep {

static_assert(kUnitBytes == kWarpLanes * 16);

// What a cast makes of rows.
struct CastRows {
  uint32_t channels;  // a multiple of 16
  bool ue8m0;         // scales, which are powers of two then, are sent as exponents

  __device__ static constexpr uint32_t scales_offset(uint32_t channels) { return (channels + 15) / 16 * 16; }
  __device__ uint32_t num_blocks() const { return (channels + kFp8BlockChannels - 1) / kFp8BlockChannels; }
};

// The scales of a piece's blocks, as a whole converged warp finds them: half a warp has a block of each unit.
struct BlockScales {
  uint32_t most = 0;  // of this lane's block, that of unit lane % 16, the largest magnitudes: two bf16
  Fp8Scale mine;

  // Units come one after another.
  __device__ __forceinline__ void look(uint32_t unit, const uint4& v) {
    uint32_t both = larger_magnitudes(larger_magnitudes(0, v.x), v.y);
    both = larger_magnitudes(larger_magnitudes(both, v.z), v.w);
#pragma unroll
    for (int step = 8; step != 0; step /= 2) both = larger_magnitudes(both, __shfl_xor_sync(kAllLanes, both, step));
    if (lane_id() % 16 == unit) most = both;
  }
  __device__ __forceinline__ void find(bool round) {
    const uint32_t low = most & 0xffff, high = most >> 16;
    mine = fp8_scale(static_cast<uint16_t>(high > low ? high : low), round);
  }

  // What this lane's channels of a unit are multiplied by.
  __device__ __forceinline__ float of(uint32_t unit) const {
    return __shfl_sync(kAllLanes, mine.scale, static_cast<int>(lane_id() / 16 * 16 + unit));
  }
  // What is sent of the piece's block `lane`.
  __device__ __forceinline__ float sent() const {
    return __shfl_sync(kAllLanes, mine.inverse, static_cast<int>(lane_id() / 2 + lane_id() % 2 * 16));
  }
};

// A piece of a row, of kUnits units at most. The whole converged warp holds one.
template <bool kCast, uint32_t kUnits = kHeldUnits>
struct RowPiece {
  uint4 values[kUnits];  // once cast, 8 bytes of each
  float scale;           // cast: the sent one of the piece's block `lane`

  static_assert(kUnits <= 16 && kUnitBytes == 4 * kFp8BlockChannels);

  // A piece of `bytes`; what is beyond is zeros.
  __device__ __forceinline__ void load(const uint8_t* from, uint32_t bytes) {
    const uint32_t lane_bytes = lane_id() * 16;
#pragma unroll
    for (uint32_t u = 0; u < kUnits; ++u) {
      if (u * kUnitBytes >= bytes) break;
      values[u] = {0, 0, 0, 0};
      if (u * kUnitBytes + lane_bytes < bytes) values[u] = load_stream(from + u * kUnitBytes + lane_bytes);
    }
  }

  // Casts what was loaded; half a warp has a block of each unit.
  __device__ __forceinline__ void cast(uint32_t units, bool round) {
    BlockScales scales;
#pragma unroll
    for (uint32_t u = 0; u < kUnits; ++u) {
      if (u >= units) break;
      scales.look(u, values[u]);
    }
    scales.find(round);
    scale = scales.sent();
#pragma unroll
    for (uint32_t u = 0; u < kUnits; ++u) {
      if (u >= units) break;
      const uint2 both = cast_unit(values[u], scales.of(u));
      values[u].x = both.x, values[u].y = both.y;
    }
  }

  // A piece of `bytes` in shared memory, cast if it is to be: it stays there, each lane's 8 bytes of a unit in front of its 16.
  // Answers what `scale` is to be once it is loaded. No lane touches what is another's.
  __device__ __forceinline__ static float cast_shared(uint8_t* piece, uint32_t bytes, bool round) {
    auto* const mine = reinterpret_cast<uint4*>(piece) + lane_id();
    const uint32_t units = (bytes + kUnitBytes - 1) / kUnitBytes;
    const auto is_in = [&](uint32_t u) { return u * kUnitBytes + lane_id() * 16 < bytes; };
    BlockScales scales;
    // Loops, though short: instructions that run once a launch cost more to fetch than to run.
#pragma unroll 2
    for (uint32_t u = 0; u < units; ++u) scales.look(u, is_in(u) ? mine[u * kWarpLanes] : uint4{0, 0, 0, 0});
    scales.find(round);
#pragma unroll 2
    for (uint32_t u = 0; u < units; ++u) {
      const float by = scales.of(u);
      if (is_in(u)) *reinterpret_cast<uint2*>(mine + u * kWarpLanes) = cast_unit(mine[u * kWarpLanes], by);
    }
    return scales.sent();
  }
  __device__ __forceinline__ void load_shared(const uint8_t* piece, uint32_t units) {
    const auto* const mine = reinterpret_cast<const uint4*>(piece) + lane_id();
#pragma unroll
    for (uint32_t u = 0; u < kUnits; ++u) {
      if (u >= units) break;
      const uint2 both = *reinterpret_cast<const uint2*>(mine + u * kWarpLanes);
      values[u].x = both.x, values[u].y = both.y;
    }
  }

  // What this lane stores of a piece, wherever it goes: how many of its units, and one of its scales.
  struct Share {
    uint32_t units;
    uint32_t offset;       // from where the row begins
    uint32_t scale_bytes;  // 4, 1, or 0 = none
    uint32_t scale;
    uint64_t scale_offset;
    uint32_t in_scale_row;  // the offset where scales lie one after another
  };

  // A piece of `bytes` as it was loaded, which begins with the row's `first_unit`. Scale elements of 4 bytes are `stride`
  // apart.
  __device__ __forceinline__ Share share(const CastRows& rows, uint32_t first_unit, uint32_t bytes, uint64_t stride) const {
    const uint32_t lane = lane_id(), lane_bytes = lane * 16;
    Share share = {bytes > lane_bytes ? (bytes - lane_bytes + kUnitBytes - 1) / kUnitBytes : 0,
                   (first_unit * kUnitBytes + lane_bytes) / (kCast ? 2 : 1), 0, 0, 0, 0};
    if constexpr (kCast) {
      const uint32_t units = (bytes + kUnitBytes - 1) / kUnitBytes, at = 2 * first_unit + lane, blocks = rows.num_blocks();
      if (!rows.ue8m0) {
        if (lane < 2 * units && at < blocks) share.scale_bytes = 4;
        share.scale = __float_as_uint(scale);
        share.scale_offset = at * stride;
        share.in_scale_row = at * 4;
      } else {
        // Exponents are sent by fours: those of no block are zeros.
        const bool is_last = 2 * (first_unit + units) >= blocks;
        if (lane < (is_last ? kWarpLanes : 2 * units) && at < (blocks + 3) / 4 * 4) share.scale_bytes = 1;
        share.scale = at < blocks ? ue8m0_from_f32(scale) : 0;
        share.scale_offset = at / 4 * stride + at % 4;
        share.in_scale_row = at;
      }
    }
    return share;
  }

  __device__ __forceinline__ void store(const Share& share, uint8_t* row, uint8_t* scales, bool in_row = false) const {
    uint8_t* to = row + share.offset;
#pragma unroll
    for (uint32_t u = 0; u < kUnits; ++u) {
      if (u >= share.units) break;
      if constexpr (kCast)
        store_passing(to + u * kUnitBytes / 2, {values[u].x, values[u].y});
      else
        store_stream(to + u * kUnitBytes, values[u]);
    }
    uint8_t* const to_scale = scales + (in_row ? share.in_scale_row : share.scale_offset);
    if (share.scale_bytes == 4) store_lasting(to_scale, share.scale);
    if (share.scale_bytes == 1) *to_scale = static_cast<uint8_t>(share.scale);
  }

 private:
  __device__ __forceinline__ static uint2 cast_unit(const uint4& v, float by) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    uint32_t out[2] = {0, 0};
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const float first = f32_from_bits(words[i] << 16), second = f32_from_bits(words[i] & 0xffff0000);
      out[i / 2] |= e4m3_pair(__fmul_rn(first, by), __fmul_rn(second, by)) << 16 * (i % 2);
    }
    return {out[0], out[1]};
  }
};

}  // namespace deepep
