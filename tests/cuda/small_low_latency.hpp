// Rounds of low-latency mode for small_world.cu: dispatch with or without the cast to FP8, in one piece or in halves, and
// combine.
//
// In: ranks, a generator. Out: a first mismatch ends the program. Rows are compared where they lie: for each expert ordered by
// (source rank, token, k). What is cast to FP8 must be within a sixteenth. The experts are the identity, computed by the host.
#pragma once

#include <cmath>

#include "small_world.hpp"

struct LowLatencyWay {
  bool fp8, halves;
};

inline bool has_low_latency() {
  auto capabilities = make<deepep_capabilities>();
  must("get_capabilities", deepep_get_capabilities_(0, &capabilities, &error));
  return (capabilities.features & DEEPEP_FEATURE_LOW_LATENCY) != 0;
}

struct Source {
  int rank, token;
};

// The rows of an expert, in their order.
inline std::vector<Source> rows_of(const std::vector<Routing>& world, int expert) {
  std::vector<Source> rows;
  for (int s = 0; s < static_cast<int>(world.size()); s++) {
    for (int i = 0; i < world[s].num_tokens * kTopk; i++) {
      if (world[s].experts[i] == expert) rows.push_back({s, i / kTopk});
    }
  }
  return rows;
}

inline float from_e4m3(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const float magnitude = exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -9)
                                        : std::ldexp(static_cast<float>(8 + mantissa), exponent - 10);
  return code & 0x80 ? -magnitude : magnitude;
}

// One row as it arrived.
inline void check_row(const deepep_low_latency_dispatch_args& d, int local, size_t row, Source source, bool fp8) {
  const uint64_t at = static_cast<uint64_t>(local) * d.max_rows + row;
  expect("a source token", read<int32_t>(d.recv_src_info + at * 4, 1)[0], source.token);
  if (!fp8) {
    const auto x = read<uint16_t>(d.recv_x + at * 2 * kHidden, kHidden);
    for (int c = 0; c < kHidden; c++) {
      const uint16_t want = to_bf16(value(source.rank, source.token, c));
      if (x[c] != want) fail("an element of a received row", x[c], want);
    }
    return;
  }
  const auto x = read<uint8_t>(d.recv_x + at * kHidden, kHidden);
  for (int c = 0; c < kHidden; c++) {
    const uint64_t scale = d.recv_scales + local * d.recv_scales_expert_stride + row * d.recv_scales_row_stride +
                           c / 128 * d.recv_scales_elem_stride;
    static float kept = 0;
    if (c % 128 == 0) kept = read<float>(scale, 1)[0];
    const float got = from_e4m3(x[c]) * kept, want = value(source.rank, source.token, c);
    if (std::fabs(got - want) > want / 16) {
      fail("an element of a row in FP8, in thousandths", std::llround(1000 * got), std::llround(1000 * want));
    }
  }
}

// Everything that a rank received.
inline void check_received(const deepep_low_latency_dispatch_args& d, const std::vector<Routing>& world, int rank, bool fp8) {
  const int n = static_cast<int>(world.size()), first = first_expert(rank, n);
  const int count = (rank + 1 < n ? first_expert(rank + 1, n) : kExperts) - first;
  const auto counts = read<int32_t>(d.recv_count, count);
  const auto ranges = read<int64_t>(d.recv_layout_range, static_cast<size_t>(count) * n);
  for (int local = 0; local < count; local++) {
    const auto rows = rows_of(world, first + local);
    expect("rows of an expert", counts[local], static_cast<long long>(rows.size()));
    for (size_t row = 0; row < rows.size(); row++) check_row(d, local, row, rows[row], fp8);
    int64_t begin = 0;
    for (int s = 0; s < n; s++) {
      const auto of_source = std::count_if(rows.begin(), rows.end(), [s](Source row) { return row.rank == s; });
      expect("a range of rows", ranges[local * n + s], begin << 32 | of_source);
      begin += of_source;
    }
  }
}

// Tokens come back once for each entry, weighted. Products and sums are whole halves: exact, but for the last rounding.
inline void check_sums(uint64_t out, const Routing& routing, int rank) {
  const auto sums = read<uint16_t>(out, static_cast<size_t>(routing.num_tokens) * kHidden);
  for (int i = 0; i < routing.num_tokens * kHidden; i++) {
    const int token = i / kHidden;
    float times = 0;
    for (int k = 0; k < kTopk; k++) {
      if (routing.experts[token * kTopk + k] >= 0) times += routing.weights[token * kTopk + k];
    }
    const uint16_t want = rounded_to_bf16(times * value(rank, token, i % kHidden));
    if (sums[i] != want) fail("an element of a combined token", sums[i], want);
  }
}

inline deepep_low_latency_dispatch_args send(Rank& rank, Tensors& tensors, const Routing& routing, LowLatencyWay way) {
  auto d = make<deepep_low_latency_dispatch_args>();
  d.slot = -1;
  d.num_tokens = routing.num_tokens;
  d.num_topk = kTopk;
  d.topk_idx_bytes = 4;
  d.topk_idx = tensors.topk_idx.address();
  d.x = tensors.x.address();
  d.x_stride = d.row_bytes = 2 * kHidden;
  d.flags = (way.fp8 ? DEEPEP_FLAG_FP8 | DEEPEP_FLAG_SCALES_COLUMN_MAJOR : 0) | (way.halves ? DEEPEP_FLAG_RECEIVE_HOOK : 0);
  d.stream = rank.stream;
  d.done_id = rank.next_id++;
  must("low_latency_dispatch", deepep_low_latency_dispatch_(rank.buffer, &d, &error));
  return d;
}

inline void combine(Rank& rank, Tensors& tensors, const Routing& routing, LowLatencyWay way, int32_t slot, uint64_t y) {
  auto c = make<deepep_low_latency_combine_args>();
  c.slot = slot;
  c.num_tokens = routing.num_tokens;
  c.num_topk = kTopk;
  c.topk_idx_bytes = 4;
  c.topk_idx = tensors.topk_idx.address();
  c.topk_weights = tensors.topk_weights.address();
  c.x = y;
  c.out = tensors.out.address();
  c.flags = way.halves ? DEEPEP_FLAG_RECEIVE_HOOK : 0;
  c.stream = rank.stream;
  c.done_id = rank.next_id++;
  must("low_latency_combine", deepep_low_latency_combine_(rank.buffer, &c, &error));
}

// The receive halves of a call on all ranks, when it has them.
template <class Receive>
void receive(std::vector<Rank>& ranks, const std::vector<int32_t>& slots, LowLatencyWay way, Receive half) {
  for (size_t r = 0; r < ranks.size() && way.halves; r++) {
    auto args = make<deepep_receive_args>();
    args.slot = slots[r];
    args.stream = ranks[r].stream;
    args.done_id = ranks[r].next_id++;
    must("a receive half", half(ranks[r].buffer, &args, &error));
  }
  for (Rank& rank : ranks) finish(rank);
}

// Expert outputs of a rank, bf16 [local experts, max_rows, kHidden]: what was sent to it.
inline DeviceArray<uint16_t> identity_outputs(const std::vector<Routing>& world, int rank, uint32_t max_rows) {
  const int n = static_cast<int>(world.size()), first = first_expert(rank, n);
  const int count = (rank + 1 < n ? first_expert(rank + 1, n) : kExperts) - first;
  DeviceArray<uint16_t> y(static_cast<size_t>(count) * max_rows * kHidden);
  std::vector<uint16_t> values(y.count, 0x7fc0);  // NaN where there is no row
  for (int local = 0; local < count; local++) {
    size_t at = static_cast<size_t>(local) * max_rows * kHidden;
    for (const Source& row : rows_of(world, first + local)) {
      for (int c = 0; c < kHidden; c++) values[at++] = to_bf16(value(row.rank, row.token, c));
    }
  }
  y.write(values);
  return y;
}

// One dispatch and combine on every rank.
inline void run_low_latency_round(std::vector<Rank>& ranks, std::vector<Tensors>& tensors, std::mt19937& random,
                                  LowLatencyWay way) {
  const int n = static_cast<int>(ranks.size());
  std::vector<Routing> world;
  std::vector<deepep_low_latency_dispatch_args> sent;
  std::vector<int32_t> slots;
  std::vector<DeviceArray<uint16_t>> y;
  for (int r = 0; r < n; r++) {
    world.push_back(draw(random));
    write_inputs(tensors[r], world[r], r);
  }
  for (int r = 0; r < n; r++) {
    sent.push_back(send(ranks[r], tensors[r], world[r], way));
    slots.push_back(sent[r].slot);
  }
  receive(ranks, slots, way, deepep_low_latency_dispatch_receive_);
  for (int r = 0; r < n; r++) check_received(sent[r], world, r, way.fp8);
  for (int r = 0; r < n; r++) y.push_back(identity_outputs(world, r, sent[r].max_rows));
  for (int r = 0; r < n; r++) combine(ranks[r], tensors[r], world[r], way, slots[r], y[r].address());
  receive(ranks, slots, way, deepep_low_latency_combine_receive_);
  for (int r = 0; r < n; r++) {
    check_sums(tensors[r].out.address(), world[r], r);
    release_slot(ranks[r], slots[r]);
  }
}
