// Rows pulled that were cast to FP8: half the bytes of bf16 over the link, at the error of e4m3.
//
// In: a function that tells where the rows of a token are (peers' memory) and what they weigh; each is an e4m3 row with its f32
// scales behind it, as rows_cast.cuh leaves them. Out: bf16 [tokens, hidden]. A value is e4m3 times scale, rounded to f32; from
// there on bits are those of rows_pull.cuh. Callers: low_latency_combine.cuh.
#pragma once

#include "rows_cast.cuh"
#include "rows_pull.cuh"

namespace deepep {

// 16 channels of a token.
struct Sum16 {
  float v[16];

  __device__ __forceinline__ void zero() {
#pragma unroll
    for (uint32_t i = 0; i < 16; ++i) v[i] = 0;
  }

  template <bool kWeighted>
  __device__ __forceinline__ void add(const uint4& row, float scale, float weight) {
    const uint32_t words[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) {
      const float2 both = floats_from_e4m3(static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2)));
      float low = __fmul_rn(both.x, scale), high = __fmul_rn(both.y, scale);
      if constexpr (kWeighted) low = __fmul_rn(low, weight), high = __fmul_rn(high, weight);
      v[2 * i] = __fadd_rn(v[2 * i], low);
      v[2 * i + 1] = __fadd_rn(v[2 * i + 1], high);
    }
  }

  __device__ __forceinline__ void store(uint8_t* out) const {
    uint32_t words[8];
#pragma unroll
    for (uint32_t i = 0; i < 8; ++i) words[i] = bf16_pair(v[2 * i], v[2 * i + 1]);
    reinterpret_cast<uint4*>(out)[0] = {words[0], words[1], words[2], words[3]};
    reinterpret_cast<uint4*>(out)[1] = {words[4], words[5], words[6], words[7]};
  }
};

// As pull_rows_plain(); `src(token, hop, weight)` gives e4m3 rows. p.hidden is a multiple of 16; no biases.
template <bool kWeighted, class Src, class Come>
__device__ __forceinline__ void pull_fp8_rows(const PullRows& p, Src src, Come come) {
  constexpr uint32_t kBatch = 8;  // rows under way
  constexpr uint32_t kPieceBytes = kWarpLanes * 16;
  PieceCursor cursor(p.share(), p.plan, p.hidden, kPieceBytes);
  LaneHops<const uint8_t> rows;
  uint32_t known = cursor.token - 1;
  if (!come()) return;
  for (; cursor.left != 0; cursor.advance()) {
    if (known != cursor.token) {
      known = cursor.token;
      rows.look_up(p.hops, [&](uint32_t hop, float& weight) { return src(known, hop, weight); });
    }
    const uint32_t channel = cursor.piece * cursor.bytes + lane_id() * 16;
    const bool has_channels = channel < p.hidden;
    const uint32_t scale_at = CastRows::scales_offset(p.hidden) + channel / kFp8BlockChannels * 4;
    Sum16 sum;
    sum.zero();
#pragma unroll
    for (uint32_t pass = 0; pass < LaneHops<const uint8_t>::kPasses; ++pass) {
      for (uint32_t left = rows.present[pass]; left != 0;) {
        uint4 values[kBatch];
        float scales[kBatch], weights[kBatch];
        uint32_t count = 0;
#pragma unroll
        for (uint32_t i = 0; i < kBatch; ++i) {
          if (left == 0) continue;
          const int32_t lane = __ffs(static_cast<int32_t>(left)) - 1;
          left &= left - 1;
          const auto* row =
              reinterpret_cast<const uint8_t*>(__shfl_sync(kAllLanes, reinterpret_cast<uint64_t>(rows.row[pass]), lane));
          weights[i] = kWeighted ? __shfl_sync(kAllLanes, rows.weight[pass], lane) : 0;
          if (has_channels) values[i] = load_stream(row + channel);
          if (has_channels) scales[i] = __ldcg(reinterpret_cast<const float*>(row + scale_at));
          count = i + 1;
        }
#pragma unroll
        for (uint32_t i = 0; i < kBatch; ++i) {
          if (i < count) sum.template add<kWeighted>(values[i], scales[i], weights[i]);
        }
      }
    }
    if (has_channels) sum.store(reinterpret_cast<uint8_t*>(p.out) + (uint64_t{known} * p.hidden + channel) * 2);
  }
}

}  // namespace deepep
