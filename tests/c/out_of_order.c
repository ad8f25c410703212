/*
 * Calls in an order that nobody meant, through the C ABI: two ranks of one process, each case in buffers of its own.
 * tests/c_test.ts builds and runs it. No case may end the process, hang, or report success for what did not happen.
 *
 *   usage: out_of_order LIBRARY      exits 0 and prints "ok", or says what differs
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "deepep.h"

enum { kRanks = 2, kHidden = 8, kTokens = 512, kTopk = 2 };

static void* library;
static const char* about = "";
static deepep_error error = {.size = sizeof error};
static uint64_t queue, buffers[kRanks], next_id;
static _Alignas(16) uint16_t rows[kTokens * kHidden], out[kTokens * kHidden];
static int32_t topk_idx[kTokens * kTopk];

static void expect(const char* what, long got, long want) {
  if (got == want) return;
  fprintf(stderr, "%s: %s is %ld, not %ld (%s)\n", about, what, got, want, error.message);
  exit(1);
}

#define LOAD(name) static __typeof__(name)* name##_;
#define FUNCTIONS(X)                                                                                               \
  X(deepep_queue_create) X(deepep_queue_drain) X(deepep_queue_destroy) X(deepep_buffer_create)                     \
  X(deepep_buffer_export) X(deepep_buffer_import) X(deepep_buffer_connect) X(deepep_buffer_get_info)               \
  X(deepep_buffer_recover) X(deepep_buffer_destroy) X(deepep_mask) X(deepep_slot_release) X(deepep_handle_create)  \
  X(deepep_dispatch) X(deepep_combine) X(deepep_barrier) X(deepep_inject) X(deepep_expert_output)                  \
  X(deepep_low_latency_dispatch) X(deepep_low_latency_dispatch_receive) X(deepep_low_latency_combine)              \
  X(deepep_low_latency_combine_receive)
FUNCTIONS(LOAD)
#define FIND(name) \
  if (!(name##_ = (__typeof__(name)*)dlsym(library, #name))) { fprintf(stderr, "missing %s\n", #name); exit(1); }

static void open_world(const char* name, uint32_t flags) {
  about = name;
  deepep_queue_create_args made = {.size = sizeof made};
  expect("queue_create", deepep_queue_create_(0, &made, &error), DEEPEP_OK);
  queue = made.queue;
  deepep_peer_handle handles[kRanks];
  for (uint32_t r = 0; r < kRanks; r++) {
    deepep_buffer_create_args args = {.size = sizeof args, .flags = flags, .rank = r, .num_ranks = kRanks,
                                      .hidden = kHidden, .num_experts = 4, .num_topk = kTopk,
                                      .max_tokens_per_rank = kTokens, .max_low_latency_tokens_per_rank = 4,
                                      .timeout_ms = 150, .queue = queue};
    expect("buffer_create", deepep_buffer_create_(0, &args, &error), DEEPEP_OK);
    buffers[r] = args.buffer;
    handles[r] = (deepep_peer_handle){.size = sizeof handles[r]};
    expect("buffer_export", deepep_buffer_export_(buffers[r], &handles[r], &error), DEEPEP_OK);
  }
  for (int r = 0; r < kRanks; r++) {
    for (int peer = 0; peer < kRanks; peer++) {
      expect("buffer_import", deepep_buffer_import_(buffers[r], &handles[peer], &error), DEEPEP_OK);
    }
    expect("buffer_connect", deepep_buffer_connect_(buffers[r], &error), DEEPEP_OK);
  }
}

static void close_world(void) {
  for (int r = 0; r < kRanks; r++) expect("buffer_destroy", deepep_buffer_destroy_(buffers[r], &error), DEEPEP_OK);
  expect("queue_destroy", deepep_queue_destroy_(queue, &error), DEEPEP_OK);
}

/* The status of a completion; the others are kept for those who ask later. */
static int32_t completed(uint64_t id) {
  static int32_t statuses[64];
  static uint64_t ids[64];
  static int kept;
  for (int tries = 0; tries < 10000; tries++) {
    for (int i = 0; i < kept; i++) {
      if (ids[i] == id) return statuses[i];
    }
    deepep_completion done[16];
    const int32_t n = deepep_queue_drain_(queue, done, 16);
    for (int32_t i = 0; i < n; i++, kept++) ids[kept % 64] = done[i].id, statuses[kept % 64] = done[i].status;
    if (kept >= 48) kept = 0;
    nanosleep(&(struct timespec){.tv_nsec = 1000000}, NULL);
  }
  expect("a completion", -1, (long)id);
  return -1;
}

static uint64_t barrier(int rank) {
  deepep_barrier_args args = {.size = sizeof args, .done_id = ++next_id};
  expect("barrier", deepep_barrier_(buffers[rank], &args, &error), DEEPEP_OK);
  return args.done_id;
}

static void mask(int rank, uint32_t peer) {
  const deepep_mask_args args = {.size = sizeof args, .rank = peer, .masked = 1};
  expect("mask", deepep_mask_(buffers[rank], &args, &error), DEEPEP_OK);
}

static uint64_t handle_of(int rank) {
  deepep_handle_create_args args = {.size = sizeof args, .num_tokens = kTokens, .num_topk = kTopk};
  expect("handle_create", deepep_handle_create_(buffers[rank], &args, &error), DEEPEP_OK);
  return args.handle;
}

static deepep_dispatch_args dispatch(int rank, uint64_t handle, int32_t num_tokens) {
  deepep_dispatch_args args = {.size = sizeof args, .handle = handle, .slot = -1, .expert_alignment = 1,
                               .num_tokens = num_tokens, .num_topk = kTopk, .topk_idx_bytes = 4,
                               .topk_idx = (uint64_t)topk_idx, .x = (uint64_t)rows, .x_stride = kHidden * 2,
                               .row_bytes = kHidden * 2, .done_id = ++next_id};
  expect("dispatch", deepep_dispatch_(buffers[rank], &args, &error), DEEPEP_OK);
  return args;
}

static uint64_t combine(int rank, uint64_t handle, int32_t slot, uint64_t x) {
  const deepep_combine_args args = {.size = sizeof args, .hidden = kHidden, .handle = handle, .slot = slot, .x = x,
                                    .x_stride = kHidden * 2, .out = (uint64_t)out, .done_id = ++next_id};
  expect("combine", deepep_combine_(buffers[rank], &args, &error), DEEPEP_OK);
  return args.done_id;
}

static int32_t release(int rank, int32_t slot) {
  const deepep_slot_release_args args = {.size = sizeof args, .slot = slot};
  return deepep_slot_release_(buffers[rank], &args, &error);
}

static deepep_low_latency_dispatch_args low_latency_dispatch(int rank, uint32_t flags) {
  deepep_low_latency_dispatch_args args = {.size = sizeof args, .slot = -1, .num_tokens = 2, .num_topk = kTopk,
                                           .topk_idx_bytes = 4, .topk_idx = (uint64_t)topk_idx, .x = (uint64_t)rows,
                                           .x_stride = kHidden * 2, .row_bytes = kHidden * 2, .done_id = ++next_id,
                                           .flags = flags};
  expect("low_latency_dispatch", deepep_low_latency_dispatch_(buffers[rank], &args, &error), DEEPEP_OK);
  return args;
}

/* A send half that was skipped, because the call before it failed, has no receive half: it must not read what is not there. */
static void receive_without_send(void) {
  open_world("a receive half whose dispatch was skipped", 0);
  uint64_t first = barrier(0);
  deepep_low_latency_dispatch_args sent = low_latency_dispatch(0, DEEPEP_FLAG_RECEIVE_HOOK);
  expect("the barrier", completed(first), DEEPEP_ERROR_TIMEOUT);
  expect("the send half", completed(sent.done_id), DEEPEP_ERROR_NEEDS_RECOVERY);
  mask(0, 1);
  deepep_receive_args args = {.size = sizeof args, .slot = sent.slot, .done_id = ++next_id};
  expect("receive", deepep_low_latency_dispatch_receive_(buffers[0], &args, &error), DEEPEP_OK);
  expect("the receive half", completed(args.done_id), DEEPEP_ERROR_ABORTED);
  close_world();

  open_world("a receive half whose combine was skipped", 0);
  sent = low_latency_dispatch(0, 0);
  expect("the dispatch of rank 1", completed(low_latency_dispatch(1, 0).done_id), DEEPEP_OK);
  expect("the dispatch of rank 0", completed(sent.done_id), DEEPEP_OK);
  first = barrier(0);
  const deepep_low_latency_combine_args combine_args = {
      .size = sizeof combine_args, .slot = sent.slot, .num_tokens = 2, .num_topk = kTopk, .topk_idx_bytes = 4,
      .topk_idx = (uint64_t)topk_idx, .out = (uint64_t)out, .done_id = ++next_id, .flags = DEEPEP_FLAG_RECEIVE_HOOK};
  expect("low_latency_combine", deepep_low_latency_combine_(buffers[0], &combine_args, &error), DEEPEP_OK);
  expect("the barrier", completed(first), DEEPEP_ERROR_TIMEOUT);
  expect("the send half", completed(combine_args.done_id), DEEPEP_ERROR_NEEDS_RECOVERY);
  mask(0, 1);
  args = (deepep_receive_args){.size = sizeof args, .slot = sent.slot, .done_id = ++next_id};
  expect("receive", deepep_low_latency_combine_receive_(buffers[0], &args, &error), DEEPEP_ERROR_ABORTED);
  expect("a call after it", completed(barrier(0)), DEEPEP_OK);
  close_world();
}

/* A handle whose latest dispatch was skipped has the routing of an earlier, smaller one: it must not be read as the later. */
static void combine_of_skipped_dispatch(void) {
  open_world("a combine whose dispatch was skipped", 0);
  const uint64_t handles[] = {handle_of(0), handle_of(1)};
  const deepep_dispatch_args first = dispatch(0, handles[0], 1);
  expect("the dispatch of rank 1", completed(dispatch(1, handles[1], 1).done_id), DEEPEP_OK);
  expect("the dispatch of rank 0", completed(first.done_id), DEEPEP_OK);
  const uint64_t alone = barrier(0);
  const deepep_dispatch_args skipped = dispatch(0, handles[0], kTokens);
  expect("the barrier", completed(alone), DEEPEP_ERROR_TIMEOUT);
  expect("the second dispatch", completed(skipped.done_id), DEEPEP_ERROR_NEEDS_RECOVERY);
  deepep_buffer_recover_args recover = {.size = sizeof recover, .epoch = UINT64_MAX};
  expect("recover at no epoch", deepep_buffer_recover_(buffers[0], &recover, &error), DEEPEP_ERROR_INVALID_ARGUMENT);
  recover.epoch = 3;
  for (int r = 0; r < kRanks; r++) expect("recover", deepep_buffer_recover_(buffers[r], &recover, &error), DEEPEP_OK);
  expect("release", release(0, skipped.slot), DEEPEP_OK);
  const uint64_t refused = combine(0, handles[0], -1, first.recv_x);
  expect("the combine of rank 1", completed(combine(1, handles[1], -1, first.recv_x)), DEEPEP_ERROR_ABORTED);
  expect("the combine of rank 0", completed(refused), DEEPEP_ERROR_INVALID_ARGUMENT);
  close_world();
}

/* A slot that a combine has borrowed is not the caller's to release. */
static void release_of_borrowed_slot(void) {
  open_world("the release of a borrowed slot", 0);
  const uint64_t handles[] = {handle_of(0), handle_of(1)};
  const deepep_inject_args late = {.size = sizeof late, .op = DEEPEP_OP_COMBINE, .phase = DEEPEP_PHASE_PUBLISH,
                                   .delay_us = 60000, .count = 1};
  expect("inject", deepep_inject_(buffers[0], &late, &error), DEEPEP_OK);
  const deepep_dispatch_args mine = dispatch(0, handles[0], 2), theirs = dispatch(1, handles[1], 2);
  const uint64_t a = combine(0, handles[0], -1, mine.recv_x), b = combine(1, handles[1], -1, theirs.recv_x);
  expect("release", release(0, 1 - mine.slot), DEEPEP_ERROR_INVALID_ARGUMENT);
  expect("the combine of rank 0", completed(a), DEEPEP_OK);
  expect("the combine of rank 1", completed(b), DEEPEP_OK);
  close_world();
}

/* A rank that was left out while it read must not take what it read for results. */
static void overtaken_reader(void) {
  open_world("a reader that was left out", DEEPEP_BUFFER_MASK_ON_TIMEOUT);
  const uint64_t handles[] = {handle_of(0), handle_of(1)};
  const deepep_dispatch_args mine = dispatch(0, handles[0], 2), theirs = dispatch(1, handles[1], 2);
  const deepep_inject_args late = {.size = sizeof late, .op = DEEPEP_OP_COMBINE, .phase = DEEPEP_PHASE_REDUCE,
                                   .delay_us = 900000, .count = 1};
  expect("inject", deepep_inject_(buffers[1], &late, &error), DEEPEP_OK);
  const uint64_t a = combine(0, handles[0], mine.slot, (uint64_t)rows);
  const uint64_t b = combine(1, handles[1], theirs.slot, (uint64_t)rows);
  expect("the combine of rank 0", completed(a), DEEPEP_OK);
  deepep_expert_output_args region = {.size = sizeof region, .slot = mine.slot, .done_id = ++next_id};
  expect("the barrier", completed(barrier(0)), DEEPEP_OK); /* alone, once rank 1 is masked */
  expect("expert_output", deepep_expert_output_(buffers[0], &region, &error), DEEPEP_OK);
  expect("the wait for readers", completed(region.done_id), DEEPEP_OK);
  memset((void*)region.address, 0x46, region.bytes);
  expect("the combine of rank 1", completed(b), DEEPEP_ERROR_ABORTED);
  close_world();
}

/* A fork copies the objects but not their threads: they answer, and nothing waits for work that nobody does. */
static void use_after_fork(void) {
  open_world("a buffer in a forked process", 0);
  fflush(NULL);
  const pid_t child = fork();
  if (child == 0) {
    alarm(5);
    const int32_t code = deepep_buffer_destroy_(buffers[0], &error);
    _exit(code == DEEPEP_ERROR_INVALID_ARGUMENT ? 0 : 1);
  }
  int status = -1;
  expect("waitpid", waitpid(child, &status, 0), child);
  expect("the child's status", status, 0);
  const uint64_t a = barrier(0), b = barrier(1);
  expect("the barrier of rank 0", completed(a), DEEPEP_OK);
  expect("the barrier of rank 1", completed(b), DEEPEP_OK);
  close_world();
}

/* The kernel ends a process that makes a file larger than its limit; the library asks first. Last: limits stay. */
static void limited_file_size(void) {
  about = "a limit of a file's size";
  const struct rlimit limit = {.rlim_cur = 65536, .rlim_max = RLIM_INFINITY};
  expect("setrlimit", setrlimit(RLIMIT_FSIZE, &limit), 0);
  signal(SIGXFSZ, SIG_DFL);
  deepep_buffer_create_args args = {.size = sizeof args, .num_ranks = 1, .hidden = 4096, .num_experts = 4,
                                    .num_topk = kTopk, .max_tokens_per_rank = kTokens};
  expect("buffer_create", deepep_buffer_create_(0, &args, &error), DEEPEP_ERROR_OUT_OF_MEMORY);
}

int main(int argc, char** argv) {
  library = argc == 2 ? dlopen(argv[1], RTLD_NOW | RTLD_LOCAL) : NULL;
  if (!library) return fprintf(stderr, "usage: out_of_order LIBRARY\n"), 2;
  FUNCTIONS(FIND)
  for (int i = 0; i < kTokens * kTopk; i++) topk_idx[i] = i % 2 * 2; /* experts 0 and 2: one of either rank */
  receive_without_send();
  combine_of_skipped_dispatch();
  release_of_borrowed_slot();
  overtaken_reader();
  use_after_fork();
  limited_file_size();
  puts("ok");
  return 0;
}
