// The instructions that C++ has no word for: accesses with a named order and scope, barriers in shared memory, bulk copies by
// the tensor memory accelerator (TMA), fences between its proxy and the generic one, the global timer, casts of pairs.
//
// In: addresses of 4- or 8-byte words. Out: what the name says; `_sys` reaches every GPU and the host, `_gpu` this GPU. An
// access to global memory only, unless the name says shared. Callers: all device code. Everything compiles for every
// architecture; what only sm_90 has is declared everywhere and defined where kHasTma is true, so callers ask `if constexpr
// (kHasTma)`.
#pragma once

#include <cstdint>
#include <type_traits>

#include "../common/cast.hpp"

// A function that is seldom run: it stays out of the way of the instructions that are run each time, because a kernel of a few
// microseconds spends much of them on fetching its code.
#define DEEPEP_COLD __noinline__

namespace deepep {

constexpr uint32_t kWarpLanes = 32;
constexpr uint32_t kAllLanes = 0xffffffff;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
constexpr bool kHasTma = false;
#else
constexpr bool kHasTma = true;
#endif

// ---- words with order and scope -----------------------------------------------------------------------------------------

template <class T>
constexpr bool kIsWord = std::is_integral_v<T> && (sizeof(T) == 4 || sizeof(T) == 8);

// One instruction for either width; the macros are gone after this section.
#define DEEPEP_LOAD(name, instruction)                                                    \
  template <class T>                                                                      \
  __device__ __forceinline__ T name(const T* address) {                                   \
    static_assert(kIsWord<T>);                                                            \
    if constexpr (sizeof(T) == 4) {                                                       \
      uint32_t value;                                                                     \
      asm volatile(instruction ".u32 %0, [%1];" : "=r"(value) : "l"(address) : "memory"); \
      return static_cast<T>(value);                                                       \
    } else {                                                                              \
      uint64_t value;                                                                     \
      asm volatile(instruction ".u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory"); \
      return static_cast<T>(value);                                                       \
    }                                                                                     \
  }
#define DEEPEP_STORE(name, instruction)                                                                        \
  template <class T>                                                                                           \
  __device__ __forceinline__ void name(T* address, std::type_identity_t<T> value) {                            \
    static_assert(kIsWord<T>);                                                                                 \
    if constexpr (sizeof(T) == 4)                                                                              \
      asm volatile(instruction ".u32 [%0], %1;" ::"l"(address), "r"(static_cast<uint32_t>(value)) : "memory"); \
    else                                                                                                       \
      asm volatile(instruction ".u64 [%0], %1;" ::"l"(address), "l"(static_cast<uint64_t>(value)) : "memory"); \
  }
// Returns the word as it was before.
#define DEEPEP_ATOMIC(name, instruction)                                                                \
  template <class T>                                                                                    \
  __device__ __forceinline__ T name(T* address, std::type_identity_t<T> value) {                        \
    static_assert(kIsWord<T> && std::is_unsigned_v<T>);                                                 \
    T old;                                                                                              \
    if constexpr (sizeof(T) == 4)                                                                       \
      asm volatile(instruction ".u32 %0, [%1], %2;" : "=r"(old) : "l"(address), "r"(value) : "memory"); \
    else                                                                                                \
      asm volatile(instruction ".u64 %0, [%1], %2;" : "=l"(old) : "l"(address), "l"(value) : "memory"); \
    return old;                                                                                         \
  }
DEEPEP_LOAD(load_acquire_sys, "ld.acquire.sys.global")
DEEPEP_LOAD(load_relaxed_sys, "ld.relaxed.sys.global")
DEEPEP_LOAD(load_acquire_gpu, "ld.acquire.gpu.global")
DEEPEP_LOAD(load_relaxed_gpu, "ld.relaxed.gpu.global")
DEEPEP_STORE(store_release_sys, "st.release.sys.global")
DEEPEP_STORE(store_relaxed_sys, "st.relaxed.sys.global")
DEEPEP_STORE(store_release_gpu, "st.release.gpu.global")
DEEPEP_ATOMIC(add_relaxed_gpu, "atom.relaxed.gpu.global.add")
DEEPEP_ATOMIC(max_relaxed_gpu, "atom.relaxed.gpu.global.max")
// Nothing comes back, and nobody waits for it.
DEEPEP_STORE(reduce_add_release_gpu, "red.release.gpu.global.add")
DEEPEP_STORE(reduce_add_relaxed_gpu, "red.relaxed.gpu.global.add")
#undef DEEPEP_LOAD
#undef DEEPEP_STORE
#undef DEEPEP_ATOMIC

// Two words side by side, 16-byte aligned, in one instruction. Each is whole; which of them is seen first is not said.
__device__ __forceinline__ void load_acquire_sys(const uint64_t* address, uint64_t& first, uint64_t& second) {
  asm volatile("ld.acquire.sys.global.v2.u64 {%0, %1}, [%2];" : "=l"(first), "=l"(second) : "l"(address) : "memory");
}
__device__ __forceinline__ void store_relaxed_sys(uint64_t* address, uint64_t first, uint64_t second) {
  asm volatile("st.relaxed.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(address), "l"(first), "l"(second) : "memory");
}
__device__ __forceinline__ void store_release_sys(uint64_t* address, uint64_t first, uint64_t second) {
  asm volatile("st.release.sys.global.v2.u64 [%0], {%1, %2};" ::"l"(address), "l"(first), "l"(second) : "memory");
}

__device__ __forceinline__ void store_release_gpu(uint64_t* address, uint64_t first, uint64_t second) {
  asm volatile("st.release.gpu.global.v2.u64 [%0], {%1, %2};" ::"l"(address), "l"(first), "l"(second) : "memory");
}

__device__ __forceinline__ void fence_acq_rel_gpu() { asm volatile("fence.acq_rel.gpu;" ::: "memory"); }
__device__ __forceinline__ void fence_acq_rel_sys() { asm volatile("fence.acq_rel.sys;" ::: "memory"); }

// ---- 16 bytes at once ----------------------------------------------------------------------------------------------------

// Bytes that are read once: they are not kept in L1. Not for memory that this kernel's other threads write.
__device__ __forceinline__ uint4 load_stream(const void* address) {
  uint4 v;
  asm volatile("ld.relaxed.gpu.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(address)
               : "memory");
  return v;
}

__device__ __forceinline__ void store_stream(void* address, const uint4& v) {
  asm volatile("st.relaxed.gpu.global.L1::no_allocate.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// 8 bytes among many that pass through the L2 cache: they go before what will be read again.
__device__ __forceinline__ void store_passing(void* address, const uint2& v) {
  asm volatile(
      "{\n"
      ".reg .b64 policy;\n"
      "createpolicy.fractional.L2::evict_first.b64 policy, 1.0;\n"
      "st.relaxed.gpu.global.L1::no_allocate.L2::cache_hint.v2.u32 [%0], {%1, %2}, policy;\n"
      "}" ::"l"(address),
      "r"(v.x), "r"(v.y)
      : "memory");
}

// 4 bytes of a sector that others will fill: it stays in the L2 cache, since memory takes whole ones only.
__device__ __forceinline__ void store_lasting(void* address, uint32_t v) {
  asm volatile(
      "{\n"
      ".reg .b64 policy;\n"
      "createpolicy.fractional.L2::evict_last.b64 policy, 1.0;\n"
      "st.relaxed.gpu.global.L2::cache_hint.u32 [%0], %1, policy;\n"
      "}" ::"l"(address),
      "r"(v)
      : "memory");
}

// ---- time, lanes -----------------------------------------------------------------------------------------------------------

__device__ __forceinline__ uint64_t global_time_ns() {
  uint64_t value;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(value)::"memory");
  return value;
}

__device__ __forceinline__ uint32_t lane_id() {
  uint32_t lane;
  asm("mov.u32 %0, %laneid;" : "=r"(lane));
  return lane;
}

// ---- casts -----------------------------------------------------------------------------------------------------------------

// Two channels of a bf16 row, the first one in the lower half. Nearest, ties to even; NaN becomes 0x7fff.
__device__ __forceinline__ uint32_t bf16_pair(float low, float high) {
  uint32_t both;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
}

// Of two pairs of bf16 the larger magnitudes, place by place; NaN is left out. `most` has no signs.
__device__ __forceinline__ uint32_t larger_magnitudes(uint32_t most, uint32_t pair) {
  uint32_t both;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(both) : "r"(most), "r"(pair & 0x7fff7fff));
  return both;
}

// Two values as e4m3, the first one in the lower byte: cast.hpp's e4m3_from_f32 in one instruction where there is one.
__device__ __forceinline__ uint32_t e4m3_pair(float low, float high) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  uint16_t both;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(both) : "f"(high), "f"(low));
  return both;
#else
  return e4m3_from_f32(low) | static_cast<uint32_t>(e4m3_from_f32(high)) << 8;
#endif
}

// Two e4m3 values as f32, exactly; the first one in the lower byte.
__device__ __forceinline__ float2 floats_from_e4m3(uint16_t both) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  float2 values;
  asm("{\n"
      ".reg .b32 halves;\n"
      ".reg .b16 low, high;\n"
      "cvt.rn.f16x2.e4m3x2 halves, %2;\n"
      "mov.b32 {low, high}, halves;\n"
      "cvt.f32.f16 %0, low;\n"
      "cvt.f32.f16 %1, high;\n"
      "}"
      : "=f"(values.x), "=f"(values.y)
      : "h"(both));
  return values;
#else
  return {f32_from_e4m3(static_cast<uint8_t>(both)), f32_from_e4m3(static_cast<uint8_t>(both >> 8))};
#endif
}

// ---- within a block --------------------------------------------------------------------------------------------------------

// A meeting of `threads` threads of the block, whole warps; `id` 1 … 15 (0 is __syncthreads).
__device__ __forceinline__ void named_barrier(uint32_t id, uint32_t threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// A word in shared memory that warps pass on without a meeting.
__device__ __forceinline__ uint32_t load_acquire_block(const uint32_t* shared) {
  uint32_t value;
  asm volatile("ld.acquire.cta.u32 %0, [%1];" : "=r"(value) : "l"(shared) : "memory");
  return value;
}
__device__ __forceinline__ void store_release_block(uint32_t* shared, uint32_t value) {
  asm volatile("st.release.cta.u32 [%0], %1;" ::"l"(shared), "r"(value) : "memory");
}
__device__ __forceinline__ uint32_t exchange_acq_rel_block(uint32_t* shared, uint32_t value) {
  uint32_t old;
  asm volatile("atom.acq_rel.cta.exch.b32 %0, [%1], %2;" : "=r"(old) : "l"(shared), "r"(value) : "memory");
  return old;
}
__device__ __forceinline__ void reduce_add_release_block(uint32_t* shared, uint32_t value) {
  asm volatile("red.release.cta.add.u32 [%0], %1;" ::"l"(shared), "r"(value) : "memory");
}

// The first thing in a kernel, by all threads. In one that was launched early (Place): waits until the kernel before it in the
// stream has ended and what that has written is seen. In another kernel it returns at once. PTX ISA: griddepcontrol.
__device__ __forceinline__ void await_kernel_before() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// ---- shared memory and TMA: sm_90 ------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900

// One thread initializes, then fence_barrier_init() and a barrier among those that use it.
__device__ __forceinline__ void barrier_init(uint64_t* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes initialized barriers known to the async proxy.
__device__ __forceinline__ void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

__device__ __forceinline__ void barrier_invalidate(uint64_t* barrier) {
  asm volatile("mbarrier.inval.shared::cta.b64 [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and adds `bytes` to what the running phase waits for.
__device__ __forceinline__ void barrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes) : "memory");
}

__device__ __forceinline__ bool barrier_try_wait(uint64_t* barrier, uint32_t parity) {
  uint32_t done;
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
      "selp.u32 %0, 1, 0, done;\n"
      "}"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

// Bounded by the memory system, not by a peer: nothing but this block's own copies arrive here, and a copy from a dead device
// is an error of the context.
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  while (!barrier_try_wait(barrier, parity)) {
  }
}

// Accesses of this thread to shared memory come before bulk copies of it that are issued after, and the other way round.
__device__ __forceinline__ void fence_proxy_async_shared() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// The same for every kind of memory: between acquiring rows that others wrote by plain stores and reading them by TMA.
__device__ __forceinline__ void fence_proxy_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

// Copies `bytes` (a multiple of 16, both addresses too) into shared memory; arrives with them at `barrier`.
__device__ __forceinline__ void bulk_load(void* to_shared, const void* from, uint32_t bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(to_shared)),
               "l"(from), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// Copies shared memory out; belongs to the bulk group that this thread commits next.
__device__ __forceinline__ void bulk_store(void* to, const void* from_shared, uint32_t bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(to), "r"(shared_address(from_shared)),
               "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// All but the latest `kPending` groups of this thread have read their shared memory: it may be written again.
template <uint32_t kPending>
__device__ __forceinline__ void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kPending) : "memory");
}

// All but the latest `kPending` groups of this thread are complete: what they wrote is visible to this thread, so that its
// release publishes it. Waiting for the reads only is not enough for that.
template <uint32_t kPending>
__device__ __forceinline__ void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(kPending) : "memory");
}

#else

// Declared for code that `if constexpr (kHasTma)` throws away.
__device__ void barrier_init(uint64_t*, uint32_t);
__device__ void fence_barrier_init();
__device__ void barrier_invalidate(uint64_t*);
__device__ void barrier_arrive_expect(uint64_t*, uint32_t);
__device__ bool barrier_try_wait(uint64_t*, uint32_t);
__device__ void barrier_wait(uint64_t*, uint32_t);
__device__ void fence_proxy_async_shared();
__device__ void fence_proxy_async();
__device__ void bulk_load(void*, const void*, uint32_t, uint64_t*);
__device__ void bulk_store(void*, const void*, uint32_t);
__device__ void bulk_commit();
template <uint32_t kPending>
__device__ void bulk_wait_read();
template <uint32_t kPending>
__device__ void bulk_wait();

#endif

}  // namespace deepep
