// How an operation is launched: a pure function of shapes and topology, which can be printed and tested without a GPU.
//
// In: bytes a row, rows a token at most, multiprocessors. Out: blocks, warps, and how shared memory is cut into stages.
// Callers: cuda/host before each launch, deepep_plan; the kernels, for the sizes that both must know.
#pragma once

#include <cstdint>

#include "../abi/deepep.h"
#include "regions.hpp"

namespace deepep {

// Where an operation runs.
struct Topology {
  int32_t device_sms = 0;
  uint32_t ranks_on_device = 1;
  int32_t compute_capability = 0;  // 10 * major + minor
  uint32_t shared_bytes = 0;       // a block can have
};

// What it moves.
struct Work {
  int32_t op = 0;  // DEEPEP_OP_DISPATCH or DEEPEP_OP_COMBINE, or those of low latency
  uint32_t row_bytes = 0;
  uint32_t hops = 0;         // rows a token becomes at most
  int32_t num_sms = 0;       // asked for; 0 = default
  uint32_t num_tokens = 0;   // low latency, which has no work for all blocks where there are few
  uint32_t num_experts = 0;  // low latency, whose blocks keep tables of them
  bool fp8 = false;          // low latency that casts; row_bytes are those of bf16
};

// Fields as in deepep_plan_args, but for the last.
struct Plan {
  int32_t sms = 0;
  uint32_t warps = 0;
  uint32_t stages = 0;
  uint32_t chunk_bytes = 0;
  uint32_t block_bytes = 0;  // dynamic shared memory
  uint32_t tma = 0;
  uint32_t little_bytes = 0;  // up to so many of rows a warp go through registers, although there is TMA
};

// Multiprocessors that an operation takes unless it is told, should its rank's share of the device be as many: what a link or a
// memory needs to be busy. Low latency is short, and takes more for it.
constexpr int32_t kDefaultSms = 16;
constexpr int32_t kDefaultLowLatencySms = 32;
constexpr uint32_t kMaxWarps = 16;  // a block: 128 registers a thread
constexpr uint32_t kMaxBlockThreads = 32 * kMaxWarps;
constexpr uint32_t kMaxBarriers = 256;           // warps * stages, at most
constexpr uint32_t kReservedShared = 24 * 1024;  // of a block, for what kernels declare themselves
constexpr uint32_t kPushPieceBytes = 4096;       // larger pieces gain nothing, smaller ones lose
constexpr uint32_t kPushStages = 3;
constexpr uint32_t kPushHeaderBytes = 16;   // of a stage of a push, before its destinations
constexpr uint32_t kPullPieceBytes = 2048;  // a warp sums that much of its rows in registers
constexpr uint32_t kLeastPullStages = 4;
constexpr uint32_t kPullBatch = 6;     // pieces that a warp waits for at once, at most
// Little to move: barriers and stages do not pay, and the way through registers is the shorter one, by a microsecond. There a
// warp waits for a piece before it asks for the next, so a pull takes that way for a piece a warp; but where ranks fill a GPU
// together it is the sooner one for more (8 ranks of 16 multiprocessors on an H200, 128 tokens: 37 against 42 us).
constexpr uint32_t kLittleBytes = 8192;
constexpr uint32_t kLittlePullBytes = 1024;
constexpr uint32_t kRoundTokens = 64;  // low latency: tokens that a block finds places for at once, at most
// Low latency: with so many of a rank's tokens on other GPUs, were they spread evenly, scales in columns go as rows. On two
// H200, where half are, a dispatch of 192, 256, 512 tokens is then shorter by 1, 4, 11 us; one of 64 would be longer by 3.
constexpr uint32_t kTurnedTokens = 96;

// What a stage of a push takes: a piece of a row, and the addresses it goes to.
DEEPEP_HOST_DEVICE constexpr uint32_t push_stage_bytes(uint32_t chunk_bytes, uint32_t hops) {
  return static_cast<uint32_t>(align_up(chunk_bytes, 128) + kPushHeaderBytes + 8 * align_up(hops, 2));
}

// What a stage of a pull takes: a piece, its weight, and what is known of a batch.
DEEPEP_HOST_DEVICE constexpr uint32_t pull_stage_bytes() { return kPullPieceBytes + 20; }

// Rows are cut into pieces of equal size, whole cache lines where possible, none above `most_bytes`.
DEEPEP_HOST_DEVICE constexpr uint32_t piece_bytes(uint32_t row_bytes, uint32_t most_bytes) {
  const uint64_t pieces = ceil_div(row_bytes, most_bytes);
  const uint64_t even = ceil_div(row_bytes, pieces ? pieces : 1);
  const uint64_t lines = align_up(even, 128);
  return static_cast<uint32_t>(lines <= most_bytes ? lines : align_up(even, 16));
}

// How `bytes` of shared memory, of which the plan says for how many warps, are cut for a push.
DEEPEP_HOST_DEVICE constexpr Plan cut_for_push(Plan plan, uint32_t row_bytes, uint32_t hops, uint32_t bytes) {
  const uint32_t stage_bytes = bytes / plan.warps / kPushStages - push_stage_bytes(0, hops);
  const uint32_t most = stage_bytes < kPushPieceBytes ? stage_bytes / 128 * 128 : kPushPieceBytes;
  plan.stages = kPushStages;
  plan.little_bytes = kLittleBytes;
  plan.chunk_bytes = piece_bytes(row_bytes, most);
  plan.block_bytes = plan.warps * plan.stages * push_stage_bytes(plan.chunk_bytes, hops);
  return plan;
}

// The plan of a push with one destination a row in the same blocks as `plan`: combine, when it copies rows first.
DEEPEP_HOST_DEVICE constexpr Plan copy_plan(const Plan& plan, uint32_t row_bytes) {
  return plan.tma != 0 ? cut_for_push(plan, row_bytes, 1, plan.block_bytes) : plan;
}

// Shared memory in which a block of a low-latency dispatch counts: four words an expert, and what it knows of a round's
// entries.
constexpr uint32_t kEntryTableBytes = 28;
DEEPEP_HOST_DEVICE constexpr uint32_t low_latency_table_bytes(uint32_t num_experts, uint32_t num_topk) {
  return static_cast<uint32_t>(
      align_up(16 * uint64_t{num_experts} + kEntryTableBytes * uint64_t{kRoundTokens} * num_topk, 128));
}

constexpr bool is_low_latency(int32_t op) {
  return op == DEEPEP_OP_LOW_LATENCY_DISPATCH || op == DEEPEP_OP_LOW_LATENCY_COMBINE;
}

// Warps of a block of a low-latency dispatch that only listen for counts, at most.
constexpr uint32_t kMostListeners = 9;

// Low latency moves rows in units of so many bytes, as they are given: 16 for each lane of a warp.
constexpr uint32_t kUnitBytes = 512;
// That a warp holds at once, at most, in a combine: the longer the runs that it writes, the better memory keeps up.
constexpr uint32_t kPieceUnits = 14;
// In a dispatch, which holds them while the counts come: what is cast meanwhile is not stored yet.
constexpr uint32_t kHeldUnits = 7;

// How many blocks a token has in a low-latency dispatch, of `most`: those that give every unit of its row a warp, and twice as
// many for as long as they can divide its places, too. A block takes 0.17 us a place, however many warps it has: places lie in
// pages far apart, which a multiprocessor seems to look up one after another. Blocks that have other places cast the same
// pieces.
struct TokenBlocks {
  uint32_t row_blocks;   // that divide the row
  uint32_t place_shift;  // 1 << place_shift times as many, with other places each

  constexpr uint32_t all() const { return row_blocks << place_shift; }
  static constexpr TokenBlocks of(uint64_t units, uint64_t most, uint32_t num_topk) {
    const uint64_t wanted = ceil_div(units, kMaxWarps);
    TokenBlocks blocks = {static_cast<uint32_t>(larger(smaller(most, wanted), 1)), 0};
    while (blocks.row_blocks == wanted && 2 * blocks.all() <= most && 2u << blocks.place_shift <= num_topk) {
      ++blocks.place_shift;
    }
    return blocks;
  }
};

// The warps of a block of a low-latency dispatch, beside the one that leads: the first listen to the peers' counts, the last
// cast rows and move them. Counts that have come wait for a warp that does both; where there is little to cast, some only
// listen.
struct DispatchWarps {
  uint32_t listeners, movers;  // of kMaxWarps

  // `units`: of rows that the block has.
  static constexpr DispatchWarps of(uint64_t units, uint32_t num_experts, uint32_t num_ranks) {
    // Every word has a lane that listens to it; those of ranks are in warps of their own.
    const uint64_t words = ceil_div(num_experts, 32) + ceil_div(num_ranks, 32);
    const auto listeners = static_cast<uint32_t>(smaller(words, kMostListeners));
    if (units <= 2 * (kMaxWarps - listeners)) return {listeners, kMaxWarps - listeners};
    return {kMaxWarps, kMaxWarps};
  }
};

// Blocks that low latency has work for, at most `sms`: a block more is one more to wait for. A unit for every warp will do; in
// a dispatch every token has as many blocks as the others, or shares one.
constexpr int32_t useful_blocks(const Work& work, int32_t sms) {
  const uint64_t units = ceil_div(work.row_bytes, kUnitBytes), most = static_cast<uint64_t>(sms);
  if (work.num_tokens == 0) return 1;
  if (work.op == DEEPEP_OP_LOW_LATENCY_DISPATCH) {
    const uint64_t share = most / work.num_tokens;
    return static_cast<int32_t>(share < 1 ? most : work.num_tokens * TokenBlocks::of(units, share, work.hops).all());
  }
  const uint64_t blocks = ceil_div(work.num_tokens * units, kMaxWarps);
  return static_cast<int32_t>(blocks < most ? blocks : most);
}

// How many pieces a low-latency dispatch cuts a row of `units` into, of which a warp holds `most_units` at once: with `rows`
// rows a block, the warp with most to do has as little as can be. A piece more costs as much as two units: runs that memory
// takes are long ones.
constexpr uint32_t low_latency_pieces(uint32_t units, uint32_t most_units, uint64_t rows, uint32_t warps) {
  uint32_t best = 0;
  uint64_t least = ~uint64_t{0};
  for (auto pieces = static_cast<uint32_t>(ceil_div(units, most_units)); pieces <= units; ++pieces) {
    const uint64_t took = ceil_div(rows * pieces, warps) * (ceil_div(units, pieces) + 2);
    if (took < least) best = pieces, least = took;
  }
  return best;
}

constexpr Plan make_plan(const Work& work, const Topology& topology) {
  Plan plan;
  const uint32_t ranks = topology.ranks_on_device > 0 ? topology.ranks_on_device : 1;
  const int32_t share = topology.device_sms / static_cast<int32_t>(ranks);
  const int32_t usual = is_low_latency(work.op) ? kDefaultLowLatencySms : kDefaultSms;
  plan.sms = work.num_sms != 0 ? work.num_sms : share < 1 ? 1 : share < usual ? share : usual;
  if (is_low_latency(work.op)) plan.sms = useful_blocks(work, plan.sms);
  plan.warps = kMaxWarps;
  const bool push = work.op == DEEPEP_OP_DISPATCH || work.op == DEEPEP_OP_LOW_LATENCY_DISPATCH;
  const uint32_t table_bytes = work.op == DEEPEP_OP_LOW_LATENCY_DISPATCH  ? low_latency_table_bytes(work.num_experts, work.hops)
                               : work.op == DEEPEP_OP_LOW_LATENCY_COMBINE ? 4 * (work.num_experts + 1)
                                                                          : 0;
  const uint32_t taken = kReservedShared + table_bytes;
  const uint32_t bytes = topology.shared_bytes > taken ? topology.shared_bytes - taken : 0;
  plan.tma = topology.compute_capability >= 90;
  if (work.op == DEEPEP_OP_LOW_LATENCY_DISPATCH) {
    // A warp that casts has room for a piece, which comes by TMA, if it can.
    const uint32_t units = bytes / kMaxWarps / kUnitBytes;
    plan.tma = plan.tma != 0 && work.fp8;
    plan.stages = 1;
    plan.chunk_bytes = (!work.fp8 || units >= kHeldUnits ? kHeldUnits : units < 1 ? 1 : units) * kUnitBytes;
    plan.block_bytes = table_bytes + (work.fp8 ? kMaxWarps * plan.chunk_bytes : 0);
    return plan;
  }
  // With little shared memory fewer warps, each with room for what it cannot do without.
  const uint32_t least = push ? kPushStages * push_stage_bytes(1024, work.hops) : kLeastPullStages * pull_stage_bytes();
  while (plan.warps > 4 && bytes / plan.warps < least) plan.warps /= 2;
  // A low-latency combine moves little, and each row through registers is sooner there than through shared memory.
  if (plan.tma == 0 || is_low_latency(work.op) || bytes / plan.warps < least) {
    plan.tma = 0;
    plan.warps = kMaxWarps;
    // A combine that casts rows where they are holds a whole one in a block. No stages = it does not fit.
    const bool too_long =
        work.op == DEEPEP_OP_LOW_LATENCY_COMBINE && work.fp8 && ceil_div(work.row_bytes, kPieceUnits * kUnitBytes) > kMaxWarps;
    plan.stages = too_long ? 0 : 1;
    plan.chunk_bytes = push ? 2048 : 1024;
    plan.block_bytes = table_bytes;
    return plan;
  }
  if (push) {
    plan = cut_for_push(plan, work.row_bytes, work.hops, bytes);
    plan.block_bytes += table_bytes;
    return plan;
  }
  const bool fill_device = ranks > 1 && 2 * plan.sms * static_cast<int32_t>(ranks) > topology.device_sms;
  plan.little_bytes = fill_device ? kLittleBytes : kLittlePullBytes;
  plan.chunk_bytes = kPullPieceBytes;
  plan.stages = bytes / plan.warps / pull_stage_bytes();
  if (plan.stages > kMaxBarriers / plan.warps) plan.stages = kMaxBarriers / plan.warps;
  plan.block_bytes = plan.warps * plan.stages * pull_stage_bytes();
  return plan;
}

}  // namespace deepep
