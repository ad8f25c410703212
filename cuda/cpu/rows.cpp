// What is done to whole rows; see rows.hpp.
//
// The bodies are templates over the number of lanes, written with the compiler's vector types and inlined into one function per
// instruction set. Which one runs is decided once, when the library is loaded.
#include "rows.hpp"

#include <cstring>

#include "../common/cast.hpp"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

// Every function that takes or returns a vector is inlined, so no vector crosses a call.
#pragma GCC diagnostic ignored "-Wpsabi"

#define DEEPEP_INLINE inline __attribute__((always_inline))

namespace deepep {
namespace {

constexpr uint64_t kStreamBytes = 1024;  // shorter rows are copied plainly: they would end in half-filled cache lines

template <int Lanes>
struct Vector {
  typedef float f32 __attribute__((vector_size(Lanes * 4)));
  typedef uint32_t u32 __attribute__((vector_size(Lanes * 4)));
  typedef uint16_t u16 __attribute__((vector_size(Lanes * 2)));
  typedef uint8_t u8 __attribute__((vector_size(Lanes)));
};

template <class T>
DEEPEP_INLINE T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <int Lanes>
DEEPEP_INLINE typename Vector<Lanes>::f32 load_bf16(const uint16_t* from) {
  typedef typename Vector<Lanes>::u32 u32;
  return (typename Vector<Lanes>::f32)(__builtin_convertvector(load<typename Vector<Lanes>::u16>(from), u32) << 16);
}

// bf16_from_f32, lane by lane.
template <int Lanes>
DEEPEP_INLINE void store_bf16(uint16_t* to, const typename Vector<Lanes>::f32& value) {
  typedef typename Vector<Lanes>::u32 u32;
  const u32 bits = (u32)value;
  const u32 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const u32 nan = (u32)((bits & kMagnitudeMask) > kInfinityBits);
  const u32 result = (nan & kBf16Nan) | (~nan & rounded);
  const auto narrow = __builtin_convertvector(result, typename Vector<Lanes>::u16);
  std::memcpy(to, &narrow, sizeof narrow);
}

// e4m3_from_f32, lane by lane.
template <int Lanes>
DEEPEP_INLINE void store_e4m3(uint8_t* to, const typename Vector<Lanes>::f32& value) {
  typedef typename Vector<Lanes>::u32 u32;
  typedef typename Vector<Lanes>::f32 f32;
  const u32 bits = (u32)value;
  const u32 sign = (bits >> 24) & 0x80;
  const u32 magnitude = bits & kMagnitudeMask;
  const u32 normal = ((magnitude + 0x7ffff + ((magnitude >> 20) & 1)) >> 20) - (120u << 3);
  const u32 subnormal = (u32)((f32)magnitude + 16384.0f) & 0xff;
  const u32 is_subnormal = (u32)(magnitude < 0x3c800000);
  const u32 saturates = (u32)(magnitude >= 0x43e00000);
  u32 result = (is_subnormal & subnormal) | (~is_subnormal & normal);
  result = sign | (saturates & 0x7e) | (~saturates & result);
  const u32 nan = (u32)(magnitude > kInfinityBits);
  result = (nan & kE4m3Nan) | (~nan & result);
  const auto narrow = __builtin_convertvector(result, typename Vector<Lanes>::u8);
  std::memcpy(to, &narrow, sizeof narrow);
}

// A chunk of channels stays in registers while the rows pass by, so every input is read once and nothing is spilled.
template <int Lanes, int Vectors, bool Weighted>
DEEPEP_INLINE void reduce_chunk(const Reduction& r, uint32_t at) {
  typedef typename Vector<Lanes>::f32 f32;
  f32 sum[Vectors];
  for (int v = 0; v < Vectors; ++v) {
    sum[v] = r.bias_0 != nullptr ? load_bf16<Lanes>(r.bias_0 + at + v * Lanes) : f32{};
  }
  if (r.bias_1 != nullptr) {
    for (int v = 0; v < Vectors; ++v) sum[v] = sum[v] + load_bf16<Lanes>(r.bias_1 + at + v * Lanes);
  }
  for (uint32_t row = 0; row < r.num_rows; ++row) {
    const uint16_t* values = r.rows[row] + at;
    for (int v = 0; v < Vectors; ++v) {
      f32 value = load_bf16<Lanes>(values + v * Lanes);
      if constexpr (Weighted) value = value * r.weights[row];
      sum[v] = sum[v] + value;
    }
  }
  for (int v = 0; v < Vectors; ++v) store_bf16<Lanes>(r.out + at + v * Lanes, sum[v]);
}

template <int Lanes, int Vectors, bool Weighted>
DEEPEP_INLINE void reduce_body(const Reduction& r) {
  constexpr uint32_t kChunk = Lanes * Vectors;
  uint32_t at = 0;
  for (; at + kChunk <= r.hidden; at += kChunk) reduce_chunk<Lanes, Vectors, Weighted>(r, at);
  constexpr int kLeast = Lanes < 8 ? Lanes : 8;  // hidden is a multiple of 8
  for (; at < r.hidden; at += kLeast) reduce_chunk<kLeast, 1, Weighted>(r, at);
}

template <int Lanes, int Vectors>
DEEPEP_INLINE void reduce_either(const Reduction& r) {
  if (r.weights != nullptr) reduce_body<Lanes, Vectors, true>(r);
  else reduce_body<Lanes, Vectors, false>(r);
}

// The largest magnitude of a block as bf16 bits, NaN left out. `count` is a multiple of 8.
template <int Lanes>
DEEPEP_INLINE uint16_t block_magnitude(const uint16_t* x, uint32_t count) {
  typedef typename Vector<Lanes>::u16 u16;
  u16 most = {};
  for (uint32_t i = 0; i < count; i += Lanes) {
    u16 magnitude = load<u16>(x + i) & 0x7fff;
    magnitude = magnitude & (u16)(magnitude <= 0x7f80);
    most = magnitude > most ? magnitude : most;
  }
  uint16_t result = 0;
  for (int lane = 0; lane < Lanes; ++lane) result = most[lane] > result ? most[lane] : result;
  return result;
}

template <int Lanes>
DEEPEP_INLINE void scale_block(const uint16_t* x, uint32_t count, float scale, uint8_t* out) {
  for (uint32_t i = 0; i < count; i += Lanes) store_e4m3<Lanes>(out + i, load_bf16<Lanes>(x + i) * scale);
}

template <int Lanes>
DEEPEP_INLINE void cast_body(const uint16_t* x, uint32_t hidden, bool round, bool ue8m0, uint8_t* out, uint8_t* scales) {
  constexpr int kLeast = Lanes < 8 ? Lanes : 8;
  const uint32_t num_blocks = static_cast<uint32_t>(ceil_div(hidden, kFp8BlockChannels));
  if (ue8m0) std::memset(scales, 0, align_up(num_blocks, 4));
  for (uint32_t block = 0; block < num_blocks; ++block) {
    const uint32_t begin = block * kFp8BlockChannels;
    const bool whole = hidden - begin >= kFp8BlockChannels;
    const uint32_t count = whole ? kFp8BlockChannels : hidden - begin;
    const uint16_t magnitude = whole ? block_magnitude<Lanes * 2>(x + begin, count) : block_magnitude<kLeast>(x + begin, count);
    const Fp8Scale scale = fp8_scale(magnitude, round);
    if (whole) scale_block<Lanes>(x + begin, count, scale.scale, out + begin);
    else scale_block<kLeast>(x + begin, count, scale.scale, out + begin);
    if (ue8m0) scales[block] = ue8m0_from_f32(scale.inverse);
    else std::memcpy(scales + block * 4, &scale.inverse, 4);
  }
}

struct Variant {
  void (*reduce)(const Reduction&);
  void (*cast)(const uint16_t*, uint32_t, bool, bool, uint8_t*, uint8_t*);
};

void reduce_plain(const Reduction& r) { reduce_either<4, 2>(r); }
void cast_plain(const uint16_t* x, uint32_t hidden, bool round, bool ue8m0, uint8_t* out, uint8_t* scales) {
  cast_body<4>(x, hidden, round, ue8m0, out, scales);
}

#if defined(__x86_64__)
__attribute__((target("avx2"))) void reduce_avx2(const Reduction& r) { reduce_either<8, 4>(r); }
__attribute__((target("avx2"))) void cast_avx2(const uint16_t* x, uint32_t hidden, bool round, bool ue8m0, uint8_t* out,
                                               uint8_t* scales) {
  cast_body<8>(x, hidden, round, ue8m0, out, scales);
}
#define DEEPEP_AVX512 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")))
DEEPEP_AVX512 void reduce_avx512(const Reduction& r) { reduce_either<16, 4>(r); }
DEEPEP_AVX512 void cast_avx512(const uint16_t* x, uint32_t hidden, bool round, bool ue8m0, uint8_t* out, uint8_t* scales) {
  cast_body<16>(x, hidden, round, ue8m0, out, scales);
}
#endif

Variant choose() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
      __builtin_cpu_supports("avx512dq")) {
    return {reduce_avx512, cast_avx512};
  }
  if (__builtin_cpu_supports("avx2")) return {reduce_avx2, cast_avx2};
#endif
  return {reduce_plain, cast_plain};
}

const Variant kVariant = choose();

}  // namespace

void reduce_rows(const Reduction& reduction) { kVariant.reduce(reduction); }

void cast_row_to_fp8(const uint16_t* x, uint32_t hidden, bool round, bool ue8m0, uint8_t* out, uint8_t* scales) {
  kVariant.cast(x, hidden, round, ue8m0, out, scales);
}

void stream_row(uint8_t* dst, const uint8_t* src, uint64_t bytes) {
#if defined(__x86_64__)
  if (bytes >= kStreamBytes && bytes % 16 == 0 && reinterpret_cast<uintptr_t>(dst) % 16 == 0) {
    uint64_t i = 0;
    for (; i + 64 <= bytes; i += 64) {
      const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i));
      const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i + 16));
      const __m128i c = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i + 32));
      const __m128i d = _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i + 48));
      _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i), a);
      _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i + 16), b);
      _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i + 32), c);
      _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i + 48), d);
    }
    for (; i < bytes; i += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i)));
    }
    return;
  }
#endif
  std::memcpy(dst, src, bytes);
}

void stream_fence() {
#if defined(__x86_64__)
  _mm_sfence();  // Non-temporal stores pass the caches and may be seen after a later plain store; not past this.
#endif
}

}  // namespace deepep
