// What is done to whole rows: copying them past the caches, reducing them, casting them to FP8.
//
// In: addresses. Out: rows. Callers: dispatch, combine and low latency, for every row of every token. Each function picks the
// widest vectors of the processor it runs on (AVX-512, AVX2 or plain x86-64); all variants give the same bits, because the
// arithmetic is element by element (common/cast.hpp has it for one element).
#pragma once

#include <cstdint>

namespace deepep {

// Copies a row to memory that this core will not read soon. Aligned rows go by non-temporal stores, which do not read the
// destination first: 12 to 15 GB/s a core where memcpy reaches 4 (1 KiB rows) to 8 (14 KiB rows) on the machine this was
// written on. Such stores are weakly ordered: call stream_fence() before the release store that announces them.
void stream_row(uint8_t* dst, const uint8_t* src, uint64_t bytes);

// Orders the non-temporal stores made before it, which a release store alone does not.
void stream_fence();

// out = bf16(bias_0 + bias_1 + rows[0] + rows[1] + …) channel by channel, summed in that order in f32 from 0.
struct Reduction {
  const uint16_t* const* rows = nullptr;  // bf16 [hidden] each
  const float* weights = nullptr;         // f32 [num_rows]: a row's values are multiplied by it first; nullptr = none
  uint32_t num_rows = 0;
  uint32_t hidden = 0;                // a multiple of 8
  const uint16_t* bias_0 = nullptr;   // bf16 [hidden] or nullptr
  const uint16_t* bias_1 = nullptr;   // the same
  uint16_t* out = nullptr;            // bf16 [hidden]
};
void reduce_rows(const Reduction& reduction);

// Casts a row, bf16 [hidden] to e4m3 [hidden] with one scale per 128 channels (the last block may have fewer). `scales` gets
// f32 [ceil(hidden / 128)], or with `ue8m0` one byte a block, zeros up to a multiple of 4.
void cast_row_to_fp8(const uint16_t* x, uint32_t hidden, bool round, bool ue8m0, uint8_t* out, uint8_t* scales);

}  // namespace deepep
