// CUDA C++ for g++: the words and functions of the device language that the kernels use.
//
// In: kernels. Out: the same kernels as C++, whose threads are the fibers of block.hpp. __shared__ memory is thread_local,
// since a block has a thread of the operating system to itself. Callers: kernels.cpp, which includes this before the kernels.
#pragma once

#include <cuda_runtime_api.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "block.hpp"
#include "grid.hpp"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __shared__ thread_local

#define threadIdx (emulator::this_fiber().thread)
#define blockIdx (emulator::this_block().index)
// No macros, since fields of cudaLaunchConfig_t have the same names.
inline constexpr struct {
  struct {
    operator uint32_t() const { return emulator::this_block().grid.threads.x; }
  } x;
} blockDim = {};
inline constexpr struct {
  struct {
    operator uint32_t() const { return emulator::this_block().grid.blocks.x; }
  } x;
} gridDim = {};

// ---- vectors

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) int2 {
  int32_t x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) int4 {
  int32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

// ---- arithmetic

template <class A, class B>
constexpr std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
constexpr std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline float __int_as_float(int32_t bits) { return std::bit_cast<float>(bits); }
inline int32_t __float_as_int(float value) { return std::bit_cast<int32_t>(value); }
// The kernels are compiled without contraction.
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsub_rn(float a, float b) { return a - b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float a) { return 1.0f / a; }
inline int __popc(uint32_t value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline int __clz(int value) { return value == 0 ? 32 : __builtin_clz(static_cast<uint32_t>(value)); }
inline int __clzll(long long value) { return value == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(value)); }

// ---- memory

template <class T>
T __ldcg(const T* address) {
  return *address;
}
template <class T>
T __ldg(const T* address) {
  return *address;
}
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

namespace emulator {

// Replaces *address by change(*address), and answers what was there.
template <int kOrder = __ATOMIC_RELAXED, class T, class Change>
T atomically(T* address, Change change) {
  T old, next;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    next = change(old);
  } while (!__atomic_compare_exchange(address, &old, &next, false, kOrder, __ATOMIC_RELAXED));
  this_block().progress();
  return old;
}

template <class T>
uint64_t bits_of(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// How messages name a kernel with these parameters.
template <class... Args>
const char* name_of() {
  return __PRETTY_FUNCTION__;
}

template <class T>
T shuffle(Meet kind, uint32_t mask, T value, uint32_t by, uint32_t width, const void* at) {
  return from_bits<T>(this_block().meet(kind, mask, bits_of(value), width << 16 | (by & 0xffff), at));
}

}  // namespace emulator

template <class T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return emulator::atomically(address, [&](T old) { return static_cast<T>(old + value); });
}
template <class T>
T atomicSub(T* address, std::type_identity_t<T> value) {
  return emulator::atomically(address, [&](T old) { return static_cast<T>(old - value); });
}
template <class T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return emulator::atomically(address, [&](T old) { return old < value ? value : old; });
}
template <class T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return emulator::atomically(address, [&](T old) { return value < old ? value : old; });
}
template <class T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return emulator::atomically(address, [&](T old) { return old | value; });
}
template <class T>
T atomicAnd(T* address, std::type_identity_t<T> value) {
  return emulator::atomically(address, [&](T old) { return old & value; });
}
template <class T>
T atomicExch(T* address, std::type_identity_t<T> value) {
  return emulator::atomically(address, [&](T) { return value; });
}
template <class T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> desired) {
  return emulator::atomically(address, [&](T old) { return old == expected ? desired : old; });
}

// ---- barriers, lanes

#define EMULATED_HERE __builtin_extract_return_addr(__builtin_return_address(0))

[[gnu::noinline]] inline uint64_t emulated_barrier(emulator::Vote vote, bool value) {
  const dim3& threads = emulator::this_block().grid.threads;
  return emulator::this_block().synchronize(0, threads.x * threads.y * threads.z, vote, value, EMULATED_HERE);
}
inline void __syncthreads() { emulated_barrier(emulator::Vote::none, false); }
inline int __syncthreads_or(int value) { return static_cast<int>(emulated_barrier(emulator::Vote::any, value != 0)); }
inline int __syncthreads_and(int value) { return static_cast<int>(emulated_barrier(emulator::Vote::all, value != 0)); }
inline int __syncthreads_count(int value) { return static_cast<int>(emulated_barrier(emulator::Vote::count, value != 0)); }

[[gnu::noinline]] inline uint64_t emulated_meeting(emulator::Meet kind, uint32_t mask, uint64_t value) {
  return emulator::this_block().meet(kind, mask, value, 0, EMULATED_HERE);
}
inline void __syncwarp(uint32_t mask = 0xffffffff) { emulated_meeting(emulator::Meet::sync, mask, 0); }
inline uint32_t __ballot_sync(uint32_t mask, int value) {
  return static_cast<uint32_t>(emulated_meeting(emulator::Meet::ballot, mask, value != 0));
}
inline int __any_sync(uint32_t mask, int value) { return emulated_meeting(emulator::Meet::any, mask, value != 0) != 0; }
inline int __all_sync(uint32_t mask, int value) { return emulated_meeting(emulator::Meet::all, mask, value != 0) != 0; }
template <class T>
uint32_t __match_any_sync(uint32_t mask, T value) {
  return static_cast<uint32_t>(emulated_meeting(emulator::Meet::match_any, mask, emulator::bits_of(value)));
}

template <class T>
[[gnu::noinline]] T __shfl_sync(uint32_t mask, T value, int source, int width = 32) {
  return emulator::shuffle(emulator::Meet::shuffle, mask, value, static_cast<uint32_t>(source), static_cast<uint32_t>(width),
                           EMULATED_HERE);
}
template <class T>
[[gnu::noinline]] T __shfl_up_sync(uint32_t mask, T value, uint32_t by, int width = 32) {
  return emulator::shuffle(emulator::Meet::shuffle_up, mask, value, by, static_cast<uint32_t>(width), EMULATED_HERE);
}
template <class T>
[[gnu::noinline]] T __shfl_down_sync(uint32_t mask, T value, uint32_t by, int width = 32) {
  return emulator::shuffle(emulator::Meet::shuffle_down, mask, value, by, static_cast<uint32_t>(width), EMULATED_HERE);
}
template <class T>
[[gnu::noinline]] T __shfl_xor_sync(uint32_t mask, T value, int by, int width = 32) {
  return emulator::shuffle(emulator::Meet::shuffle_xor, mask, value, static_cast<uint32_t>(by), static_cast<uint32_t>(width),
                           EMULATED_HERE);
}

inline uint32_t __reduce_add_sync(uint32_t mask, uint32_t value) {
  return static_cast<uint32_t>(emulated_meeting(emulator::Meet::add, mask, value));
}
inline int32_t __reduce_add_sync(uint32_t mask, int32_t value) {
  return static_cast<int32_t>(__reduce_add_sync(mask, static_cast<uint32_t>(value)));
}
inline uint32_t __reduce_min_sync(uint32_t mask, uint32_t value) {
  return static_cast<uint32_t>(emulated_meeting(emulator::Meet::min, mask, value));
}
inline uint32_t __reduce_max_sync(uint32_t mask, uint32_t value) {
  return static_cast<uint32_t>(emulated_meeting(emulator::Meet::max, mask, value));
}
inline int32_t __reduce_min_sync(uint32_t mask, int32_t value) {
  return static_cast<int32_t>(emulated_meeting(emulator::Meet::min_signed, mask, static_cast<uint32_t>(value)));
}
inline int32_t __reduce_max_sync(uint32_t mask, int32_t value) {
  return static_cast<int32_t>(emulated_meeting(emulator::Meet::max_signed, mask, static_cast<uint32_t>(value)));
}
inline uint32_t __reduce_and_sync(uint32_t mask, uint32_t value) {
  return static_cast<uint32_t>(emulated_meeting(emulator::Meet::bit_and, mask, value));
}
inline uint32_t __reduce_or_sync(uint32_t mask, uint32_t value) {
  return static_cast<uint32_t>(emulated_meeting(emulator::Meet::bit_or, mask, value));
}
inline uint32_t __reduce_xor_sync(uint32_t mask, uint32_t value) {
  return static_cast<uint32_t>(emulated_meeting(emulator::Meet::bit_xor, mask, value));
}

inline void __nanosleep(uint32_t) { emulator::this_block().poll(); }

// ---- launches

// As in CUDA's cuda_runtime.h. Of attributes there is only that a kernel is launched early.
template <class... Params, class... Args>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Params...), Args&&... args) {
  std::tuple<std::remove_cv_t<Params>...> copies(args...);
  return emulator::launch(reinterpret_cast<const void*>(kernel),
                          {emulator::name_of<Params...>(), config->gridDim, config->blockDim, config->dynamicSmemBytes,
                           config->numAttrs != 0, [kernel, copies = std::move(copies)] { std::apply(kernel, copies); }},
                          config->stream);
}
// The same: the kernel's type says what `args` point to.
template <class... Params>
cudaError_t cudaLaunchKernel(void (*kernel)(Params...), dim3 blocks, dim3 threads, void** args, size_t shared_bytes,
                             cudaStream_t stream) {
  const cudaLaunchConfig_t config = {blocks, threads, shared_bytes, stream, nullptr, 0};
  return [&]<size_t... kIndex>(std::index_sequence<kIndex...>) {
    return cudaLaunchKernelEx(&config, kernel, *static_cast<std::remove_cv_t<Params>*>(args[kIndex])...);
  }(std::index_sequence_for<Params...>());
}
