// Expert outputs that travel as FP8 in a low-latency combine: e4m3 rows with their scales behind them.
//
// In: bf16 rows; later such rows. Out: rows of the expert-output region, at the stride of bf16 rows; sums. Callers: low-latency
// combine. Bits are those of lib/dtype.ts, and of the CUDA backend's kernels.
#pragma once

#include <cstdint>

#include "../common/regions.hpp"
#include "rows.hpp"

namespace deepep {

// Where the scales of a row begin, f32 for each 128 channels, and where they end: within the row's place.
inline uint64_t fp8_scales_offset(uint32_t hidden) { return align_up(hidden, 16); }
inline uint64_t fp8_row_bytes(uint32_t hidden) {
  return fp8_scales_offset(hidden) + ceil_div(hidden, kFp8BlockChannels) * sizeof(float);
}

// As reduce_rows(), of such rows and without biases. A value is e4m3 times scale, rounded to f32.
void reduce_fp8_rows(const Reduction& reduction);

}  // namespace deepep
