// Rows of bytes with scale elements beside them: what dispatch carries without looking at it.
//
// In: the payload fields of an args struct. Out: where a token's row and scales are, and how scales are laid out where they
// arrive. Callers: dispatch and low latency.
#pragma once

#include <cstdint>
#include <cstring>

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

// Strides of received scales, bytes.
struct ScaleStrides {
  uint64_t row = 0;
  uint64_t elem = 0;
};

// Row-major, or column-major with every column padded to 16 bytes so that TMA can load it; as in lib/layout.ts.
inline ScaleStrides scale_strides(uint32_t max_rows, uint32_t num_scales, uint32_t elem_bytes, bool column_major) {
  if (num_scales == 0) return {};
  if (!column_major) return {uint64_t{num_scales} * elem_bytes, elem_bytes};
  return {elem_bytes, align_up(max_rows, 16 / elem_bytes) * elem_bytes};
}

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

template <uint32_t Bytes>
void copy_elements(uint8_t* dst, uint64_t dst_stride, const uint8_t* src, uint64_t src_stride, uint32_t count) {
  for (uint32_t i = 0; i < count; ++i) std::memcpy(dst + i * dst_stride, src + i * src_stride, Bytes);
}

// Copies the scale elements of one token, whatever their strides.
inline void put_scales(uint8_t* dst, const ScaleStrides& strides, const uint8_t* src, uint64_t src_elem_stride,
                       uint32_t num_scales, uint32_t elem_bytes) {
  if (strides.elem == elem_bytes && src_elem_stride == elem_bytes) {
    std::memcpy(dst, src, size_t{num_scales} * elem_bytes);
    return;
  }
  switch (elem_bytes) {
    case 1: return copy_elements<1>(dst, strides.elem, src, src_elem_stride, num_scales);
    case 2: return copy_elements<2>(dst, strides.elem, src, src_elem_stride, num_scales);
    case 4: return copy_elements<4>(dst, strides.elem, src, src_elem_stride, num_scales);
    case 8: return copy_elements<8>(dst, strides.elem, src, src_elem_stride, num_scales);
    case 16: return copy_elements<16>(dst, strides.elem, src, src_elem_stride, num_scales);
  }
}

// Sets the scale elements of one row to zero.
inline void clear_scales(uint8_t* dst, const ScaleStrides& strides, uint32_t num_scales, uint32_t elem_bytes) {
  for (uint32_t i = 0; i < num_scales; ++i) std::memset(dst + i * strides.elem, 0, elem_bytes);
}

}  // namespace deepep
