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

constexpr uint64_t kStreamBytes = 256;  // shorter rows are copied plainly: they would be half-filled cache lines mostly

// Vectors of 32-bit lanes. A lane holds two neighbouring channels of a bf16 row: the even one below, the odd one above. Split
// and joined by shifts and masks, they need no shuffles.
template <int Lanes>
struct Vector {
  typedef float f32 __attribute__((vector_size(Lanes * 4)));
  typedef uint32_t u32 __attribute__((vector_size(Lanes * 4)));
  typedef uint16_t u16 __attribute__((vector_size(Lanes * 2)));
};

template <class T>
DEEPEP_INLINE T load(const void* from) {
  T value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

// 2 * Lanes channels in f32.
template <int Lanes>
struct Pair {
  typename Vector<Lanes>::f32 even;
  typename Vector<Lanes>::f32 odd;
};

template <int Lanes>
DEEPEP_INLINE Pair<Lanes> load_bf16(const uint16_t* from) {
  typedef typename Vector<Lanes>::u32 u32;
  typedef typename Vector<Lanes>::f32 f32;
  const u32 both = load<u32>(from);
  return {(f32)(both << 16), (f32)(both & 0xffff0000)};
}

// bf16_from_f32 lane by lane, in the upper half of the lane; the lower half is anything.
template <int Lanes>
DEEPEP_INLINE typename Vector<Lanes>::u32 round_to_bf16(const typename Vector<Lanes>::f32& value) {
  typedef typename Vector<Lanes>::u32 u32;
  const u32 bits = (u32)value;
  const u32 rounded = bits + 0x7fff + ((bits >> 16) & 1);
  const u32 nan = u32{} + (uint32_t{kBf16Nan} << 16);
  return (bits & kMagnitudeMask) > kInfinityBits ? nan : rounded;
}

template <int Lanes>
DEEPEP_INLINE void store_bf16(uint16_t* to, const Pair<Lanes>& value) {
  typedef typename Vector<Lanes>::u32 u32;
  const u32 both = round_to_bf16<Lanes>(value.even) >> 16 | (round_to_bf16<Lanes>(value.odd) & 0xffff0000);
  std::memcpy(to, &both, sizeof both);
}

// e4m3_from_f32 lane by lane, in the lowest byte of the lane; the rest is anything. `Tame` says that no lane is NaN or rounds
// beyond the largest finite value; otherwise that value, a fixed point of the rounding, is the most that goes in.
template <int Lanes, bool Tame>
DEEPEP_INLINE typename Vector<Lanes>::u32 round_to_e4m3(const typename Vector<Lanes>::f32& value) {
  typedef typename Vector<Lanes>::u32 u32;
  typedef typename Vector<Lanes>::f32 f32;
  const u32 bits = (u32)value;
  const u32 magnitude = bits & kMagnitudeMask;
  const u32 most = u32{} + 0x43e00000;
  u32 finite = magnitude;
  if constexpr (!Tame) finite = magnitude < most ? magnitude : most;
  const u32 normal = (finite + (0x7ffff - (960u << 20)) + ((finite >> 20) & 1)) >> 20;  // 960: the biases' difference, 120 << 3
  const u32 subnormal = (u32)((f32)finite + 16384.0f);
  const u32 code = (finite < 0x3c800000 ? subnormal : normal) | ((bits >> 24) & 0x80);
  if constexpr (Tame) return code;
  const u32 nan = u32{} + kE4m3Nan;
  return magnitude > kInfinityBits ? nan : code;
}

template <int Lanes, bool Tame>
DEEPEP_INLINE void store_e4m3(uint8_t* to, const Pair<Lanes>& value) {
  const auto both = (round_to_e4m3<Lanes, Tame>(value.even) & 0xff) | round_to_e4m3<Lanes, Tame>(value.odd) << 8;
  const auto narrow = __builtin_convertvector(both, typename Vector<Lanes>::u16);
  std::memcpy(to, &narrow, sizeof narrow);
}

// A chunk of channels stays in registers while the rows pass by, so every input is read once and nothing is spilled.
template <int Lanes, int Vectors, bool Weighted>
DEEPEP_INLINE void reduce_chunk(const Reduction& r, uint32_t at) {
  constexpr int kChannels = 2 * Lanes;  // of a pair
  Pair<Lanes> sum[Vectors];
  for (int v = 0; v < Vectors; ++v) {
    sum[v] = r.bias_0 != nullptr ? load_bf16<Lanes>(r.bias_0 + at + v * kChannels) : Pair<Lanes>{};
  }
  if (r.bias_1 != nullptr) {
    for (int v = 0; v < Vectors; ++v) {
      const Pair<Lanes> value = load_bf16<Lanes>(r.bias_1 + at + v * kChannels);
      sum[v] = {sum[v].even + value.even, sum[v].odd + value.odd};
    }
  }
  for (uint32_t row = 0; row < r.num_rows; ++row) {
    const uint16_t* values = r.rows[row] + at;
    for (int v = 0; v < Vectors; ++v) {
      Pair<Lanes> value = load_bf16<Lanes>(values + v * kChannels);
      if constexpr (Weighted) value = {value.even * r.weights[row], value.odd * r.weights[row]};
      sum[v] = {sum[v].even + value.even, sum[v].odd + value.odd};
    }
  }
  for (int v = 0; v < Vectors; ++v) store_bf16<Lanes>(r.out + at + v * kChannels, sum[v]);
}

constexpr int kLeastLanes = 4;  // hidden is a multiple of 8

template <int Lanes, int Vectors, bool Weighted>
DEEPEP_INLINE void reduce_body(const Reduction& r) {
  constexpr uint32_t kChunk = 2 * Lanes * Vectors;
  uint32_t at = 0;
  for (; at + kChunk <= r.hidden; at += kChunk) reduce_chunk<Lanes, Vectors, Weighted>(r, at);
  for (; at < r.hidden; at += 2 * kLeastLanes) reduce_chunk<kLeastLanes, 1, Weighted>(r, at);
}

template <int Lanes, int Vectors>
DEEPEP_INLINE void reduce_either(const Reduction& r) {
  if (r.weights != nullptr) reduce_body<Lanes, Vectors, true>(r);
  else reduce_body<Lanes, Vectors, false>(r);
}

// The largest magnitude of a block as bf16 bits; with `SkipNan` NaN left out. `count` is a multiple of 2 * Lanes.
template <int Lanes, bool SkipNan>
DEEPEP_INLINE uint16_t block_magnitude(const uint16_t* x, uint32_t count) {
  typedef typename Vector<2 * Lanes>::u16 u16;
  u16 most = {};
  for (uint32_t i = 0; i < count; i += 2 * Lanes) {
    u16 magnitude = load<u16>(x + i) & 0x7fff;
    if constexpr (SkipNan) magnitude = magnitude & (u16)(magnitude <= kBf16Infinity);
    most = magnitude > most ? magnitude : most;
  }
  uint16_t result = 0;
  for (int lane = 0; lane < 2 * Lanes; ++lane) result = most[lane] > result ? most[lane] : result;
  return result;
}

template <int Lanes, bool Tame>
DEEPEP_INLINE void scale_block(const uint16_t* x, uint32_t count, float scale, uint8_t* out) {
  for (uint32_t i = 0; i < count; i += 2 * Lanes) {
    const Pair<Lanes> value = load_bf16<Lanes>(x + i);
    store_e4m3<Lanes, Tame>(out + i, {value.even * scale, value.odd * scale});
  }
}

// A block whose values are all finite is tame once it is scaled: its largest value becomes 448 or less, but for a rounding
// error that the cast takes back. That is checked first, because it costs nothing and saves a third of the work.
template <int Lanes>
DEEPEP_INLINE Fp8Scale cast_block(const uint16_t* x, uint32_t count, bool round, uint8_t* out) {
  const uint16_t magnitude = block_magnitude<Lanes, false>(x, count);
  if (magnitude < kBf16Infinity) {
    const Fp8Scale scale = fp8_scale(magnitude, round);
    scale_block<Lanes, true>(x, count, scale.scale, out);
    return scale;
  }
  const Fp8Scale scale = fp8_scale(block_magnitude<Lanes, true>(x, count), round);
  scale_block<Lanes, false>(x, count, scale.scale, out);
  return scale;
}

template <int Lanes>
DEEPEP_INLINE void cast_body(const uint16_t* x, uint32_t hidden, bool round, bool ue8m0, uint8_t* out, uint8_t* scales) {
  const uint32_t num_blocks = static_cast<uint32_t>(ceil_div(hidden, kFp8BlockChannels));
  if (ue8m0) std::memset(scales, 0, align_up(num_blocks, 4));
  for (uint32_t block = 0; block < num_blocks; ++block) {
    const uint32_t begin = block * kFp8BlockChannels;
    const uint32_t rest = hidden - begin;
    const Fp8Scale scale = rest >= kFp8BlockChannels ? cast_block<Lanes>(x + begin, kFp8BlockChannels, round, out + begin)
                                                     : cast_block<kLeastLanes>(x + begin, rest, round, out + begin);
    if (ue8m0) scales[block] = ue8m0_from_f32(scale.inverse);
    else std::memcpy(scales + block * 4, &scale.inverse, 4);
  }
}

struct Variant {
  void (*reduce)(const Reduction&);
  void (*cast)(const uint16_t*, uint32_t, bool, bool, uint8_t*, uint8_t*);
};

void reduce_plain(const Reduction& r) { reduce_either<4, 3>(r); }
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
