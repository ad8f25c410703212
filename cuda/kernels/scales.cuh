// Scale elements beside rows: bytes that are copied without being looked at, whatever their size and strides.
//
// In: how they lie where they come from and where they go. Out: a walk over units of 1 to 16 bytes. Callers: dispatch, in both
// modes.
#pragma once

#include <cstdint>

namespace deepep {

// How scale elements are copied: in units of 1 to 16 bytes, the largest that every address allows.
struct ScaleUnits {
  uint32_t bytes;  // of a unit
  uint32_t count;  // units a row
  uint32_t per_element;
  uint64_t from_stride, to_stride;  // from element to element

  __device__ uint64_t from(uint32_t unit) const { return unit / per_element * from_stride + unit % per_element * bytes; }
  __device__ uint64_t to(uint32_t unit) const { return unit / per_element * to_stride + unit % per_element * bytes; }
};

// How the scale elements of a row lie on both sides.
struct ScaleRows {
  uint32_t num;  // 0 = none
  uint32_t elem_bytes;
  uint64_t from_elem_stride, to_elem_stride;
  uint64_t alignment;  // addresses and strides of rows, ored: units are no larger than they all allow
};

__device__ inline ScaleUnits scale_units(const ScaleRows& rows) {
  if (rows.num == 0) return {};
  // Contiguous on both sides: a row is one large element.
  const bool dense = rows.from_elem_stride == rows.elem_bytes && rows.to_elem_stride == rows.elem_bytes;
  const uint32_t element_bytes = dense ? rows.elem_bytes * rows.num : rows.elem_bytes;
  const uint32_t elements = dense ? 1 : rows.num;
  const uint64_t all = element_bytes | rows.alignment | (dense ? 0 : rows.from_elem_stride | rows.to_elem_stride);
  const uint64_t most = all | 16;
  const auto bytes = static_cast<uint32_t>(most & (0 - most));  // the lowest bit
  return {bytes, elements * (element_bytes / bytes), element_bytes / bytes, rows.from_elem_stride, rows.to_elem_stride};
}

__device__ inline uint4 load_unit(const uint8_t* address, uint32_t bytes) {
  switch (bytes) {
    case 16: return *reinterpret_cast<const uint4*>(address);
    case 8: {
      const uint2 v = *reinterpret_cast<const uint2*>(address);
      return {v.x, v.y, 0, 0};
    }
    case 4: return {*reinterpret_cast<const uint32_t*>(address), 0, 0, 0};
    case 2: return {*reinterpret_cast<const uint16_t*>(address), 0, 0, 0};
  }
  return {*address, 0, 0, 0};
}

__device__ inline void store_unit(uint8_t* address, const uint4& v, uint32_t bytes) {
  switch (bytes) {
    case 16: *reinterpret_cast<uint4*>(address) = v; return;
    case 8: *reinterpret_cast<uint2*>(address) = {v.x, v.y}; return;
    case 4: *reinterpret_cast<uint32_t*>(address) = v.x; return;
    case 2: *reinterpret_cast<uint16_t*>(address) = static_cast<uint16_t>(v.x); return;
  }
  *address = static_cast<uint8_t>(v.x);
}

}  // namespace deepep
