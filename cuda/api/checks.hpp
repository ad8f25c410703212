// Rows of bytes with scale elements beside them: what dispatch carries without looking at it.
//
// In: the payload fields of an args struct. Out: where a token's row and scales are. Callers: dispatch and low latency.
#pragma once

#include <cstdint>

#include "buffer.hpp"

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

// Rejects a payload that the buffer cannot hold.
template <class Args>
void check_payload(const Buffer& buffer, const Args& args) {
  if (args.row_bytes == 0 || args.row_bytes % 16 != 0 || args.row_bytes > buffer.options.max_row_bytes) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "row_bytes is %u, it must be a multiple of 16 up to the buffer's %u", args.row_bytes,
           buffer.options.max_row_bytes);
  }
  if (args.num_tokens > 0 && args.x == 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "x is missing");
  if (args.x % 16 != 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "x is at address 0x%llx, it must be aligned to 16 bytes",
           static_cast<unsigned long long>(args.x));
  }
  if (args.num_tokens > 1 && (args.x_stride % 16 != 0 || args.x_stride < args.row_bytes)) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "x_stride is %llu, it must be a multiple of 16 and at least row_bytes, %u",
           static_cast<unsigned long long>(args.x_stride), args.row_bytes);
  }
  if (args.num_scales == 0) return;
  const uint32_t elem = args.scale_elem_bytes;
  if (elem != 1 && elem != 2 && elem != 4 && elem != 8 && elem != 16) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "scale_elem_bytes is %u, it must be 1, 2, 4, 8 or 16", elem);
  }
  if (uint64_t{args.num_scales} * elem > buffer.options.max_scale_bytes) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "a row has %u scales of %u bytes, the buffer holds %u bytes", args.num_scales, elem,
           buffer.options.max_scale_bytes);
  }
  if (args.num_tokens > 0 && args.scales == 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "scales are missing");
}

}  // namespace deepep
