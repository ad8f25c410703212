// Rows that travel as FP8; see rows_fp8.hpp.
#include "rows_fp8.hpp"

#include <array>
#include <cstring>

#include "../common/cast.hpp"

namespace deepep {
namespace {

const std::array<float, 256> kValues = [] {
  std::array<float, 256> values;
  for (uint32_t i = 0; i < values.size(); ++i) values[i] = f32_from_e4m3(static_cast<uint8_t>(i));
  return values;
}();

void reduce_block(const Reduction& r, uint32_t block, uint32_t count) {
  float sums[kFp8BlockChannels] = {};
  const uint32_t begin = block * kFp8BlockChannels;
  for (uint32_t i = 0; i < r.num_rows; ++i) {
    const auto* row = reinterpret_cast<const uint8_t*>(r.rows[i]);
    float scale = 0;
    std::memcpy(&scale, row + fp8_scales_offset(r.hidden) + block * sizeof scale, sizeof scale);
    for (uint32_t c = 0; c < count; ++c) {
      const float value = kValues[row[begin + c]] * scale;
      sums[c] += r.weights != nullptr ? value * r.weights[i] : value;
    }
  }
  for (uint32_t c = 0; c < count; ++c) r.out[begin + c] = bf16_from_f32(sums[c]);
}

}  // namespace

void reduce_fp8_rows(const Reduction& reduction) {
  for (uint32_t begin = 0; begin < reduction.hidden; begin += kFp8BlockChannels) {
    const uint32_t rest = reduction.hidden - begin;
    reduce_block(reduction, begin / kFp8BlockChannels, rest < kFp8BlockChannels ? rest : kFp8BlockChannels);
  }
}

}  // namespace deepep
