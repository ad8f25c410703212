// Calls behind kernels that let the next one go before they have written what it reads (programmatic dependent launch): a
// dispatch of rows and a routing that are written late, and a combine of expert outputs that are. Two ranks in one process,
// each with a stream; every token goes to both.
//
//   early [--rounds 20]     exits 0; 1 with the first value that is wrong; 77 without a GPU
#include "support.hpp"

namespace {

constexpr int kRanks = 2, kHidden = 1024, kTokens = 64, kExperts = 4, kTopk = 2, kRows = kRanks * kTokens;
constexpr Tokens kShape = {kTokens, kHidden, kTopk};
constexpr unsigned kLateNs = 100'000;

__device__ void let_the_next_go() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ void wait_for_the_last() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ void be_late() {
  for (unsigned ns = 0; ns < kLateNs; ns += 1000) __nanosleep(1000);
}

// Whole numbers that bf16 holds.
__host__ __device__ int value(int round, int rank, int token, int channel) {
  return (5 * round + 3 * rank + token + channel) % 64;
}
__device__ uint16_t bf16_of(int whole) { return static_cast<uint16_t>(__float_as_uint(static_cast<float>(whole)) >> 16); }

// A block a token: its row, and the experts that it goes to, 0 or 1 and 2 or 3.
__global__ void write_tokens(uint16_t* x, int32_t* topk_idx, int round, int rank) {
  let_the_next_go();
  wait_for_the_last();
  be_late();
  const int token = static_cast<int>(blockIdx.x);
  for (int c = static_cast<int>(threadIdx.x); c < kHidden; c += static_cast<int>(blockDim.x)) {
    x[token * kHidden + c] = bf16_of(value(round, rank, token, c));
  }
  if (threadIdx.x < kTopk) topk_idx[token * kTopk + threadIdx.x] = static_cast<int32_t>(2 * threadIdx.x) + (token + round) % 2;
}

// A block a row: the identity.
__global__ void run_experts(uint16_t* y, const uint16_t* recv_x) {
  let_the_next_go();
  wait_for_the_last();
  be_late();
  const size_t row = size_t{blockIdx.x} * kHidden;
  for (int c = static_cast<int>(threadIdx.x); c < kHidden; c += static_cast<int>(blockDim.x)) y[row + c] = recv_x[row + c];
}

// Enqueues a kernel that may begin early itself.
template <class... P, class... A>
void launch(void (*kernel)(P...), int blocks, cudaStream_t stream, A... args) {
  cudaLaunchAttribute early = {};
  early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  early.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(256);
  config.stream = stream;
  config.attrs = &early;
  config.numAttrs = 1;
  must("a kernel", cudaLaunchKernelEx(&config, kernel, static_cast<P>(args)...));
}

struct Tensors {
  DeviceArray<uint16_t> x{size_t{kTokens} * kHidden}, y{size_t{kRows} * kHidden}, out{size_t{kTokens} * kHidden};
  DeviceArray<int32_t> topk_idx{size_t{kTokens} * kTopk};
};

// Dispatch, experts, combine of one rank, each call behind a kernel that is late.
deepep_dispatch_args enqueue(Rank& rank, Tensors& tensors, uint64_t handle, int round, int number) {
  const cudaStream_t stream = cuda_stream(rank);
  launch(write_tokens, kTokens, stream, tensors.x.data, tensors.topk_idx.data, round, number);
  auto d = dispatch_of(rank, kShape, handle, tensors.x.address(), tensors.topk_idx.address());
  d.flags = DEEPEP_FLAG_NO_CPU_SYNC;
  d.num_sms = 8;
  must("dispatch", deepep_dispatch_(rank.buffer, &d, &error));
  launch(run_experts, kRows, stream, tensors.y.data, reinterpret_cast<const uint16_t*>(d.recv_x));
  auto c = make<deepep_combine_args>();
  c.handle = handle;
  c.slot = d.slot;
  c.hidden = kHidden;
  c.x = tensors.y.address();
  c.x_stride = 2 * kHidden;
  c.out = tensors.out.address();
  c.stream = rank.stream;
  c.num_sms = 8;
  c.done_id = rank.next_id++;
  must("combine", deepep_combine_(rank.buffer, &c, &error));
  return d;
}

void check(const Tensors& tensors, const deepep_dispatch_args& d, int round, int number) {
  const auto received = read<uint16_t>(d.recv_x, size_t{kRows} * kHidden);
  const auto out = read<uint16_t>(tensors.out.address(), size_t{kTokens} * kHidden);
  for (int i = 0; i < kRows * kHidden; i++) {
    const int row = i / kHidden, source = row / kTokens, first = source * kTokens * kHidden;
    const auto want = static_cast<float>(value(round, source, row % kTokens, i % kHidden));
    expect("an element that was received", received[i], to_bf16(want));
    if (source == number) expect("an element of a sum", out[i - first], to_bf16(kRanks * want));
  }
}

}  // namespace

int main(int argc, char** argv) {
  open_library();
  const int rounds = static_cast<int>(option(argc, argv, "--rounds", 20));
  auto ranks = connect(kRanks, options_for(kShape, kExperts));
  std::vector<Tensors> tensors(kRanks);
  std::vector<uint64_t> handles;
  for (Rank& rank : ranks) handles.push_back(make_handle(rank, kShape));
  for (int round = 0; round < rounds; round++) {
    std::vector<deepep_dispatch_args> sent;
    for (int r = 0; r < kRanks; r++) sent.push_back(enqueue(ranks[r], tensors[r], handles[r], round, r));
    for (Rank& rank : ranks) finish(rank);
    for (int r = 0; r < kRanks; r++) {
      check(tensors[r], sent[r], round, r);
      release_slot(ranks[r], sent[r].slot);
    }
  }
  for (uint64_t handle : handles) must("handle_destroy", deepep_handle_destroy_(handle, &error));
  destroy(ranks);
  std::puts("ok");
  return 0;
}
