// The naive way of the bench: permute, a memcpy per peer, unpermute, as a list of commands that one call enqueues.
//
// In: commands from scripts/bench/gpu/work.ts, streams and addresses in them; the streams can be of several devices that reach
// each other's memory. Out: work on those streams, or a graph of it.
// The list is run here, so that the naive way pays for its launches but not for JavaScript. Beside it are a scatter and a pull
// without any synchronisation, which are ceilings of calls that move rows by loads and stores, arithmetic that stands for
// experts, and a comparison. Bench only: not part of the package. scripts/bench/gpu/naive_library.ts compiles it.
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

namespace {

// Eight words: an operation | the device of the stream << 32, the stream, then as the operation says.
struct Command {
  uint64_t op, stream, a, b, c, n, m, k;
};

enum Op : uint64_t {
  kGather = 1,   // a = dst, b = src, c = i32 [n] index: n rows of m bytes, dst[i] = src[index[i]]
  kCopy = 2,     // a = dst, b = src, n = bytes: a memcpy
  kRecord = 3,   // n = event
  kWait = 4,     // n = event
  kReduce = 5,   // a = dst bf16 [n, m / 2], b = u64 [n, k] addresses of rows (0 = none), c = f32 [n, k] weights or 0
  kScatter = 6,  // a, c = src of payload and of scales, b = u64 [2, n, hops] addresses that their rows go to (0 = none); m = bytes
                 // of a payload row | of a row of scales << 32, k = hops | blocks at most << 32
  kCompare = 7,  // a, b = n bytes each, c = u64 counter: words of 16 bytes that differ are added to it
  kWork = 8,     // a = f32 to write to, n = blocks, m = steps of arithmetic that touch no memory
  kStream = 9,   // a = dst, b = src, n = bytes, k = blocks: a copy kernel
  kStore = 10,   // a = dst, n = bytes, k = blocks: a kernel that stores and loads nothing
};

// A row's parts, payload and scales.
struct Scatter {
  const uint4* src[2];
  const uint64_t* to[2];  // [tokens, hops]
  uint32_t width[2];      // vectors a row, 0 = no such part
  uint32_t hops;
};

constexpr uint32_t kThreads = 224;   // 4 vectors a thread for a row of 7168 bf16
constexpr uint32_t kUnroll = 4;
constexpr uint32_t kRowsAtOnce = 8;  // of a sum, loaded before the first is added
constexpr uint32_t kEvents = 64;     // 32 for commands, the rest to fork and join a capture
constexpr uint32_t kStreamThreads = 1024;
constexpr uint32_t kMostDevices = 16;

template <class Vector>
__global__ void gather_kernel(Vector* dst, const Vector* src, const int32_t* index, uint64_t rows, uint32_t width) {
  for (uint64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const Vector* from = src + uint64_t(index[row]) * width;
    Vector* to = dst + row * width;
    for (uint32_t v = threadIdx.x; v < width; v += kUnroll * blockDim.x) {
      Vector values[kUnroll];
#pragma unroll
      for (uint32_t u = 0; u < kUnroll; ++u) {
        if (v + u * blockDim.x < width) values[u] = from[v + u * blockDim.x];
      }
#pragma unroll
      for (uint32_t u = 0; u < kUnroll; ++u) {
        if (v + u * blockDim.x < width) to[v + u * blockDim.x] = values[u];
      }
    }
  }
}

// Short rows, as those of scales: a block has many of them.
template <class Vector>
__global__ void gather_short_kernel(Vector* dst, const Vector* src, const int32_t* index, uint64_t rows, uint32_t width) {
  const uint64_t all = rows * width, step = uint64_t(gridDim.x) * blockDim.x;
  for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < all; i += step) {
    dst[i] = src[uint64_t(index[i / width]) * width + i % width];
  }
}

__device__ float f32_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

__device__ uint32_t bf16_of(float value) {  // to nearest, ties to even; rows have no NaN
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

__device__ void add(float* sums, uint4 row, float weight, bool weighted) {
  const uint32_t words[4] = {row.x, row.y, row.z, row.w};
#pragma unroll
  for (uint32_t i = 0; i < 4; ++i) {
    const float low = f32_of(words[i] << 16), high = f32_of(words[i] & 0xffff0000u);
    sums[2 * i] += weighted ? low * weight : low;  // compiled without FMA: products are rounded
    sums[2 * i + 1] += weighted ? high * weight : high;
  }
}

__global__ void reduce_kernel(uint4* dst, const uint64_t* from, const float* weights, uint64_t tokens, uint32_t width,
                              uint32_t hops) {
  for (uint64_t token = blockIdx.x; token < tokens; token += gridDim.x) {
    const uint64_t* rows = from + token * hops;
    for (uint32_t v = threadIdx.x; v < width; v += blockDim.x) {
      float sums[8] = {};
      for (uint32_t first = 0; first < hops; first += kRowsAtOnce) {
        uint4 values[kRowsAtOnce];
#pragma unroll
        for (uint32_t h = 0; h < kRowsAtOnce; ++h) {
          const uint64_t row = first + h < hops ? rows[first + h] : 0;
          if (row) values[h] = reinterpret_cast<const uint4*>(row)[v];
        }
#pragma unroll
        for (uint32_t h = 0; h < kRowsAtOnce; ++h) {
          if (first + h >= hops || !rows[first + h]) continue;
          add(sums, values[h], weights ? weights[token * hops + first + h] : 0.0f, weights != nullptr);
        }
      }
      uint32_t words[4];
#pragma unroll
      for (uint32_t i = 0; i < 4; ++i) words[i] = bf16_of(sums[2 * i]) | bf16_of(sums[2 * i + 1]) << 16;
      dst[token * width + v] = make_uint4(words[0], words[1], words[2], words[3]);
    }
  }
}

__device__ void scatter_row(const uint4* from, const uint64_t* rows, uint32_t width, uint32_t hops) {
  for (uint32_t v = threadIdx.x; v < width; v += kUnroll * blockDim.x) {
    uint4 values[kUnroll];
#pragma unroll
    for (uint32_t u = 0; u < kUnroll; ++u) {
      if (v + u * blockDim.x < width) values[u] = from[v + u * blockDim.x];
    }
    for (uint32_t h = 0; h < hops; ++h) {
      if (!rows[h]) continue;
#pragma unroll
      for (uint32_t u = 0; u < kUnroll; ++u) {
        if (v + u * blockDim.x < width) reinterpret_cast<uint4*>(rows[h])[v + u * blockDim.x] = values[u];
      }
    }
  }
}

__global__ void scatter_kernel(const Scatter s, uint64_t tokens) {
  for (uint64_t token = blockIdx.x; token < tokens; token += gridDim.x) {
    for (uint32_t part = 0; part < 2; ++part) {
      if (s.width[part] == 0) continue;
      scatter_row(s.src[part] + token * s.width[part], s.to[part] + token * s.hops, s.width[part], s.hops);
    }
  }
}

// Loads and stores that L1 does not keep: memory of either side can be another device's.
__global__ void stream_kernel(uint4* dst, const uint4* src, uint64_t words) {
  const uint64_t step = uint64_t(gridDim.x) * blockDim.x;
  for (uint64_t first = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; first < words; first += kUnroll * step) {
    uint4 values[kUnroll];
#pragma unroll
    for (uint32_t u = 0; u < kUnroll; ++u) {
      if (first + u * step < words) values[u] = __ldcg(src + first + u * step);
    }
#pragma unroll
    for (uint32_t u = 0; u < kUnroll; ++u) {
      if (first + u * step < words) __stcg(dst + first + u * step, values[u]);
    }
  }
}

__global__ void store_kernel(uint4* dst, uint64_t words) {
  const uint64_t step = uint64_t(gridDim.x) * blockDim.x;
  const uint4 value = make_uint4(threadIdx.x, blockIdx.x, 0, 0);
  for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < words; i += step) __stcg(dst + i, value);
}

// Keeps multiprocessors busy for a time that does not depend on memory.
__global__ void work_kernel(float* out, uint64_t steps) {
  float a = float(threadIdx.x), b = float(blockIdx.x);
  for (uint64_t i = 0; i < steps; ++i) {
    a = a * 0.999f + b;
    b = b * 0.998f + a;
  }
  if (a == b) out[0] = a;  // never, but the compiler does not know
}

__global__ void compare_kernel(const uint4* a, const uint4* b, unsigned long long* counter, uint64_t words) {
  unsigned long long differ = 0;
  for (uint64_t i = uint64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < words; i += uint64_t(gridDim.x) * blockDim.x) {
    const uint4 x = a[i], y = b[i];
    differ += x.x != y.x || x.y != y.y || x.z != y.z || x.w != y.w;
  }
  if (differ) atomicAdd(counter, differ);
}

// Every device has its own: an event is recorded on the device that it was made on.
cudaEvent_t events[kMostDevices][kEvents];
int32_t recorded_on[kEvents];
int32_t num_devices = 0;

// A stream, and its device.
struct Lane {
  cudaStream_t stream;
  int32_t device;
};
Lane lane_of(const Command& c) { return {reinterpret_cast<cudaStream_t>(c.stream), int32_t(c.op >> 32)}; }

cudaError_t select(int32_t device) {
  if (num_devices == 1) return cudaSuccess;
  return device < num_devices ? cudaSetDevice(device) : cudaErrorInvalidDevice;
}

cudaError_t record(uint32_t event, const Lane& lane) {
  const auto [stream, device] = lane;
  if (const cudaError_t error = select(device)) return error;
  recorded_on[event] = device;
  return cudaEventRecord(events[device][event], stream);
}

cudaError_t wait(uint32_t event, cudaStream_t stream) {
  return cudaStreamWaitEvent(stream, events[recorded_on[event]][event], 0);
}

template <class T>
T* at(uint64_t address) {
  return reinterpret_cast<T*>(address);
}

template <class... P, class... A>
cudaError_t launch(void (*kernel)(P...), uint64_t blocks, uint32_t threads, cudaStream_t stream, A... args) {
  if (blocks == 0) return cudaSuccess;
  kernel<<<uint32_t(blocks < 65536 ? blocks : 65536), threads, 0, stream>>>(args...);
  return cudaGetLastError();
}

template <class Vector>
cudaError_t gather(const Command& c, cudaStream_t stream) {
  const uint32_t width = uint32_t(c.m / sizeof(Vector));
  auto* dst = at<Vector>(c.a);
  const auto* src = at<const Vector>(c.b);
  const auto* index = at<const int32_t>(c.c);
  if (width >= kThreads) return launch(gather_kernel<Vector>, c.n, kThreads, stream, dst, src, index, c.n, width);
  return launch(gather_short_kernel<Vector>, (c.n * width + 255) / 256, 256, stream, dst, src, index, c.n, width);
}

cudaError_t scatter(const Command& c, cudaStream_t stream) {
  const uint64_t blocks = c.k >> 32, hops = uint32_t(c.k);
  const auto* to = at<const uint64_t>(c.b);
  const Scatter s = {{at<const uint4>(c.a), at<const uint4>(c.c)},
                     {to, to + c.n * hops},
                     {uint32_t(c.m) / 16, uint32_t(c.m >> 32) / 16},
                     uint32_t(hops)};
  return launch(scatter_kernel, c.n < blocks ? c.n : blocks, kThreads, stream, s, c.n);
}

cudaError_t run(const Command& c) {
  const Lane lane = lane_of(c);
  const cudaStream_t stream = lane.stream;
  const uint32_t width = uint32_t(c.m / 16);
  if (const cudaError_t error = select(lane.device)) return error;
  switch (uint32_t(c.op)) {
    case kGather: return c.m % 16 == 0 ? gather<uint4>(c, stream) : gather<uint32_t>(c, stream);
    case kCopy: return cudaMemcpyAsync(at<void>(c.a), at<const void>(c.b), c.n, cudaMemcpyDeviceToDevice, stream);
    case kRecord: return record(uint32_t(c.n), lane);
    case kWait: return wait(uint32_t(c.n), stream);
    case kReduce:
      return launch(reduce_kernel, c.n, kThreads, stream, at<uint4>(c.a), at<const uint64_t>(c.b), at<const float>(c.c), c.n,
                    width, uint32_t(c.k));
    case kScatter: return scatter(c, stream);
    case kStream:
      return launch(stream_kernel, c.k, kStreamThreads, stream, at<uint4>(c.a), at<const uint4>(c.b), c.n / 16);
    case kStore: return launch(store_kernel, c.k, kStreamThreads, stream, at<uint4>(c.a), c.n / 16);
    case kWork: return launch(work_kernel, c.n, kThreads, stream, at<float>(c.a), c.m);
    case kCompare:
      return launch(compare_kernel, 1024, 256, stream, at<const uint4>(c.a), at<const uint4>(c.b),
                    at<unsigned long long>(c.c), c.n / 16);
  }
  return cudaErrorInvalidValue;
}

cudaError_t run_all(const Command* commands, uint32_t count) {
  for (uint32_t i = 0; i < count; ++i) {
    if (const cudaError_t error = run(commands[i])) return error;
  }
  return cudaSuccess;
}

template <class Kernel>
cudaError_t load(Kernel* kernel) {
  cudaFuncAttributes attributes;
  return cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
}

// Streams of the commands, that of the first one first.
uint32_t lanes_of(const Command* commands, uint32_t count, Lane* lanes) {
  uint32_t found = 0;
  for (uint32_t i = 0; i < count; ++i) {
    const Lane lane = lane_of(commands[i]);
    bool known = false;
    for (uint32_t k = 0; k < found; ++k) known = known || lanes[k].stream == lane.stream;
    if (!known && found < 32) lanes[found++] = lane;
  }
  return found;
}

cudaError_t record_all(const Command* commands, uint32_t count, const Lane* lanes, uint32_t num_lanes) {
  cudaError_t error = record(32, lanes[0]);
  for (uint32_t k = 1; k < num_lanes && !error; ++k) error = wait(32, lanes[k].stream);
  if (!error) error = run_all(commands, count);
  for (uint32_t k = 1; k < num_lanes && !error; ++k) {
    error = record(32 + k, lanes[k]);
    if (!error) error = wait(32 + k, lanes[0].stream);
  }
  return error;
}

}  // namespace

#define NAIVE_API extern "C" __attribute__((visibility("default")))

// Makes the events and loads the kernels on the first `devices` devices: nothing is loaded later, while another kernel spins. The
// other calls need it.
NAIVE_API int32_t naive_open(int32_t devices) {
  if (devices < 1 || uint32_t(devices) > kMostDevices) return cudaErrorInvalidDevice;
  cudaError_t error = cudaSuccess;
  for (num_devices = 0; num_devices < devices && !error; ++num_devices) {
    error = cudaSetDevice(num_devices);
    for (auto& event : events[num_devices]) {
      if (!error && !event) error = cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
    }
    if (!error) error = load(gather_kernel<uint4>);
    if (!error) error = load(gather_kernel<uint32_t>);
    if (!error) error = load(gather_short_kernel<uint4>);
    if (!error) error = load(gather_short_kernel<uint32_t>);
    if (!error) error = load(reduce_kernel);
    if (!error) error = load(scatter_kernel);
    if (!error) error = load(stream_kernel);
    if (!error) error = load(store_kernel);
    if (!error) error = load(work_kernel);
    if (!error) error = load(compare_kernel);
  }
  return error;
}

// Enqueues the commands.
NAIVE_API int32_t naive_run(const Command* commands, uint32_t count) { return run_all(commands, count); }

// Makes a graph of the commands, to be replayed on the stream of the first; `out` gets it.
NAIVE_API int32_t naive_capture(const Command* commands, uint32_t count, uint64_t* out) {
  Lane lanes[32];
  const uint32_t num_lanes = lanes_of(commands, count, lanes);
  const auto [origin, device] = lanes[0];
  if (const cudaError_t error = select(device)) return error;
  if (const cudaError_t error = cudaStreamBeginCapture(origin, cudaStreamCaptureModeThreadLocal)) return error;
  const cudaError_t error = record_all(commands, count, lanes, num_lanes);
  select(device);
  cudaGraph_t graph = nullptr;
  const cudaError_t ended = cudaStreamEndCapture(origin, &graph);
  if (error || ended) {
    if (graph) cudaGraphDestroy(graph);
    cudaGetLastError();
    return error ? error : ended;
  }
  cudaGraphExec_t exec = nullptr;
  cudaError_t made = cudaGraphInstantiate(&exec, graph, 0);
  cudaGraphDestroy(graph);
  if (!made) made = cudaGraphUpload(exec, origin);
  *out = reinterpret_cast<uint64_t>(exec);
  return made;
}

NAIVE_API int32_t naive_replay(uint64_t graph, uint64_t stream, int32_t device) {
  if (const cudaError_t error = select(device)) return error;
  return cudaGraphLaunch(reinterpret_cast<cudaGraphExec_t>(graph), reinterpret_cast<cudaStream_t>(stream));
}

NAIVE_API int32_t naive_free_graph(uint64_t graph) {
  return cudaGraphExecDestroy(reinterpret_cast<cudaGraphExec_t>(graph));
}

// Writes what an error code means.
NAIVE_API int32_t naive_error(int32_t code, char* out, uint32_t bytes) {
  strncpy(out, cudaGetErrorString(static_cast<cudaError_t>(code)), bytes - 1);
  out[bytes - 1] = 0;
  return 0;
}
