// Scale elements: how they are laid out where they arrive, and how they get there.
//
// In: addresses and strides. Out: elements of 1 to 16 bytes, never looked at. Callers: dispatch and low latency. Row-major
// scales are put beside each row as it is pushed; column-major ones in blocks of rows afterwards, because neighbours in memory
// are then the elements of consecutive rows, and a row alone would touch a cache line and a page for every element.
#pragma once

#include <cstdint>

#include "../api/checks.hpp"

namespace deepep {

// Copies the scales of one row.
void put_scales(const ScaleCopy& copy, uint8_t* to, const uint8_t* from);
// Copies the scales of `count` consecutive rows; `from` has where each row's scales are.
void put_scale_rows(const ScaleCopy& copy, uint8_t* to, const uint8_t* const* from, uint32_t count);
// Sets the scales of one row to zero.
void clear_scales(const ScaleCopy& copy, uint8_t* to);

}  // namespace deepep
