// The world of small_world.cu: what ranks send, and which rank owns an expert.
//
// In: a generator of numbers. Out: routings, and the values of rows. 7 experts over the ranks (they need not divide), top-3
// with entries that are -1 or listed twice, 20 tokens of 272 channels at most. Token t of rank r holds the small integer 1 + (r
// + 3t) % 100 in every channel, plus its channel's parity, so sums are exact.
#pragma once

#include <algorithm>
#include <random>

#include "support.hpp"

constexpr int kHidden = 272, kTopk = 3, kExperts = 7, kTokens = 20, kAlignment = 4;

// Experts of a rank: the first kExperts % n ranks own one more.
inline int first_expert(int rank, int n) { return rank * (kExperts / n) + std::min(rank, kExperts % n); }
inline int owner(int expert, int n) {
  int rank = 0;
  while (rank + 1 < n && first_expert(rank + 1, n) <= expert) rank++;
  return rank;
}

inline float value(int rank, int token, int channel) { return static_cast<float>(1 + (rank + 3 * token) % 100 + channel % 2); }

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

inline Routing draw(std::mt19937& random) {
  Routing routing{static_cast<int>(random() % (kTokens + 1)), {}, {}};
  for (int i = 0; i < routing.num_tokens * kTopk; i++) {
    routing.experts.push_back(random() % 8 == 0 ? -1 : static_cast<int32_t>(random() % kExperts));
    routing.weights.push_back(random() % 2 ? 1.0f : 0.5f);
  }
  return routing;
}

// What a rank sends, on the device.
inline void write_inputs(Tensors& tensors, const Routing& routing, int rank) {
  std::vector<uint16_t> rows;
  for (int i = 0; i < routing.num_tokens * kHidden; i++) rows.push_back(to_bf16(value(rank, i / kHidden, i % kHidden)));
  tensors.x.write(rows);
  tensors.topk_idx.write(routing.experts);
  tensors.topk_weights.write(routing.weights);
}

// A sum of up to 3 * 102 is more than bf16 holds exactly: to nearest, ties to even.
inline uint16_t rounded_to_bf16(float sum) {
  uint32_t bits;
  std::memcpy(&bits, &sum, sizeof bits);
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
