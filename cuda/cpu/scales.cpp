// Scale elements; see scales.hpp.
#include "scales.hpp"

#include <algorithm>
#include <cstring>

namespace deepep {
namespace {

constexpr uint32_t kBlockRows = 32;  // rows whose elements are put column by column: their sources stay in the first cache

template <uint32_t Bytes>
void put_block(const ScaleCopy& copy, uint8_t* to, const uint8_t* const* from, uint32_t count) {
  for (uint32_t scale = 0; scale < copy.num_scales; ++scale) {
    uint8_t* column = to + scale * copy.to.elem;
    const uint64_t offset = scale * copy.from_elem_stride;
    for (uint32_t row = 0; row < count; ++row) std::memcpy(column + row * copy.to.row, from[row] + offset, Bytes);
  }
}

template <uint32_t Bytes>
void put_blocks(const ScaleCopy& copy, uint8_t* to, const uint8_t* const* from, uint32_t count) {
  for (uint32_t row = 0; row < count; row += kBlockRows) {
    put_block<Bytes>(copy, to + row * copy.to.row, from + row, std::min(kBlockRows, count - row));
  }
}

}  // namespace

void put_scale_rows(const ScaleCopy& copy, uint8_t* to, const uint8_t* const* from, uint32_t count) {
  switch (copy.elem_bytes) {
    case 1: return put_blocks<1>(copy, to, from, count);
    case 2: return put_blocks<2>(copy, to, from, count);
    case 4: return put_blocks<4>(copy, to, from, count);
    case 8: return put_blocks<8>(copy, to, from, count);
    case 16: return put_blocks<16>(copy, to, from, count);
  }
}

void put_scales(const ScaleCopy& copy, uint8_t* to, const uint8_t* from) {
  const bool dense = copy.to.elem == copy.elem_bytes && copy.from_elem_stride == copy.elem_bytes;
  if (dense) std::memcpy(to, from, size_t{copy.num_scales} * copy.elem_bytes);
  else put_scale_rows(copy, to, &from, 1);
}

void clear_scales(const ScaleCopy& copy, uint8_t* to) {
  for (uint32_t i = 0; i < copy.num_scales; ++i) std::memset(to + i * copy.to.elem, 0, copy.elem_bytes);
}

}  // namespace deepep
