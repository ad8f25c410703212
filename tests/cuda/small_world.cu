// A small world through the C ABI: a few ranks in one process dispatch drawn routings and combine them again, in both
// layouts, by TMA and by loads and stores; every row and sum is compared. Small enough for compute-sanitizer, and an example
// of how the library is driven from C or C++.
//
//   small_world [--ranks 3] [--rounds 10]     exits 0 and prints "ok", 1 and what differs, or 77 without a GPU
//
// World: 7 experts over the ranks (they need not divide), top-3 with entries that are -1 or listed twice, 20 tokens of 264
// channels at most. Token t of rank r holds the small integer 1 + (r + 3t) % 100 in every channel, plus its channel's
// parity, so sums are exact.
#include <algorithm>
#include <random>
#include <set>

#include "support.hpp"

namespace {

constexpr int kHidden = 264, kTopk = 3, kExperts = 7, kTokens = 20, kAlignment = 4;
constexpr int kMaxRows = 512;

// Experts of a rank: the first kExperts % n ranks own one more.
int first_expert(int rank, int n) { return rank * (kExperts / n) + std::min(rank, kExperts % n); }
int owner(int expert, int n) {
  int rank = 0;
  while (rank + 1 < n && first_expert(rank + 1, n) <= expert) rank++;
  return rank;
}

float value(int rank, int token, int channel) { return static_cast<float>(1 + (rank + 3 * token) % 100 + channel % 2); }

struct Tensors {
  DeviceArray<uint16_t> x{kTokens * kHidden}, out{kTokens * kHidden};
  DeviceArray<int32_t> topk_idx{kTokens * kTopk};
  DeviceArray<float> topk_weights{kTokens * kTopk};
};

struct Routing {
  int num_tokens;
  std::vector<int32_t> experts;  // [num_tokens, kTopk]
  std::vector<float> weights;
};

Routing draw(std::mt19937& random) {
  Routing routing{static_cast<int>(random() % (kTokens + 1)), {}, {}};
  for (int i = 0; i < routing.num_tokens * kTopk; i++) {
    routing.experts.push_back(random() % 8 == 0 ? -1 : static_cast<int32_t>(random() % kExperts));
    routing.weights.push_back(random() % 2 ? 1.0f : 0.5f);
  }
  return routing;
}

// A row that a rank must receive.
struct Row {
  int source, token, k;  // k: the entry, in the expert layout
};

// Rows in their places; padding is {-1, …}.
std::vector<Row> expected_rows(const std::vector<Routing>& world, int rank, bool expert_layout) {
  const int n = static_cast<int>(world.size());
  std::vector<Row> rows;
  const int begin = first_expert(rank, n), end = rank + 1 < n ? first_expert(rank + 1, n) : kExperts;
  for (int e = begin; e < (expert_layout ? end : begin + 1); e++) {
    for (int s = 0; s < n; s++) {
      for (int t = 0; t < world[s].num_tokens; t++) {
        const int32_t* entries = &world[s].experts[t * kTopk];
        if (expert_layout) {
          for (int k = 0; k < kTopk; k++) {
            if (entries[k] == e) rows.push_back({s, t, k});
          }
        } else if (std::any_of(entries, entries + kTopk, [&](int32_t x) { return x >= begin && x < end; })) {
          rows.push_back({s, t, 0});
        }
      }
    }
    while (expert_layout && rows.size() % kAlignment) rows.push_back({-1, 0, 0});
  }
  return rows;
}

void check_dispatch(const deepep_dispatch_args& d, const std::vector<Routing>& world, int rank, bool expert_layout) {
  const auto rows = expected_rows(world, rank, expert_layout);
  const auto counts = read<int32_t>(d.recv_num_rows, 2);
  const size_t in_use = rows.size();
  expect("rows received", counts[expert_layout ? 1 : 0], static_cast<long long>(in_use));
  const auto src = read<int32_t>(d.recv_src_idx, in_use);
  const auto x = read<uint16_t>(d.recv_x, in_use * kHidden);
  const auto weights = read<float>(d.recv_topk_weights, expert_layout ? in_use : in_use * kTopk);
  for (size_t i = 0; i < in_use; i++) {
    const auto [s, t, k] = rows[i];
    expect("a source index", src[i], s < 0 ? -1 : s * kTokens + t);
    for (int c = 0; c < kHidden; c++) {
      // Padding was asked to be zero.
      const uint16_t want = s < 0 ? 0 : to_bf16(value(s, t, c));
      if (x[i * kHidden + c] != want) fail("an element of a received row", x[i * kHidden + c], want);
    }
    if (expert_layout && s >= 0 && weights[i] != world[s].weights[t * kTopk + k]) {
      fail("a weight, in halves", static_cast<long long>(2 * weights[i]), static_cast<long long>(2 * world[s].weights[t * kTopk + k]));
    }
  }
}

// With identity experts a token comes back once per rank (rank layout), or weighted once per entry (expert layout).
void check_combine(uint64_t out, const Routing& routing, int rank, int n, bool expert_layout) {
  const auto sums = read<uint16_t>(out, static_cast<size_t>(routing.num_tokens) * kHidden);
  for (int t = 0; t < routing.num_tokens; t++) {
    std::set<int> ranks;
    float times = 0;
    for (int k = 0; k < kTopk; k++) {
      const int32_t e = routing.experts[t * kTopk + k];
      if (e < 0) continue;
      if (expert_layout) times += routing.weights[t * kTopk + k];
      else if (ranks.insert(owner(e, n)).second) times += 1;
    }
    for (int c = 0; c < kHidden; c++) {
      const float sum = times * value(rank, t, c);  // at most 3 * 102: more than bf16 holds exactly, so compare rounded
      uint32_t bits;
      std::memcpy(&bits, &sum, sizeof bits);
      const uint16_t want = static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
      if (sums[t * kHidden + c] != want) fail("an element of a combined token", sums[t * kHidden + c], want);
    }
  }
}

// One dispatch and combine on every rank.
void run_round(std::vector<Rank>& ranks, std::vector<Tensors>& tensors, std::mt19937& random, bool expert_layout) {
  const int n = static_cast<int>(ranks.size());
  std::vector<Routing> world;
  std::vector<deepep_dispatch_args> sent;
  std::vector<uint64_t> handles;
  for (int r = 0; r < n; r++) {
    world.push_back(draw(random));
    const Routing& routing = world.back();
    std::vector<uint16_t> rows;
    for (int i = 0; i < routing.num_tokens * kHidden; i++) rows.push_back(to_bf16(value(r, i / kHidden, i % kHidden)));
    tensors[r].x.write(rows);
    tensors[r].topk_idx.write(routing.experts);
    tensors[r].topk_weights.write(routing.weights);
    auto handle = make<deepep_handle_create_args>();
    handle.num_tokens = static_cast<uint32_t>(routing.num_tokens);
    handle.num_topk = kTopk;
    must("handle_create", deepep_handle_create_(ranks[r].buffer, &handle, &error));
    handles.push_back(handle.handle);
  }
  // Everything is enqueued on all ranks before anything is waited for: a rank's kernel waits for the others'.
  for (int r = 0; r < n; r++) {
    auto d = make<deepep_dispatch_args>();
    d.layout = expert_layout ? DEEPEP_LAYOUT_EXPERT : DEEPEP_LAYOUT_RANK;
    d.handle = handles[r];
    d.slot = -1;
    d.expert_alignment = expert_layout ? kAlignment : 1;
    d.num_tokens = world[r].num_tokens;
    d.num_topk = kTopk;
    d.topk_idx_bytes = 4;
    d.topk_idx = tensors[r].topk_idx.address();
    d.topk_weights = tensors[r].topk_weights.address();
    d.x = tensors[r].x.address();
    d.x_stride = d.row_bytes = 2 * kHidden;
    d.flags = expert_layout ? DEEPEP_FLAG_ZERO_PADDING : 0;
    d.stream = ranks[r].stream;
    d.counts_id = ranks[r].next_id++;
    d.done_id = ranks[r].next_id++;
    must("dispatch", deepep_dispatch_(ranks[r].buffer, &d, &error));
    sent.push_back(d);
  }
  for (Rank& rank : ranks) finish(rank);
  for (int r = 0; r < n; r++) check_dispatch(sent[r], world, r, expert_layout);
  for (int r = 0; r < n; r++) {
    auto c = make<deepep_combine_args>();
    c.hidden = kHidden;
    c.handle = handles[r];
    c.slot = sent[r].slot;
    c.x = sent[r].recv_x;  // the experts are the identity
    c.x_stride = 2 * kHidden;
    c.weights = expert_layout ? tensors[r].topk_weights.address() : 0;
    c.out = tensors[r].out.address();
    c.stream = ranks[r].stream;
    c.done_id = ranks[r].next_id++;
    must("combine", deepep_combine_(ranks[r].buffer, &c, &error));
  }
  for (Rank& rank : ranks) finish(rank);
  for (int r = 0; r < n; r++) {
    check_combine(tensors[r].out.address(), world[r], r, n, expert_layout);
    auto release = make<deepep_slot_release_args>();
    release.slot = sent[r].slot;
    release.stream = ranks[r].stream;
    must("slot_release", deepep_slot_release_(ranks[r].buffer, &release, &error));
    must("handle_destroy", deepep_handle_destroy_(handles[r], &error));
  }
}

}  // namespace

int main(int argc, char** argv) {
  open_library();
  const uint32_t num_ranks = option(argc, argv, "--ranks", 3), rounds = option(argc, argv, "--rounds", 10);
  for (const char* tma : {"1", "0"}) {
    setenv("DEEPEP_CUDA_TMA", tma, 1);  // read when a buffer is created
    auto options = make<deepep_buffer_create_args>();
    options.hidden = kHidden;
    options.num_experts = kExperts;
    options.num_topk = kTopk;
    options.max_tokens_per_rank = kTokens;
    options.max_recv_tokens = kMaxRows;
    options.timeout_ms = 60000;
    options.num_sms = 2;  // few blocks: the tools that watch a kernel slow each of them down
    auto ranks = connect(num_ranks, options);
    std::vector<Tensors> tensors(num_ranks);
    std::mt19937 random(1);
    for (uint32_t round = 0; round < rounds; round++) run_round(ranks, tensors, random, round % 2 == 1);
    destroy(ranks);
    std::printf("%u ranks, %u rounds %s\n", num_ranks, rounds, tma[0] == '1' ? "by TMA" : "by loads and stores");
  }
  std::puts("ok");
  return 0;
}
