// What the programs of this folder share: the library by dlopen, all ranks of a world in this process, checks.
//
// In: DEEPEP_LIBRARY_CUDA, or the library of the checkout that is the working directory. Out: connected ranks, each with a
// stream of its own; a first mismatch ends the program with status 1 and the values. A machine without a GPU ends it with 77.
// The programs need the header and the CUDA runtime alone: they show how the C ABI is driven.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "../../cuda/abi/deepep.h"

#define FUNCTIONS(X)                                                                                                    \
  X(deepep_abi_version) X(deepep_get_capabilities) X(deepep_host_read) X(deepep_queue_create) X(deepep_queue_drain)     \
  X(deepep_queue_destroy) X(deepep_buffer_create) X(deepep_buffer_export) X(deepep_buffer_import)                       \
  X(deepep_buffer_connect) X(deepep_buffer_destroy) X(deepep_handle_create) X(deepep_handle_destroy) X(deepep_dispatch) \
  X(deepep_combine) X(deepep_slot_release) X(deepep_stream_create) X(deepep_stream_destroy)                             \
  X(deepep_stream_synchronize) X(deepep_get_status) X(deepep_plan) X(deepep_low_latency_dispatch)                       \
  X(deepep_low_latency_dispatch_receive) X(deepep_low_latency_combine) X(deepep_low_latency_combine_receive)
#define DECLARE(name) inline decltype(&name) name##_;
FUNCTIONS(DECLARE)
#undef DECLARE

// A struct of the ABI: zeros, and its size.
template <class T>
T make() {
  T args;
  std::memset(&args, 0, sizeof args);
  args.size = sizeof args;
  return args;
}

inline deepep_error error = make<deepep_error>();

[[noreturn]] inline void fail(const char* what, long long got, long long want) {
  std::fprintf(stderr, "%s is %lld, not %lld\n", what, got, want);
  std::exit(1);
}
inline void expect(const char* what, long long got, long long want) {
  if (got != want) fail(what, got, want);
}
inline void must(const char* what, int32_t code) {
  if (code == DEEPEP_OK) return;
  std::fprintf(stderr, "%s: %s (code %d)\n", what, error.message, code);
  std::exit(1);
}
inline void must(const char* what, cudaError_t code) {
  if (code == cudaSuccess) return;
  std::fprintf(stderr, "%s: %s\n", what, cudaGetErrorString(code));
  std::exit(1);
}

inline void open_library() {
  // Before CUDA starts in this process: kernels that load while others spin are a deadlock, and each stream needs a queue.
  setenv("CUDA_MODULE_LOADING", "EAGER", 0);
  setenv("CUDA_DEVICE_MAX_CONNECTIONS", "32", 0);
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::puts("there is no GPU here");
    std::exit(77);
  }
  const char* path = std::getenv("DEEPEP_LIBRARY_CUDA");
  if (!path || !*path) path = "lib/native/linux-x64/libdeepep_cuda.so";
  void* library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    std::fprintf(stderr, "%s\n", dlerror());
    std::exit(1);
  }
#define FIND(name)                                                                          \
  if (!(name##_ = reinterpret_cast<decltype(&name)>(dlsym(library, #name)))) {              \
    std::fprintf(stderr, "%s has no %s\n", path, #name);                                    \
    std::exit(1);                                                                           \
  }
  FUNCTIONS(FIND)
#undef FIND
  expect("the ABI version", deepep_abi_version_(), DEEPEP_ABI_VERSION);
}

// A rank: its buffer, its queue, and a stream, since ranks of one process need a stream each.
struct Rank {
  uint64_t queue = 0, buffer = 0, stream = 0;
  uint64_t next_id = 1;
};

// Makes and connects the ranks of a world on device 0. `options` has everything but rank and queue.
inline std::vector<Rank> connect(uint32_t num_ranks, deepep_buffer_create_args options) {
  std::vector<Rank> ranks(num_ranks);
  std::vector<deepep_peer_handle> handles(num_ranks);
  for (uint32_t r = 0; r < num_ranks; r++) {
    auto queue = make<deepep_queue_create_args>();
    must("queue_create", deepep_queue_create_(0, &queue, &error));
    ranks[r].queue = queue.queue;
    options.rank = r;
    options.num_ranks = num_ranks;
    options.queue = queue.queue;
    must("buffer_create", deepep_buffer_create_(0, &options, &error));
    ranks[r].buffer = options.buffer;
    auto stream = make<deepep_stream_create_args>();
    must("stream_create", deepep_stream_create_(ranks[r].buffer, &stream, &error));
    ranks[r].stream = stream.stream;
    handles[r] = make<deepep_peer_handle>();
    must("buffer_export", deepep_buffer_export_(ranks[r].buffer, &handles[r], &error));
  }
  for (Rank& rank : ranks) {
    for (deepep_peer_handle& handle : handles) must("buffer_import", deepep_buffer_import_(rank.buffer, &handle, &error));
    must("buffer_connect", deepep_buffer_connect_(rank.buffer, &error));
  }
  return ranks;
}

inline void destroy(std::vector<Rank>& ranks) {
  for (Rank& rank : ranks) {
    must("stream_destroy", deepep_stream_destroy_(rank.stream, &error));
    must("buffer_destroy", deepep_buffer_destroy_(rank.buffer, &error));
    must("queue_destroy", deepep_queue_destroy_(rank.queue, &error));
  }
}

// Waits for the stream of a rank, then sees that every operation up to its latest id has ended well. Ids complete in order.
inline void finish(Rank& rank) {
  auto sync = make<deepep_stream_sync_args>();
  sync.timeout_ms = 60000;
  must("stream_synchronize", deepep_stream_synchronize_(rank.stream, &sync, &error));
  static_assert(sizeof(deepep_completion) == 16, "an entry");
  for (int tries = 0; tries < 60000; tries++) {
    deepep_completion done[16];
    const int32_t n = deepep_queue_drain_(rank.queue, done, 16);
    for (int32_t i = 0; i < n; i++) {
      if (done[i].status != DEEPEP_OK) {
        auto ask = make<deepep_status_args>();
        ask.id = done[i].id;
        must("an operation", deepep_get_status_(rank.buffer, &ask, &error));
        fail("the status of an operation", done[i].status, DEEPEP_OK);
      }
      if (done[i].id == rank.next_id - 1) return;
    }
    usleep(1000);
  }
  fail("the latest completion", 0, static_cast<long long>(rank.next_id - 1));
}

// A dispatch in rank layout of bf16 rows, not enqueued yet.
struct Tokens {
  int count, hidden, topk;
};
inline deepep_dispatch_args dispatch_of(Rank& rank, Tokens tokens, uint64_t handle, uint64_t x, uint64_t topk_idx) {
  auto d = make<deepep_dispatch_args>();
  d.layout = DEEPEP_LAYOUT_RANK;
  d.handle = handle;
  d.slot = -1;
  d.expert_alignment = 1;
  d.num_tokens = tokens.count;
  d.num_topk = tokens.topk;
  d.topk_idx_bytes = 4;
  d.topk_idx = topk_idx;
  d.x = x;
  d.x_stride = d.row_bytes = 2 * static_cast<uint32_t>(tokens.hidden);
  d.stream = rank.stream;
  d.done_id = rank.next_id++;
  return d;
}
// A buffer of normal mode for so many tokens, with one slot.
inline deepep_buffer_create_args options_for(Tokens tokens, uint32_t experts) {
  auto options = make<deepep_buffer_create_args>();
  options.hidden = tokens.hidden;
  options.num_experts = experts;
  options.num_topk = tokens.topk;
  options.max_tokens_per_rank = tokens.count;
  options.num_slots = 1;
  options.timeout_ms = 20000;
  return options;
}
inline uint64_t make_handle(Rank& rank, Tokens tokens) {
  auto handle = make<deepep_handle_create_args>();
  handle.num_tokens = tokens.count;
  handle.num_topk = tokens.topk;
  must("handle_create", deepep_handle_create_(rank.buffer, &handle, &error));
  return handle.handle;
}
// Once the stream of the rank is there.
inline void release_slot(Rank& rank, int32_t slot) {
  auto release = make<deepep_slot_release_args>();
  release.slot = slot;
  release.stream = rank.stream;
  must("slot_release", deepep_slot_release_(rank.buffer, &release, &error));
}

inline cudaStream_t cuda_stream(const Rank& rank) { return reinterpret_cast<cudaStream_t>(rank.stream); }

// Memory of the program's own: the library takes any address of the device.
template <class T>
struct DeviceArray {
  T* data = nullptr;
  size_t count = 0;
  explicit DeviceArray(size_t n) : count(n) {
    must("cudaMalloc", cudaMalloc(&data, (n ? n : 1) * sizeof(T)));
    must("cudaMemset", cudaMemset(data, 0xff, (n ? n : 1) * sizeof(T)));
  }
  DeviceArray(const DeviceArray&) = delete;
  DeviceArray(DeviceArray&& other) noexcept : data(other.data), count(other.count) { other.data = nullptr; }
  ~DeviceArray() { cudaFree(data); }
  void write(const std::vector<T>& from) {
    if (from.empty()) return;
    must("cudaMemcpy", cudaMemcpy(data, from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  uint64_t address() const { return reinterpret_cast<uint64_t>(data); }
};

// Elements at an address of the device, after `finish`.
template <class T>
std::vector<T> read(uint64_t address, size_t count) {
  std::vector<T> out(count);
  if (count == 0) return out;
  must("cudaMemcpy", cudaMemcpy(out.data(), reinterpret_cast<const void*>(address), count * sizeof(T), cudaMemcpyDeviceToHost));
  return out;
}

// bf16 of a number that it holds exactly.
inline uint16_t to_bf16(float value) {
  uint32_t word;
  std::memcpy(&word, &value, sizeof word);
  return static_cast<uint16_t>(word >> 16);
}

// The value of `--name N` on the command line.
inline uint32_t option(int argc, char** argv, const char* name, uint32_t usual) {
  for (int i = 1; i + 1 < argc; i++) {
    if (std::strcmp(argv[i], name) == 0) return static_cast<uint32_t>(std::strtoul(argv[i + 1], nullptr, 10));
  }
  return usual;
}
