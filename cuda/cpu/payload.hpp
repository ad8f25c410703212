// Rows of bytes with scale elements beside them: what dispatch carries without looking at it.
//
// In: the payload fields of an args struct. Out: where a token's row and scales are. Callers: dispatch and low latency.
#pragma once

#include <cstdint>

namespace deepep {

struct Payload {
  const uint8_t* x = nullptr;
  uint64_t x_stride = 0;
  uint32_t row_bytes = 0;
  uint32_t num_scales = 0;  // 0 = no scales
  uint32_t scale_elem_bytes = 0;
  const uint8_t* scales = nullptr;
  uint64_t scales_row_stride = 0;
  uint64_t scales_elem_stride = 0;

  const uint8_t* row(uint64_t token) const { return x + token * x_stride; }
  const uint8_t* scales_of(uint64_t token) const { return scales + token * scales_row_stride; }
};

template <class Args>
Payload payload_of(const Args& args) {
  return {reinterpret_cast<const uint8_t*>(args.x), args.x_stride, args.row_bytes, args.num_scales,
          args.num_scales != 0 ? args.scale_elem_bytes : 0, reinterpret_cast<const uint8_t*>(args.scales),
          args.scales_row_stride, args.scales_elem_stride};
}

}  // namespace deepep
