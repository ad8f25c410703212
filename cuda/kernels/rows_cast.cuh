// Rows cast to FP8: bf16 rows become e4m3 rows in shared memory, with a scale for every 128 channels.
//
// In: bf16 rows. Out: for each a stage of cast_row_bytes(channels): the e4m3 row, then its scales, f32 or, packed, UE8M0
// exponents. Bits are those of common/cast.hpp. A warp takes 256 channels at a time, wherever they are, so that a single row
// occupies all warps. Callers: low_latency_dispatch.cuh.
#pragma once

#include "../common/cast.hpp"
#include "../common/plan.hpp"
#include "primitives.cuh"

namespace deepep {

struct CastRows {
  uint32_t channels;  // a multiple of 16
  bool round;         // scales are powers of two
  bool ue8m0;         // and sent as exponents

  __device__ static constexpr uint32_t scales_offset(uint32_t channels) { return (channels + 15) / 16 * 16; }
  __device__ uint32_t num_blocks() const { return (channels + kFp8BlockChannels - 1) / kFp8BlockChannels; }
};

// The larger magnitude of two pairs of bf16, NaN left out.
__device__ __forceinline__ uint32_t larger_magnitudes(uint32_t most, uint32_t pair) {
  const uint32_t low = pair & 0x7fff, high = pair >> 16 & 0x7fff;
  const uint32_t most_low = most & 0xffff, most_high = most >> 16;
  return (low <= kBf16Infinity && low > most_low ? low : most_low) |
         (high <= kBf16Infinity && high > most_high ? high : most_high) << 16;
}

// One warp: what its lane has loaded of channels 8 * lane … of a unit that begins at `channel`. Half a warp is a block.
__device__ __forceinline__ void cast_unit(const CastRows& rows, const uint4& v, uint8_t* stage, uint32_t channel) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  uint32_t most = 0;
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) most = larger_magnitudes(most, words[i]);
  uint32_t magnitude = (most & 0xffff) > most >> 16 ? most & 0xffff : most >> 16;
#pragma unroll
  for (uint32_t step = 8; step != 0; step /= 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, magnitude, step);
    magnitude = other > magnitude ? other : magnitude;
  }
  if (channel >= rows.channels) return;
  const Fp8Scale scale = fp8_scale(static_cast<uint16_t>(magnitude), rows.round);
  uint32_t out[2] = {0, 0};
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    const float low = f32_from_bits(words[i] << 16), high = f32_from_bits(words[i] & 0xffff0000);
    out[i / 2] |= e4m3_pair(__fmul_rn(low, scale.scale), __fmul_rn(high, scale.scale)) << 16 * (i % 2);
  }
  *reinterpret_cast<uint2*>(stage + channel) = {out[0], out[1]};
  if (channel % kFp8BlockChannels != 0) return;
  uint8_t* scales = stage + CastRows::scales_offset(rows.channels);
  const uint32_t block = channel / kFp8BlockChannels;
  if (!rows.ue8m0) {
    reinterpret_cast<float*>(scales)[block] = scale.inverse;
    return;
  }
  scales[block] = ue8m0_from_f32(scale.inverse);
  // Exponents are sent by fours: those of no block are zeros.
  const uint32_t blocks = rows.num_blocks();
  for (uint32_t pad = blocks; block + 1 == blocks && pad % 4 != 0; ++pad) scales[pad] = 0;
}

// Warps 0 … warps - 1: casts `count` rows into as many stages; from(nth) is the nth of them, bf16 [channels], 16-byte aligned.
// The caller's next barrier completes them.
template <class From>
__device__ inline void cast_rows(const CastRows& rows, uint8_t* stages, uint32_t stage_bytes, uint32_t count, uint32_t warps,
                                 From from) {
  constexpr uint32_t kUnitChannels = 8 * kWarpLanes;
  constexpr uint32_t kUnits = 4;  // that a warp loads at once
  const uint32_t per_row = (rows.channels + kUnitChannels - 1) / kUnitChannels;
  const uint32_t units = count * per_row;
  for (uint32_t unit = threadIdx.x / kWarpLanes; unit < units; unit += kUnits * warps) {
    uint4 values[kUnits];
#pragma unroll
    for (uint32_t i = 0; i < kUnits; ++i) {
      const uint32_t at = unit + i * warps;
      const uint32_t channel = at % per_row * kUnitChannels + 8 * lane_id();
      values[i] = {0, 0, 0, 0};
      if (at < units && channel < rows.channels) {
        values[i] = load_stream(from(at / per_row) + channel * 2);
      }
    }
#pragma unroll
    for (uint32_t i = 0; i < kUnits; ++i) {
      const uint32_t at = unit + i * warps;
      if (at >= units) break;
      cast_unit(rows, values[i], stages + at / per_row * stage_bytes, at % per_row * kUnitChannels + 8 * lane_id());
    }
  }
}

}  // namespace deepep
