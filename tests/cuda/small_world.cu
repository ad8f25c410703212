// A small world through the C ABI: a few ranks in one process dispatch drawn routings and combine them again, in both layouts
// and in low-latency mode, by TMA and by loads and stores; every row and sum is compared. Small enough for compute-sanitizer,
// and an example of how the library is driven from C or C++.
//
//   small_world [--ranks 3] [--rounds 10] [--low-latency 0]     exits 0 and prints "ok", 1 and what differs, or 77 without a GPU
//
// The world is in small_world.hpp, the rounds of low-latency mode in small_low_latency.hpp.
#include <algorithm>
#include <random>
#include <set>

#include "small_low_latency.hpp"
#include "small_world.hpp"

namespace {

constexpr int kMaxRows = 512;

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
      const uint16_t want = rounded_to_bf16(times * value(rank, t, c));
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
    write_inputs(tensors[r], routing, r);
    handles.push_back(make_handle(ranks[r], {routing.num_tokens, kHidden, kTopk}));
  }
  // Everything is enqueued on all ranks before anything is waited for: a rank's kernel waits for the others'.
  for (int r = 0; r < n; r++) {
    const uint64_t counts_id = ranks[r].next_id++;
    auto d = dispatch_of(ranks[r], {world[r].num_tokens, kHidden, kTopk}, handles[r], tensors[r].x.address(),
                         tensors[r].topk_idx.address());
    d.counts_id = counts_id;
    d.topk_weights = tensors[r].topk_weights.address();
    if (expert_layout) {
      d.layout = DEEPEP_LAYOUT_EXPERT;
      d.expert_alignment = kAlignment;
      d.flags = DEEPEP_FLAG_ZERO_PADDING;
    }
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
    release_slot(ranks[r], sent[r].slot);
    must("handle_destroy", deepep_handle_destroy_(handles[r], &error));
  }
}

}  // namespace

int main(int argc, char** argv) {
  open_library();
  const uint32_t num_ranks = option(argc, argv, "--ranks", 3), rounds = option(argc, argv, "--rounds", 10);
  const bool low_latency = option(argc, argv, "--low-latency", 1) != 0 && has_low_latency();
  for (const char* tma : {"1", "0"}) {
    setenv("DEEPEP_CUDA_TMA", tma, 1);  // read when a buffer is created
    auto options = make<deepep_buffer_create_args>();
    options.hidden = kHidden;
    options.num_experts = kExperts;
    options.num_topk = kTopk;
    options.max_tokens_per_rank = kTokens;
    options.max_recv_tokens = kMaxRows;
    if (low_latency) options.max_low_latency_tokens_per_rank = kTokens * kTopk;  // a token may list an expert thrice
    options.timeout_ms = 60000;
    options.num_sms = 2;  // few blocks: the tools that watch a kernel slow each of them down
    auto ranks = connect(num_ranks, options);
    std::vector<Tensors> tensors(num_ranks);
    std::mt19937 random(1);
    for (uint32_t round = 0; round < rounds; round++) {
      run_round(ranks, tensors, random, round % 2 == 1);
      // Each of the four ways in turn, two a round.
      if (low_latency) run_low_latency_round(ranks, tensors, random, {round % 2 == 0, true});
      if (low_latency) run_low_latency_round(ranks, tensors, random, {round % 2 == 1, false});
    }
    destroy(ranks);
    std::printf("%u ranks, %u rounds %s, %s\n", num_ranks, rounds, low_latency ? "of both modes" : "of normal mode",
                tma[0] == '1' ? "by TMA" : "by loads and stores");
  }
  std::puts("ok");
  return 0;
}
