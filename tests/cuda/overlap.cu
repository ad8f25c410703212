// Whether computation goes on during a dispatch: two ranks in one process dispatch 4096 tokens of 7168 channels with a few
// multiprocessors each, while a third stream runs compute kernels that note the device's clock at their begin and end. Those
// that lie wholly between the stamps around both dispatches ran beside them.
//
//   overlap [--sms 8] [--rounds 5]     exits 0 and prints the shares; 1 when nothing overlapped; 77 without a GPU
#include <algorithm>

#include "support.hpp"

namespace {

constexpr int kRanks = 2, kHidden = 7168, kTokens = 4096, kExperts = 16, kTopk = 4, kComputes = 60;
constexpr Tokens kShape = {kTokens, kHidden, kTopk};

__device__ unsigned long long now() {
  unsigned long long ns;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(ns));
  return ns;
}

// A point of a stream on the device's clock.
__global__ void stamp(unsigned long long* at) { *at = now(); }

// Arithmetic of a few tens of microseconds on as many blocks as it is given; the earliest begin and the latest end.
__global__ void compute(unsigned long long* begin, unsigned long long* end, float* sink, int steps) {
  if (threadIdx.x == 0) atomicMin(begin, now());
  float a = static_cast<float>(threadIdx.x), b = 1.0001f;
  for (int i = 0; i < steps; i++) a = a * b + 0.5f;
  sink[blockIdx.x * blockDim.x + threadIdx.x] = a;
  __syncthreads();
  if (threadIdx.x == 0) atomicMax(end, now());
}

struct Clock {
  unsigned long long before[kRanks], after[kRanks], begin[kComputes], end[kComputes];
};

struct Work {
  cudaStream_t stream;
  float* sink;
  Clock* clock;
  int blocks;
  void run(int count) const {
    for (int i = 0; i < count; i++) {
      compute<<<blocks, 256, 0, stream>>>(&clock->begin[i], &clock->end[i], sink, 20000);
    }
    must("compute", cudaGetLastError());
  }
  Clock read() const {
    Clock host;
    must("cudaMemcpy", cudaMemcpy(&host, clock, sizeof host, cudaMemcpyDeviceToHost));
    return host;
  }
  void reset() const {
    Clock host;
    std::memset(&host, 0, sizeof host);
    std::fill(host.begin, host.begin + kComputes, ~0ull);
    must("cudaMemcpy", cudaMemcpy(clock, &host, sizeof host, cudaMemcpyHostToDevice));
  }
};

double mean_us(const Clock& clock, const std::vector<int>& which) {
  double sum = 0;
  for (int i : which) sum += static_cast<double>(clock.end[i] - clock.begin[i]) / 1000;
  return which.empty() ? 0 : sum / static_cast<double>(which.size());
}

deepep_dispatch_args dispatch(Rank& rank, uint64_t handle, uint64_t x, uint64_t topk_idx, int32_t sms) {
  auto d = dispatch_of(rank, kShape, handle, x, topk_idx);
  d.num_sms = sms;
  must("dispatch", deepep_dispatch_(rank.buffer, &d, &error));
  return d;
}

}  // namespace

int main(int argc, char** argv) {
  open_library();
  const int32_t sms = static_cast<int32_t>(option(argc, argv, "--sms", 8));
  const uint32_t rounds = option(argc, argv, "--rounds", 5);
  auto ranks = connect(kRanks, options_for(kShape, kExperts));

  cudaDeviceProp device;
  must("cudaGetDeviceProperties", cudaGetDeviceProperties(&device, 0));
  DeviceArray<Clock> clock(1);
  const int blocks = device.multiProcessorCount - kRanks * sms;
  DeviceArray<float> sink(static_cast<size_t>(blocks) * 256);
  Work work{nullptr, sink.data, clock.data, blocks};
  must("cudaStreamCreate", cudaStreamCreateWithFlags(&work.stream, cudaStreamNonBlocking));

  std::vector<DeviceArray<uint16_t>> x;
  std::vector<DeviceArray<int32_t>> topk_idx;
  std::vector<uint64_t> handles;
  for (int r = 0; r < kRanks; r++) {
    x.emplace_back(static_cast<size_t>(kTokens) * kHidden);
    topk_idx.emplace_back(static_cast<size_t>(kTokens) * kTopk);
    std::vector<int32_t> routes;
    for (int i = 0; i < kTokens * kTopk; i++) routes.push_back((i * 7 + r + i / kTopk) % kExperts);
    topk_idx[r].write(routes);
    handles.push_back(make_handle(ranks[r], kShape));
  }
  // Loaded before anything spins: a kernel that is loaded beside a spinning one may wait for it.
  work.reset();
  work.run(kComputes);
  for (Rank& rank : ranks) stamp<<<1, 1, 0, cuda_stream(rank)>>>(&clock.data->before[0]);
  must("cudaDeviceSynchronize", cudaDeviceSynchronize());
  std::vector<int> all;
  for (int i = 0; i < kComputes; i++) all.push_back(i);
  const double alone_us = mean_us(work.read(), all);

  int least = kComputes;
  for (uint32_t round = 0; round < rounds; round++) {
    work.reset();
    std::vector<deepep_dispatch_args> sent;
    for (int r = 0; r < kRanks; r++) {
      stamp<<<1, 1, 0, cuda_stream(ranks[r])>>>(&clock.data->before[r]);
      sent.push_back(dispatch(ranks[r], handles[r], x[r].address(), topk_idx[r].address(), sms));
      stamp<<<1, 1, 0, cuda_stream(ranks[r])>>>(&clock.data->after[r]);  // the stream waits for its dispatch
    }
    work.run(kComputes);
    for (Rank& rank : ranks) finish(rank);
    must("cudaStreamSynchronize", cudaStreamSynchronize(work.stream));
    for (int r = 0; r < kRanks; r++) release_slot(ranks[r], sent[r].slot);
    const Clock host = work.read();
    // From when both dispatches could begin to when the first of them had ended.
    const auto begin = std::max(host.before[0], host.before[1]), end = std::min(host.after[0], host.after[1]);
    std::vector<int> inside;
    for (int i : all) {
      if (host.begin[i] > begin && host.end[i] < end) inside.push_back(i);
    }
    std::printf("round %u: dispatch %.0f us with %d SMs a rank; %zu of %d compute kernels on %d blocks ran inside it, %.1f us each "
                "(alone %.1f us)\n",
                round, static_cast<double>(end - begin) / 1000, sms, inside.size(), kComputes, blocks, mean_us(host, inside), alone_us);
    if (round > 0) least = std::min(least, static_cast<int>(inside.size()));  // the first round warms up
  }
  for (uint64_t handle : handles) must("handle_destroy", deepep_handle_destroy_(handle, &error));
  destroy(ranks);
  must("cudaStreamDestroy", cudaStreamDestroy(work.stream));
  if (rounds > 1 && least == 0) {
    std::puts("no compute kernel ran during a dispatch");
    return 1;
  }
  std::puts("ok");
  return 0;
}
