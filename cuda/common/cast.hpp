// The casts whose bits every backend shares: f32 to and from bf16 and e4m3, and the scales of an FP8 block.
//
// In: one value, or the largest magnitude of a block. Out: bits. The same arithmetic as lib/dtype.ts: rounding to nearest
// even, NaN becomes the one canonical NaN, e4m3 saturates. Callers: combine, the low-latency cast, device code. Nothing here
// may be contracted into a fused multiply-add: compile with -ffp-contract=off (nvcc: --fmad=false).
#pragma once

#include <bit>
#include <cstdint>

#include "regions.hpp"

namespace deepep {

DEEPEP_HOST_DEVICE inline uint32_t bits_from_f32(float value) {
#ifdef __CUDA_ARCH__
  return __float_as_uint(value);
#else
  return std::bit_cast<uint32_t>(value);
#endif
}

DEEPEP_HOST_DEVICE inline float f32_from_bits(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __uint_as_float(bits);
#else
  return std::bit_cast<float>(bits);
#endif
}

constexpr uint32_t kMagnitudeMask = 0x7fffffff;
constexpr uint32_t kInfinityBits = 0x7f800000;
constexpr uint16_t kBf16Nan = 0x7fff;
constexpr uint16_t kBf16Infinity = 0x7f80;
constexpr uint8_t kE4m3Nan = 0x7f;

// Exact.
DEEPEP_HOST_DEVICE inline float f32_from_bf16(uint16_t value) { return f32_from_bits(static_cast<uint32_t>(value) << 16); }

// Nearest, ties to even; overflow becomes infinity.
DEEPEP_HOST_DEVICE inline uint16_t bf16_from_f32(float value) {
  const uint32_t bits = bits_from_f32(value);
  if ((bits & kMagnitudeMask) > kInfinityBits) return kBf16Nan;
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

// Nearest, ties to even; beyond ±448, infinity too, it saturates.
DEEPEP_HOST_DEVICE inline uint8_t e4m3_from_f32(float value) {
  const uint32_t bits = bits_from_f32(value);
  const uint32_t sign = (bits >> 24) & 0x80;
  const uint32_t magnitude = bits & kMagnitudeMask;
  if (magnitude > kInfinityBits) return kE4m3Nan;
  if (magnitude >= 0x43e00000) return static_cast<uint8_t>(sign | 0x7e);  // 448 and more
  if (magnitude < 0x3c800000) {
    // Below 2^-6 the steps are 2^-9, which is the unit in the last place of 2^14: the addition rounds to steps.
    const float steps = f32_from_bits(magnitude) + 16384.0f;
    return static_cast<uint8_t>(sign | (bits_from_f32(steps) & 0xff));
  }
  // Keeps 3 of 23 mantissa bits; the exponent's bias goes from 127 to 7. A carry into the exponent is right as it is.
  return static_cast<uint8_t>(sign | (((magnitude + 0x7ffff + ((magnitude >> 20) & 1)) >> 20) - (120u << 3)));
}

// Exact; 0x7f and 0xff are NaN.
DEEPEP_HOST_DEVICE inline float f32_from_e4m3(uint8_t value) {
  const uint32_t magnitude = value & 0x7f;
  const uint32_t sign = static_cast<uint32_t>(value & 0x80) << 24;
  if (magnitude == 0x7f) return f32_from_bits(0x7fc00000);
  if (magnitude >= 8) return f32_from_bits(sign | ((magnitude << 20) + (120u << 23)));
  const float steps = static_cast<float>(magnitude) * 0.001953125f;  // 2^-9
  return f32_from_bits(bits_from_f32(steps) | sign);
}

// How a block of FP8 values is scaled.
struct Fp8Scale {
  float scale = 0;    // bf16 values are multiplied by it before the cast
  float inverse = 0;  // what is sent: e4m3 values are multiplied by it to get the value back
};

constexpr float kFp8Margin = 1e-4f;  // the least magnitude of a block, so that a block of zeros has a scale

// `magnitude` is the largest bf16 of the block with its sign cleared, NaN left out: magnitudes order like their bits.
DEEPEP_HOST_DEVICE inline Fp8Scale fp8_scale(uint16_t magnitude, bool round) {
  const float largest = f32_from_bf16(magnitude);
  const float amax = largest > kFp8Margin ? largest : kFp8Margin;
  const float inverse = amax * (1.0f / 448.0f);
  if (!round) return {448.0f / amax, inverse};
  const uint32_t bits = bits_from_f32(inverse);
  const int32_t exponent = static_cast<int32_t>(bits >> 23) - 127 + ((bits & 0x7fffff) != 0 ? 1 : 0);
  // An infinite block has exponent 128: 2^128 is infinity, 2^-128 a subnormal.
  const uint32_t scale = exponent == 128 ? 0x00200000u : static_cast<uint32_t>(127 - exponent) << 23;
  return {f32_from_bits(scale), f32_from_bits(static_cast<uint32_t>(127 + exponent) << 23)};
}

// The 8-bit exponent of a scale that is a power of two.
DEEPEP_HOST_DEVICE inline uint8_t ue8m0_from_f32(float scale) { return static_cast<uint8_t>(bits_from_f32(scale) >> 23); }

}  // namespace deepep
