// What the CUDA backend can do on a device: capabilities, access between devices, the ceiling of copies, launch plans.
//
// In: calls of the API layer, with args whose values it has checked. Out: facts. Only deepep_measure_copy does anything there.

#include <cstdio>

#include "../api/operations.hpp"
#include "../kernels/launch.hpp"
#include "buffer.hpp"
#include "device.hpp"
#include "peers.hpp"

namespace deepep {
namespace {

// Memory and events of a measurement.
struct Bench {
  void* src = nullptr;
  void* dst = nullptr;
  cudaStream_t stream = nullptr;
  cudaEvent_t begin = nullptr, end = nullptr;

  ~Bench() {
    if (begin) cudaEventDestroy(begin);
    if (end) cudaEventDestroy(end);
    if (stream) cudaStreamDestroy(stream);
    if (src) cudaFree(src);
    if (dst) cudaFree(dst);
    cudaGetLastError();
  }

  // Mean time of `repeats` calls of `copy` in a row, after one that warms up, nanoseconds.
  template <class Copy>
  int64_t time(uint32_t repeats, Copy copy) {
    DEEPEP_CUDA("copy", copy());
    DEEPEP_CUDA("measure", cudaEventRecord(begin, stream));
    for (uint32_t i = 0; i < repeats; ++i) DEEPEP_CUDA("copy", copy());
    DEEPEP_CUDA("measure", cudaEventRecord(end, stream));
    // Pairs with the copies only.
    DEEPEP_CUDA("measure", cudaEventSynchronize(end));
    float ms = 0;
    DEEPEP_CUDA("measure", cudaEventElapsedTime(&ms, begin, end));
    return static_cast<int64_t>(double{ms} * 1e6 / repeats);
  }
};

}  // namespace

int32_t backend() { return DEEPEP_BACKEND_CUDA; }

// Sizes can be asked for without a GPU; whoever needs one finds it, or says which there are.
void check_device(uint64_t device) {
  if (device <= INT32_MAX) return;
  reject(DEEPEP_ERROR_INVALID_ARGUMENT, "device is %lld, at least 0", static_cast<long long>(device));
}

void fill_capabilities(uint64_t index, deepep_capabilities& out) {
  const Device& device = find_device(index);
  out.abi_version = DEEPEP_ABI_VERSION;
  out.backend = backend();
  out.num_devices = num_devices();
  out.features = DEEPEP_FEATURE_NORMAL | DEEPEP_FEATURE_LOW_LATENCY | DEEPEP_FEATURE_PROCESSES | DEEPEP_FEATURE_GRAPHS |
                 DEEPEP_FEATURE_INJECT;
  out.max_ranks = DEEPEP_MAX_RANKS;
  out.max_topk = DEEPEP_MAX_TOPK;
  out.max_slots = DEEPEP_MAX_SLOTS;
  out.num_sms = device.num_sms;
  out.compute_capability = device.compute_capability;
  out.driver_version = driver_version();
  out.mps = device.mps ? 1 : 0;
  use_device(device.index);
  const Relaxed relaxed;
  size_t free_bytes = 0, total_bytes = 0;
  DEEPEP_CUDA("ask for the memory", cudaMemGetInfo(&free_bytes, &total_bytes));
  out.total_bytes = total_bytes;
  out.free_bytes = free_bytes;
  std::snprintf(out.name, sizeof out.name, "%s", device.name.c_str());
}

void get_peer_access(uint64_t index, deepep_peer_access_args& args) {
  const Device& device = find_device(index);
  const Device& peer = find_device(static_cast<uint64_t>(static_cast<int64_t>(args.peer)));
  args.access = can_access(device.index, peer.index, &args.performance_rank) ? 1 : 0;
}

void measure_copy(uint64_t index, deepep_measure_copy_args& args) {
  const Device& device = prepare_device(index);
  if (args.num_sms < 0 || args.num_sms > device.num_sms) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "num_sms is %d, %s has %d multiprocessors", args.num_sms, device_name(device).c_str(),
           device.num_sms);
  }
  const int32_t sms = args.num_sms > 0 ? args.num_sms : device.num_sms;
  const Relaxed relaxed;
  Bench bench;
  for (void** const memory : {&bench.src, &bench.dst}) {
    if (cudaMalloc(memory, args.bytes) == cudaSuccess) continue;
    cudaGetLastError();
    reject(DEEPEP_ERROR_OUT_OF_MEMORY, "twice %llu bytes are not to be had on %s", static_cast<unsigned long long>(args.bytes),
           device_name(device).c_str());
  }
  DEEPEP_CUDA("make a stream", cudaStreamCreateWithFlags(&bench.stream, cudaStreamNonBlocking));
  DEEPEP_CUDA("make an event", cudaEventCreate(&bench.begin));
  DEEPEP_CUDA("make an event", cudaEventCreate(&bench.end));
  DEEPEP_CUDA("fill memory", cudaMemsetAsync(bench.src, 1, args.bytes, bench.stream));
  args.kernel_ns = bench.time(args.repeats, [&] { return launch_copy(bench.dst, bench.src, args.bytes, sms, bench.stream); });
  args.memcpy_ns = bench.time(
      args.repeats, [&] { return cudaMemcpyAsync(bench.dst, bench.src, args.bytes, cudaMemcpyDeviceToDevice, bench.stream); });
}

void plan_operation(Buffer* buffer, deepep_plan_args& args) {
  Topology topology = buffer ? buffer->topology : Topology{};
  if (args.device_sms != 0) topology.device_sms = args.device_sms;
  if (args.ranks_on_device != 0) topology.ranks_on_device = args.ranks_on_device;
  if (args.compute_capability != 0) topology.compute_capability = args.compute_capability;
  if (args.shared_bytes != 0) topology.shared_bytes = args.shared_bytes;
  const char* const missing = topology.device_sms <= 0           ? "device_sms"
                              : topology.compute_capability <= 0 ? "compute_capability"
                              : topology.shared_bytes == 0       ? "shared_bytes"
                                                                 : nullptr;
  if (missing)
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "%s is not given, and there is no connected buffer to take it from", missing);
  if (args.row_bytes == 0 || args.row_bytes % 16 != 0 || args.row_bytes > DEEPEP_MAX_ROW_BYTES) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "row_bytes is %u, it must be a multiple of 16 up to %u", args.row_bytes,
           DEEPEP_MAX_ROW_BYTES);
  }
  if (args.hops == 0 || args.hops > DEEPEP_MAX_RANKS) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "hops is %u, it must be 1 … %u", args.hops, DEEPEP_MAX_RANKS);
  }
  if (args.num_sms < 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "num_sms is %d, at least 0", args.num_sms);
  if (args.num_tokens > DEEPEP_MAX_TOKENS) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "num_tokens is %u, at most %u", args.num_tokens, DEEPEP_MAX_TOKENS);
  }
  if (args.num_experts > DEEPEP_MAX_EXPERTS) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "num_experts is %u, at most %u", args.num_experts, DEEPEP_MAX_EXPERTS);
  }
  if (args.fp8 > 1) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "fp8 is %u, at most 1", args.fp8);
  const uint32_t num_experts = args.num_experts != 0 || !buffer ? args.num_experts : buffer->options.num_experts;
  if (args.op == DEEPEP_OP_LOW_LATENCY_DISPATCH && num_experts == 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "num_experts is not given, and there is no buffer to take it from");
  }
  const Plan plan = make_plan({.op = args.op,
                               .row_bytes = args.row_bytes,
                               .hops = args.hops,
                               .num_sms = args.num_sms > 0 ? args.num_sms : buffer ? buffer->wanted_sms : 0,
                               .num_tokens = args.num_tokens,
                               .num_experts = num_experts,
                               .fp8 = args.fp8 != 0},
                              topology);
  args.sms = plan.sms;
  args.warps = plan.warps;
  args.stages = plan.stages;
  args.chunk_bytes = plan.chunk_bytes;
  args.block_bytes = plan.block_bytes;
  args.tma = plan.tma;
}

}  // namespace deepep
