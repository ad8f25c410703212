// The primitives of the kernels, for the emulated device: the same functions as in cuda/kernels/primitives.cuh, without
// instructions of a GPU.
//
// In: addresses of 4- or 8-byte words. Out: what the name says. A load with an order is a look at what others do, so that other
// threads go on in between. Callers: the kernels; build.ts puts this file in the place of theirs.
#pragma once

#include <atomic>
#include <cstdint>
#include <ctime>
#include <type_traits>

#include "../common/cast.hpp"
#include "bulk.hpp"
#include "language.hpp"

#define DEEPEP_COLD

namespace deepep {

constexpr uint32_t kWarpLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffff;
constexpr bool kHasTma = true;

// ---- words with order and scope -----------------------------------------------------------------------------------------

template <class T>
constexpr bool kIsWord = std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

// A GPU would fault.
template <class T>
void check_word(const T* address) {
  static_assert(kIsWord<T>);
  if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) {
    emulator::this_block().fail("a word of %zu bytes at %p", sizeof(T), static_cast<const void*>(address));
  }
}

template <int kOrder, class T>
T looked_at(const T* address) {
  check_word(address);
  emulator::this_block().poll();
  return __atomic_load_n(address, kOrder);
}

template <int kOrder, class T>
void stored(T* address, T value) {
  check_word(address);
  __atomic_store_n(address, value, kOrder);
  if (kOrder == __ATOMIC_RELEASE) emulator::this_block().progress();
}

template <class T>
T load_acquire_sys(const T* address) {
  return looked_at<__ATOMIC_ACQUIRE>(address);
}
template <class T>
T load_relaxed_sys(const T* address) {
  return looked_at<__ATOMIC_RELAXED>(address);
}
template <class T>
T load_acquire_gpu(const T* address) {
  return looked_at<__ATOMIC_ACQUIRE>(address);
}
template <class T>
T load_relaxed_gpu(const T* address) {
  return looked_at<__ATOMIC_RELAXED>(address);
}
template <class T>
void store_release_sys(T* address, std::type_identity_t<T> value) {
  stored<__ATOMIC_RELEASE>(address, value);
}
template <class T>
void store_relaxed_sys(T* address, std::type_identity_t<T> value) {
  stored<__ATOMIC_RELAXED>(address, value);
}
template <class T>
void store_release_gpu(T* address, std::type_identity_t<T> value) {
  stored<__ATOMIC_RELEASE>(address, value);
}

// A GPU would fault here, too. Answers which of the words comes first: in turns, since no order is promised.
inline uint32_t first_of_pair(const uint64_t* address) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) {
    emulator::this_block().fail("a pair of words at %p", static_cast<const void*>(address));
  }
  static std::atomic<uint32_t> turns{0};
  const uint32_t turn = turns.fetch_add(1, std::memory_order_relaxed);
  return (turn ^ turn >> 3) & 1;
}
inline void load_acquire_sys(const uint64_t* address, uint64_t& first, uint64_t& second) {
  uint64_t words[2];
  const uint32_t nth = first_of_pair(address);
  words[nth] = load_acquire_sys(address + nth);
  words[1 - nth] = load_acquire_sys(address + 1 - nth);
  first = words[0], second = words[1];
}
inline void store_relaxed_sys(uint64_t* address, uint64_t first, uint64_t second) {
  const uint64_t words[2] = {first, second};
  const uint32_t nth = first_of_pair(address);
  store_relaxed_sys(address + nth, words[nth]);
  emulator::this_block().poll();  // Others may look in between.
  store_relaxed_sys(address + 1 - nth, words[1 - nth]);
}
inline void store_release_sys(uint64_t* address, uint64_t first, uint64_t second) {
  const uint64_t words[2] = {first, second};
  const uint32_t nth = first_of_pair(address);
  store_release_sys(address + nth, words[nth]);
  emulator::this_block().poll();
  store_release_sys(address + 1 - nth, words[1 - nth]);
}

// All of these return the word as it was before.
template <class T>
T add_relaxed_gpu(T* address, std::type_identity_t<T> value) {
  check_word(address);
  return atomicAdd(address, value);
}
// Compared as unsigned.
template <class T>
T max_relaxed_gpu(T* address, std::type_identity_t<T> value) {
  static_assert(std::is_unsigned_v<T>);
  check_word(address);
  return atomicMax(address, value);
}

template <class T>
void reduce_add_release_gpu(T* address, std::type_identity_t<T> value) {
  check_word(address);
  emulator::atomically<__ATOMIC_ACQ_REL>(address, [&](T old) { return static_cast<T>(old + value); });
}
template <class T>
void reduce_add_relaxed_gpu(T* address, std::type_identity_t<T> value) {
  add_relaxed_gpu(address, value);
}

inline void store_release_gpu(uint64_t* address, uint64_t first, uint64_t second) { store_release_sys(address, first, second); }

inline void fence_acq_rel_gpu() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void fence_acq_rel_sys() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// ---- 16 bytes at once ----------------------------------------------------------------------------------------------------

inline uint4 load_stream(const void* address) { return *static_cast<const uint4*>(address); }

inline void store_stream(void* address, const uint4& v) {
  *static_cast<uint4*>(address) = v;
  emulator::this_block().progress();
}

inline void store_passing(void* address, const uint2& v) {
  *static_cast<uint2*>(address) = v;
  emulator::this_block().progress();
}

inline void store_lasting(void* address, uint32_t v) {
  *static_cast<uint32_t*>(address) = v;
  emulator::this_block().progress();
}

// ---- time, lanes -----------------------------------------------------------------------------------------------------------

inline uint64_t global_time_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return static_cast<uint64_t>(now.tv_sec) * 1'000'000'000 + static_cast<uint64_t>(now.tv_nsec);
}

inline uint32_t lane_id() { return emulator::this_fiber().index % kWarpLanes; }

// ---- casts -----------------------------------------------------------------------------------------------------------------

// Two channels of a bf16 row, the first one in the lower half. Nearest, ties to even; NaN becomes 0x7fff.
inline uint32_t bf16_pair(float low, float high) {
  return static_cast<uint32_t>(bf16_from_f32(high)) << 16 | bf16_from_f32(low);
}

// Of two pairs of bf16 the larger magnitudes, place by place; NaN is left out. `most` has no signs.
inline uint32_t larger_magnitudes(uint32_t most, uint32_t pair) {
  const uint32_t low = pair & 0x7fff, high = pair >> 16 & 0x7fff, most_low = most & 0xffff, most_high = most >> 16;
  return (low <= kBf16Infinity && low > most_low ? low : most_low) |
         (high <= kBf16Infinity && high > most_high ? high : most_high) << 16;
}

// Two values as e4m3, the first one in the lower byte.
inline uint32_t e4m3_pair(float low, float high) {
  return e4m3_from_f32(low) | static_cast<uint32_t>(e4m3_from_f32(high)) << 8;
}

// Two e4m3 values as f32, exactly; the first one in the lower byte.
inline float2 floats_from_e4m3(uint16_t both) {
  return {f32_from_e4m3(static_cast<uint8_t>(both)), f32_from_e4m3(static_cast<uint8_t>(both >> 8))};
}

// ---- within a block --------------------------------------------------------------------------------------------------------

// A meeting of `threads` threads of the block, whole warps; `id` 1 … 15 (0 is __syncthreads).
[[gnu::noinline]] inline void named_barrier(uint32_t id, uint32_t threads) {
  emulator::this_block().synchronize(id, threads, emulator::Vote::none, false, EMULATED_HERE);
}

// A word in shared memory that warps pass on without a meeting.
inline uint32_t load_acquire_block(const uint32_t* shared) { return looked_at<__ATOMIC_ACQUIRE>(shared); }
inline void store_release_block(uint32_t* shared, uint32_t value) { stored<__ATOMIC_RELEASE>(shared, value); }
inline uint32_t exchange_acq_rel_block(uint32_t* shared, uint32_t value) {
  return emulator::atomically<__ATOMIC_ACQ_REL>(shared, [&](uint32_t) { return value; });
}
inline void reduce_add_release_block(uint32_t* shared, uint32_t value) { reduce_add_release_gpu(shared, value); }

inline void await_kernel_before() { emulator::this_block().await_kernel_before(); }

// ---- shared memory and TMA -------------------------------------------------------------------------------------------------

inline void barrier_init(uint64_t* barrier, uint32_t arrivals) { emulator::barrier_init(barrier, arrivals); }
inline void fence_barrier_init() {}
inline void barrier_invalidate(uint64_t* barrier) { emulator::barrier_invalidate(barrier); }
inline void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) { emulator::barrier_arrive(barrier, bytes); }
inline bool barrier_try_wait(uint64_t* barrier, uint32_t parity) { return emulator::barrier_try_wait(barrier, parity); }
inline void barrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!barrier_try_wait(barrier, parity)) {
  }
}

inline void fence_proxy_async_shared() { emulator::proxy_fence(); }
inline void fence_proxy_async() { emulator::proxy_fence(); }

inline void bulk_load(void* to_shared, const void* from, uint32_t bytes, uint64_t* barrier) {
  emulator::bulk_load(to_shared, from, bytes, barrier);
}
inline void bulk_store(void* to, const void* from_shared, uint32_t bytes) { emulator::bulk_store(to, from_shared, bytes); }
inline void bulk_commit() { emulator::bulk_commit(); }

template <uint32_t kPending>
void bulk_wait_read() {
  emulator::bulk_wait(kPending, false);
}
template <uint32_t kPending>
void bulk_wait() {
  emulator::bulk_wait(kPending, true);
}

}  // namespace deepep
