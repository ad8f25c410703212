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

// A lane holds 16 bytes of each unit.
constexpr uint32_t kUnitBytes = kWarpLanes * 16;  // of the row as it is given: 256 channels of bf16
constexpr uint32_t kPieceUnits = 8;               // that a warp holds at once, at most

// How `count` rows are cut into pieces for `warps` warps: so that all have some, where there are few rows.
struct PieceCut {
  uint32_t units;    // a piece; the last of a row may have fewer
  uint32_t per_row;  // pieces
  uint32_t count;    // pieces of all rows

  __device__ PieceCut(uint32_t count_rows, uint32_t row_bytes, uint32_t warps) {
    const uint32_t row_units = (row_bytes + kUnitBytes - 1) / kUnitBytes;
    const uint32_t least = (row_units + kPieceUnits - 1) / kPieceUnits;
    const uint32_t even = (row_units + least - 1) / least;
    const uint32_t share = (count_rows * row_units + warps - 1) / warps;
    units = share < 1 ? 1 : share < even ? share : even;
    per_row = (row_units + units - 1) / units;
    count = count_rows * per_row;
  }
};

// What a cast makes of rows.
struct CastRows {
  uint32_t channels;  // a multiple of 16
  bool round;         // scales are powers of two
  bool ue8m0;         // and sent as exponents

  __device__ static constexpr uint32_t scales_offset(uint32_t channels) { return (channels + 15) / 16 * 16; }
  __device__ uint32_t num_blocks() const { return (channels + kFp8BlockChannels - 1) / kFp8BlockChannels; }
};

// A piece of a row. The whole converged warp holds one.
template <bool kCast>
struct RowPiece {
  uint4 values[kPieceUnits];  // once cast, 8 bytes of each
  float scale;                // cast: the sent one of the piece's block `lane`, for lanes 0 … 15

  static constexpr uint32_t kBlocks = 2 * kPieceUnits;
  static_assert(kBlocks <= kWarpLanes && kUnitBytes == 4 * kFp8BlockChannels);

  // `bytes` are there from `from` on, in the row; what is beyond is zeros.
  __device__ __forceinline__ void load(const uint8_t* from, uint32_t units, uint32_t bytes) {
#pragma unroll
    for (uint32_t u = 0; u < kPieceUnits; ++u) {
      const uint32_t at = u * kUnitBytes + lane_id() * 16;
      values[u] = {0, 0, 0, 0};
      if (u < units && at < bytes) values[u] = load_stream(from + at);
    }
  }

  // Casts what was loaded; half a warp has a block of each unit.
  __device__ __forceinline__ void cast(uint32_t units, bool round) {
    scale = 0;
#pragma unroll
    for (uint32_t u = 0; u < kPieceUnits; ++u) {
      if (u >= units) break;
      const float inverse = cast_unit(values[u], round);
      const float sent = __shfl_sync(kAllLanes, inverse, lane_id() % 2 * 16);
      if (lane_id() / 2 == u) scale = sent;
    }
  }

  // `to` is where the piece belongs in a row, of which `bytes` are left, as given.
  __device__ __forceinline__ void store(uint8_t* to, uint32_t units, uint32_t bytes) const {
#pragma unroll
    for (uint32_t u = 0; u < kPieceUnits; ++u) {
      const uint32_t at = u * kUnitBytes + lane_id() * 16;
      if (u >= units || at >= bytes) continue;
      if constexpr (kCast)
        *reinterpret_cast<uint2*>(to + at / 2) = {values[u].x, values[u].y};
      else
        store_stream(to + at, values[u]);
    }
  }

  // The scales of the piece, whose first block is the row's `block`-th; the elements of 4 bytes are `stride` apart.
  __device__ __forceinline__ void store_scales(const CastRows& rows, uint8_t* to, uint64_t stride, uint32_t block,
                                               uint32_t units) const {
    const uint32_t lane = lane_id(), at = block + lane, blocks = rows.num_blocks();
    if (!rows.ue8m0) {
      if (lane < 2 * units && at < blocks) *reinterpret_cast<float*>(to + at * stride) = scale;
      return;
    }
    // Exponents are sent by fours: those of no block are zeros.
    const bool is_last = block + 2 * units >= blocks;
    if (lane >= (is_last ? kBlocks : 2 * units) || at >= (blocks + 3) / 4 * 4) return;
    to[at / 4 * stride + at % 4] = at < blocks ? ue8m0_from_f32(scale) : 0;
  }

 private:
  // What it returns is the block's scale as it is sent.
  __device__ __forceinline__ static float cast_unit(uint4& v, bool round) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
    uint32_t most = 0;
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) most = larger_magnitudes(most, words[i]);
#pragma unroll
    for (uint32_t step = 8; step != 0; step /= 2) most = larger_magnitudes(most, __shfl_xor_sync(kAllLanes, most, step));
    const uint32_t low = most & 0xffff, high = most >> 16;
    const Fp8Scale scale = fp8_scale(static_cast<uint16_t>(high > low ? high : low), round);
    uint32_t out[2] = {0, 0};
#pragma unroll
    for (uint32_t i = 0; i < 4; ++i) {
      const float first = f32_from_bits(words[i] << 16), second = f32_from_bits(words[i] & 0xffff0000);
      out[i / 2] |= e4m3_pair(__fmul_rn(first, scale.scale), __fmul_rn(second, scale.scale)) << 16 * (i % 2);
    }
    v.x = out[0], v.y = out[1];
    return scale.inverse;
  }
};

}  // namespace deepep
