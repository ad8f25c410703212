// The kernels of a decode step that are not the library's: routing and rows are drawn, experts compute, and what came back is
// checked.
//
// In: commands of scripts/decode/kernels.ts, whose fields are words of 64 bits. Out: work on their stream, which a graph can
// record. Everything is drawn from a seed and a step number that lives on the device, so each replay of a graph has rows and a
// routing of its own, and is checked in whole without the host. Plain C++ but for the clock. For tests, soak.ts and serve.ts:
// not part of the package.
#include <cuda_runtime_api.h>
#include <time.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr uint32_t kThreads = 256, kBlockChannels = 128;

using Counter = unsigned long long;  // as the atomic functions want it

// What a check has found. Starts as zeros, but for `first`, which is all ones.
struct Record {
  Counter step;        // of the step at hand; counted up by its check
  Counter mismatches;  // elements
  Counter first;       // step * 2^20 + token of the earliest
};

struct Draw {
  uint64_t x;             // bf16 [tokens, hidden]
  uint64_t topk_idx;      // i32 [tokens, topk]
  uint64_t topk_weights;  // f32, the same shape
  uint64_t record, seed, rank, tokens, hidden, experts, topk;
};

struct Experts {
  uint64_t x;                                               // bf16 or e4m3 [local_experts, max_rows, hidden]
  uint64_t scales;                                          // f32, with strides in bytes; 0 for bf16
  uint64_t scale_expert_stride, scale_row_stride, scale_elem_stride;
  uint64_t count;                                           // i32 [local_experts]
  uint64_t y;                                               // bf16 [local_experts, max_rows, hidden]
  uint64_t first_expert, local_experts, max_rows, hidden, multiply, add;
};

struct Check {
  uint64_t x, topk_idx, topk_weights;
  uint64_t out;  // bf16 [tokens, hidden]
  uint64_t record, tokens, hidden, topk, multiply, add;
};

struct Compute {
  uint64_t begin, end;  // u64: the earliest begin and the latest end of a block, nanoseconds of the device's clock
  uint64_t sink;        // f32 [blocks, kThreads]
  uint64_t steps, blocks;
};

struct Stamp {
  uint64_t at;  // u64
};

// Of a graph, so far.
struct Shape {
  uint64_t nodes, edges;
  uint64_t widest;  // the most edges from or to one node
};

template <class T>
__device__ T* at(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

__device__ uint32_t mix(uint32_t z) {
  z = (z ^ (z >> 16)) * 0x21f0aaadu;
  z = (z ^ (z >> 15)) * 0x735a2d97u;
  return z ^ (z >> 15);
}

// Numbers of a token in a step, or with `what` of one of its entries or channels.
__device__ uint32_t drawn(const Draw& d, uint64_t step, uint32_t token, uint32_t what) {
  const uint32_t a = mix(static_cast<uint32_t>(d.seed + step) + 0x9e3779b9u * static_cast<uint32_t>(d.rank + 1));
  return mix(mix(a + 0x85ebca6bu * (token + 1)) + 0xc2b2ae35u * what);
}

__device__ float f32_of(uint16_t bf16) {
  const uint32_t bits = uint32_t{bf16} << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// To nearest, ties to even; nothing here is NaN.
__device__ uint16_t bf16_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

__device__ float f32_of_e4m3(uint8_t code) {
  const uint32_t exponent = code >> 3 & 15, mantissa = code & 7;
  // 2^-9 for subnormals, else (8 + mantissa) * 2^(exponent - 10), both by the bits of a power of two.
  const uint32_t power = (127u - 10u + (exponent == 0 ? 1u : exponent)) << 23;
  float scale;
  memcpy(&scale, &power, sizeof scale);
  const float magnitude = static_cast<float>(exponent == 0 ? mantissa : 8 + mantissa) * scale;
  return code & 0x80 ? -magnitude : magnitude;
}

// What an expert makes of a value, in f32, then bf16. Both steps are exact for what is drawn, before the rounding.
__device__ uint16_t expert_value(uint64_t expert, float x, uint64_t multiply, uint64_t add) {
  return bf16_of(x * static_cast<float>(expert % multiply + 1) + static_cast<float>(expert % add));
}

// A token's experts are distinct: equal steps from a first one. Every fourth step crowds them at the begin; one entry of 16 is
// -1, and one token of 16 has none. Values are whole numbers to 16 times a power of two, with 448 of them at the begin of every
// block: the cast to FP8 keeps them as they are.
__global__ void draw_kernel(Draw d) {
  const uint32_t token = blockIdx.x, topk = static_cast<uint32_t>(d.topk), experts = static_cast<uint32_t>(d.experts);
  const uint64_t step = at<const Record>(d.record)->step;
  const uint32_t word = drawn(d, step, token, 0);
  const uint32_t spread = experts / topk, crowd = experts / 8 + 1;
  for (uint32_t k = threadIdx.x; k < topk; k += blockDim.x) {
    const uint32_t entry = drawn(d, step, token, 1 + k);
    const bool none = word % 16 == 0 || entry % 16 == 0;
    const uint32_t first = (word >> 4) % (step % 4 == 0 ? crowd : experts), stride = 1 + (word >> 16) % (spread ? spread : 1);
    at<int32_t>(d.topk_idx)[token * topk + k] = none ? -1 : static_cast<int32_t>((first + k * stride) % experts);
    at<float>(d.topk_weights)[token * topk + k] = static_cast<float>(1 + (entry >> 8) % 255) / 256.0f;
  }
  const int32_t exponent = static_cast<int32_t>((word >> 8) % 7) - 3;
  const float power = exponent < 0 ? 1.0f / static_cast<float>(1 << -exponent) : static_cast<float>(1 << exponent);
  for (uint32_t c = threadIdx.x; c < d.hidden; c += blockDim.x) {
    const int32_t whole = c % kBlockChannels == 0 ? 448 : static_cast<int32_t>(drawn(d, step, token, 64 + c) % 33) - 16;
    at<uint16_t>(d.x)[token * d.hidden + c] = bf16_of(power * static_cast<float>(whole));
  }
}

// The stand-in experts: as many blocks for each.
__global__ void experts_kernel(Experts p) {
  const uint32_t blocks = gridDim.x / static_cast<uint32_t>(p.local_experts), local = blockIdx.x / blocks;
  const auto rows = static_cast<uint32_t>(at<const int32_t>(p.count)[local]);
  for (uint32_t row = blockIdx.x % blocks; row < rows; row += blocks) {
    const uint64_t begin = (local * p.max_rows + row) * p.hidden;
    const uint64_t scales = p.scales + local * p.scale_expert_stride + row * p.scale_row_stride;
    for (uint32_t c = threadIdx.x; c < p.hidden; c += blockDim.x) {
      float x = 0;
      if (p.scales == 0) {
        x = f32_of(at<const uint16_t>(p.x)[begin + c]);
      } else {
        const float scale = *at<const float>(scales + c / kBlockChannels * p.scale_elem_stride);
        x = f32_of(bf16_of(f32_of_e4m3(at<const uint8_t>(p.x)[begin + c]) * scale));
      }
      at<uint16_t>(p.y)[begin + c] = expert_value(p.first_expert + local, x, p.multiply, p.add);
    }
  }
}

// Every element of every token, computed from what was sent.
__global__ void check_kernel(Check p) {
  const uint32_t token = blockIdx.x, topk = static_cast<uint32_t>(p.topk);
  auto* record = at<Record>(p.record);
  const int32_t* experts = at<const int32_t>(p.topk_idx) + token * topk;
  const float* weights = at<const float>(p.topk_weights) + token * topk;
  Counter mismatches = 0;
  for (uint32_t c = threadIdx.x; c < p.hidden; c += blockDim.x) {
    const float x = f32_of(at<const uint16_t>(p.x)[token * p.hidden + c]);
    float sum = 0;
    for (uint32_t k = 0; k < topk; ++k) {
      if (experts[k] < 0) continue;
      const float y = f32_of(expert_value(static_cast<uint64_t>(experts[k]), x, p.multiply, p.add));
      sum += weights[k] * y;  // compiled without FMA: products are rounded
    }
    mismatches += bf16_of(sum) != at<const uint16_t>(p.out)[token * p.hidden + c];
  }
  if (mismatches == 0) return;
  atomicAdd(&record->mismatches, mismatches);
  atomicMin(&record->first, record->step << 20 | token);
}

__global__ void advance_kernel(uint64_t record) { at<Record>(record)->step += 1; }

__device__ Counter now() {
#ifdef __CUDA_ARCH__
  Counter ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
#else
  timespec time = {};
  clock_gettime(CLOCK_MONOTONIC, &time);
  return static_cast<Counter>(time.tv_sec) * 1'000'000'000 + static_cast<Counter>(time.tv_nsec);
#endif
}

__global__ void stamp_kernel(Stamp p) { *at<Counter>(p.at) = now(); }

// Arithmetic, with the times of its begin and end.
__global__ void compute_kernel(Compute p) {
  if (threadIdx.x == 0) atomicMin(at<Counter>(p.begin), now());
  float a = static_cast<float>(threadIdx.x), b = 1.0001f;
  for (uint64_t i = 0; i < p.steps; ++i) a = a * b + 0.5f;
  at<float>(p.sink)[blockIdx.x * blockDim.x + threadIdx.x] = a;
  if (threadIdx.x == 0) atomicMax(at<Counter>(p.end), now());
}

template <class Params>
cudaError_t launch(void (*kernel)(Params), uint32_t blocks, uint32_t threads, const void* words, uint64_t stream) {
  Params params;
  memcpy(&params, words, sizeof params);
  if (blocks == 0) return cudaSuccess;
  void* args[] = {&params};
  return cudaLaunchKernel(kernel, dim3(blocks), dim3(threads), args, 0, reinterpret_cast<cudaStream_t>(stream));
}

uint32_t word_of(const void* words, uint64_t offset) {
  uint64_t word;
  memcpy(&word, static_cast<const char*>(words) + offset, sizeof word);
  return static_cast<uint32_t>(word);
}

uint32_t least(uint32_t a, uint32_t b) { return a < b ? a : b; }

constexpr uint32_t kExpertBlocks = 8;  // for one expert

}  // namespace

#define DECODE_API extern "C" __attribute__((visibility("default")))

// Loads the kernels: nothing is loaded later, while another kernel spins. The other calls need it.
DECODE_API int32_t deepep_decode_open(int32_t device) {
  const void* const kernels[] = {
      reinterpret_cast<const void*>(draw_kernel),    reinterpret_cast<const void*>(experts_kernel),
      reinterpret_cast<const void*>(check_kernel),   reinterpret_cast<const void*>(advance_kernel),
      reinterpret_cast<const void*>(compute_kernel), reinterpret_cast<const void*>(stamp_kernel)};
  cudaError_t error = cudaSetDevice(device);
  for (const void* kernel : kernels) {
    cudaFuncAttributes attributes;
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
  }
  return error;
}

DECODE_API int32_t deepep_decode_draw(const void* draw, uint64_t stream) {
  return launch(draw_kernel, word_of(draw, offsetof(Draw, tokens)), kThreads, draw, stream);
}

DECODE_API int32_t deepep_decode_experts(const void* experts, uint64_t stream) {
  const uint32_t rows = least(word_of(experts, offsetof(Experts, max_rows)), kExpertBlocks);
  return launch(experts_kernel, rows * word_of(experts, offsetof(Experts, local_experts)), kThreads, experts, stream);
}

// Checks, then counts the step.
DECODE_API int32_t deepep_decode_check(const void* check, uint64_t stream) {
  const cudaError_t error = launch(check_kernel, word_of(check, offsetof(Check, tokens)), kThreads, check, stream);
  if (error != cudaSuccess) return error;
  const char* record = static_cast<const char*>(check) + offsetof(Check, record);
  return launch(advance_kernel, 1, 1, record, stream);
}

DECODE_API int32_t deepep_decode_compute(const void* compute, uint64_t stream) {
  return launch(compute_kernel, word_of(compute, offsetof(Compute, blocks)), kThreads, compute, stream);
}

DECODE_API int32_t deepep_decode_stamp(const void* stamp, uint64_t stream) { return launch(stamp_kernel, 1, 1, stamp, stream); }

// Says what the graph looks like that a stream is captured into. It may fail for want of memory.
DECODE_API int32_t deepep_decode_shape(void* out, uint64_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  cudaGraph_t graph = nullptr;
  cudaError_t error =
      cudaStreamGetCaptureInfo(reinterpret_cast<cudaStream_t>(stream), &status, nullptr, &graph, nullptr, nullptr, nullptr);
  if (error == cudaSuccess && status != cudaStreamCaptureStatusActive) error = cudaErrorInvalidValue;
  size_t nodes = 0, edges = 0;
  if (error == cudaSuccess) error = cudaGraphGetNodes(graph, nullptr, &nodes);
  if (error == cudaSuccess) error = cudaGraphGetEdges(graph, nullptr, nullptr, nullptr, &edges);
  std::vector<cudaGraphNode_t> from(edges), to(edges);
  std::vector<cudaGraphEdgeData> kinds(edges);
  if (error == cudaSuccess && edges != 0) {
    error = cudaGraphGetEdges(graph, from.data(), to.data(), kinds.data(), &edges);
  }
  if (error != cudaSuccess) return error;
  Shape shape = {nodes, edges, 0};
  for (const auto& ends : {from, to}) {
    for (const cudaGraphNode_t node : ends) {
      const auto at_it = static_cast<uint64_t>(std::count(ends.begin(), ends.end(), node));
      if (at_it > shape.widest) shape.widest = at_it;
    }
  }
  memcpy(out, &shape, sizeof shape);
  return cudaSuccess;
}

// Writes what an error code means.
DECODE_API int32_t deepep_decode_error(int32_t code, char* out, uint32_t bytes) {
  strncpy(out, cudaGetErrorString(static_cast<cudaError_t>(code)), bytes - 1);
  out[bytes - 1] = 0;
  return 0;
}
