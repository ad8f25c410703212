/*
 * Drives the CPU library through cuda/abi/deepep.h alone, as a program in another language would: two ranks as two
 * processes, one normal dispatch and combine, one in low-latency mode, one refusal. tests/c_test.ts builds and runs it.
 *
 *   usage: two_ranks LIBRARY      exits 0 and prints "ok", or says what differs
 *
 * World: 4 experts (0 and 1 on rank 0, 2 and 3 on rank 1), top-2, hidden 8, two tokens a rank. Token t of rank r holds
 * the value 1 + 2r + t in every channel and goes to experts (0, 2) for t = 0 and (3, 3 - r) for t = 1.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#include "deepep.h"

enum { kRanks = 2, kHidden = 8, kTokens = 2, kTopk = 2 };

static int rank;
static void* library;
static deepep_error error = {.size = sizeof error};

static void fail(const char* what, long got, long want) {
  fprintf(stderr, "rank %d: %s is %ld, not %ld\n", rank, what, got, want);
  exit(1);
}
static void expect(const char* what, long got, long want) {
  if (got != want) fail(what, got, want);
}
static void must(const char* what, int32_t code) {
  if (code == DEEPEP_OK) return;
  fprintf(stderr, "rank %d: %s: %s\n", rank, what, error.message);
  exit(1);
}

/* The functions, by name, as a binding would find them. */
#define LOAD(name) static __typeof__(name)* name##_;
#define FUNCTIONS(X)                                                                                               \
  X(deepep_abi_version) X(deepep_host_read) X(deepep_host_write) X(deepep_queue_create) X(deepep_queue_drain)      \
  X(deepep_queue_destroy) X(deepep_buffer_create) X(deepep_buffer_export) X(deepep_buffer_import)                  \
  X(deepep_buffer_connect) X(deepep_buffer_get_stats) X(deepep_buffer_destroy) X(deepep_alloc) X(deepep_free)      \
  X(deepep_handle_create) X(deepep_handle_destroy) X(deepep_dispatch) X(deepep_combine) X(deepep_slot_release)     \
  X(deepep_low_latency_dispatch) X(deepep_low_latency_combine) X(deepep_stream_create) X(deepep_stream_destroy)    \
  X(deepep_stream_synchronize) X(deepep_get_status)
FUNCTIONS(LOAD)
#define FIND(name) \
  if (!(name##_ = (__typeof__(name)*)dlsym(library, #name))) { fprintf(stderr, "missing %s\n", #name); exit(1); }

/* All ranks write a message to all ranks over pipes and read theirs: the caller's own means of exchange. */
static int pipes[kRanks][kRanks][2];
static void all_gather(const void* mine, void* all, size_t bytes) {
  for (int to = 0; to < kRanks; to++) {
    if (write(pipes[rank][to][1], mine, bytes) != (ssize_t)bytes) fail("bytes written", -1, (long)bytes);
  }
  for (int from = 0; from < kRanks; from++) {
    for (size_t at = 0; at < bytes;) {
      const ssize_t n = read(pipes[from][rank][0], (char*)all + from * bytes + at, bytes - at);
      if (n <= 0) fail("bytes read", n, (long)bytes);
      at += (size_t)n;
    }
  }
}

static uint64_t buffer, queue;

static uint64_t allocate(uint64_t bytes, const void* data) {
  deepep_alloc_args args = {.size = sizeof args, .kind = DEEPEP_MEMORY_DEVICE, .bytes = bytes};
  must("alloc", deepep_alloc_(buffer, &args, &error));
  /* The cpu backend has FEATURE_HOST_MEMORY: its tensors can be written at once. */
  if (data) expect("host_write", deepep_host_write_(args.address, data, bytes), DEEPEP_OK);
  return args.address;
}

/* Waits for a completion by draining the queue. Others may come first: they are kept for those who ask later. */
static int32_t completed(uint64_t id) {
  enum { kIds = 16, kNotYet = -1 };
  static int32_t statuses[kIds] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};
  for (int i = 0; i < 20000; i++) {
    if (statuses[id] != kNotYet) return statuses[id];
    deepep_completion done[8];
    const int32_t n = deepep_queue_drain_(queue, done, 8);
    for (int32_t k = 0; k < n; k++) {
      if (done[k].id == 0 || done[k].id >= kIds) fail("a completion's id", (long)done[k].id, (long)id);
      statuses[done[k].id] = done[k].status;
    }
    if (n == 0) nanosleep(&(struct timespec){.tv_nsec = 500000}, NULL);
  }
  fail("completion", -1, (long)id);
  return -1;
}

static float bf16(uint16_t bits) {
  const uint32_t word = (uint32_t)bits << 16;
  float value;
  memcpy(&value, &word, sizeof value);
  return value;
}
static uint16_t to_bf16(float value) { /* exact for the small integers used here */
  uint32_t word;
  memcpy(&word, &value, sizeof word);
  return (uint16_t)(word >> 16);
}

static void connect_ranks(void) {
  deepep_queue_create_args q = {.size = sizeof q};
  must("queue_create", deepep_queue_create_(0, &q, &error));
  queue = q.queue;
  deepep_buffer_create_args create = {
      .size = sizeof create, .rank = (uint32_t)rank, .num_ranks = kRanks, .hidden = kHidden, .num_experts = 4,
      .num_topk = kTopk, .max_tokens_per_rank = kTokens, .max_low_latency_tokens_per_rank = kTokens, .max_recv_tokens = 8,
      .timeout_ms = 5000, .queue = queue};
  must("buffer_create", deepep_buffer_create_(0, &create, &error));
  buffer = create.buffer;
  expect("symmetric_bytes", (long)create.symmetric_bytes, (long)(create.control_bytes + 2 * create.slot_bytes));
  deepep_peer_handle mine = {.size = sizeof mine}, all[kRanks];
  must("buffer_export", deepep_buffer_export_(buffer, &mine, &error));
  all_gather(&mine, all, sizeof mine);
  for (int r = 0; r < kRanks; r++) must("buffer_import", deepep_buffer_import_(buffer, &all[r], &error));
  must("buffer_connect", deepep_buffer_connect_(buffer, &error));
  char ready = 1, everybody[kRanks];
  all_gather(&ready, everybody, 1);
}

/* Tokens of both ranks go to their experts and come back twice as large as they have destination ranks. */
static void normal(uint64_t x, uint64_t topk_idx) {
  deepep_handle_create_args handle = {.size = sizeof handle, .num_tokens = kTokens, .num_topk = kTopk};
  must("handle_create", deepep_handle_create_(buffer, &handle, &error));
  deepep_dispatch_args d = {.size = sizeof d, .layout = DEEPEP_LAYOUT_RANK, .handle = handle.handle, .slot = -1,
                            .expert_alignment = 1, .num_tokens = kTokens, .num_topk = kTopk, .topk_idx_bytes = 4,
                            .topk_idx = topk_idx, .x = x, .x_stride = 2 * kHidden, .row_bytes = 2 * kHidden,
                            .counts_id = 1, .done_id = 2};
  must("dispatch", deepep_dispatch_(buffer, &d, &error));
  expect("status of the counts", completed(1), DEEPEP_OK);
  int32_t counts[2 + 2 + kRanks];
  deepep_host_read_(d.host_counts, counts, sizeof counts);
  /* Rank 0 gets token 0 of both ranks. Rank 1 gets all four tokens: its experts 2 (rank 0's and 1's token 0, rank 1's
   * token 1) and 3 (token 1 of rank 0, twice, and of rank 1). */
  expect("tokens received", counts[0], rank == 0 ? 2 : 4);
  expect("entries of the first local expert", counts[2], rank == 0 ? 2 : 3);
  expect("entries of the second local expert", counts[3], rank == 0 ? 0 : 3);
  expect("tokens from rank 1", counts[5], rank == 0 ? 1 : 2);
  expect("status of the dispatch", completed(2), DEEPEP_OK);
  uint16_t rows[4 * kHidden];
  deepep_host_read_(d.recv_x, rows, (uint64_t)counts[0] * 2 * kHidden);
  const float want[2][4] = {{1, 3}, {1, 2, 3, 4}};
  for (int i = 0; i < counts[0]; i++) expect("a received row", (long)bf16(rows[i * kHidden + 7]), (long)want[rank][i]);

  const uint64_t out = allocate(kTokens * 2 * kHidden, NULL);
  deepep_combine_args c = {.size = sizeof c, .hidden = kHidden, .handle = handle.handle, .slot = d.slot, .x = d.recv_x,
                           .x_stride = 2 * kHidden, .out = out, .done_id = 3};
  must("combine", deepep_combine_(buffer, &c, &error));
  expect("status of the combine", completed(3), DEEPEP_OK);
  uint16_t result[kTokens * kHidden];
  deepep_host_read_(out, result, sizeof result);
  expect("token 0, on two ranks", (long)bf16(result[0]), 2 * (1 + 2 * rank));
  expect("token 1, on one rank", (long)bf16(result[kHidden]), 2 + 2 * rank);

  deepep_buffer_stats stats = {.size = sizeof stats};
  must("buffer_get_stats", deepep_buffer_get_stats_(buffer, &stats, &error));
  expect("collective calls", (long)stats.epoch, 2);
  expect("dispatches and combines", (long)(10 * stats.num_dispatches + stats.num_combines), 11);
  expect("rows sent", (long)stats.rows_sent, 3);
  expect("bytes sent", (long)stats.bytes_sent, 3 * 2 * kHidden);
  expect("rows pulled", (long)stats.rows_pulled, 3);
  int64_t wait_ns[2][kRanks];
  deepep_host_read_(stats.wait_ns, wait_ns, sizeof wait_ns);
  expect("waits for oneself", wait_ns[0][rank] + wait_ns[1][rank], 0);

  deepep_slot_release_args release = {.size = sizeof release, .slot = d.slot};
  must("slot_release", deepep_slot_release_(buffer, &release, &error));
  must("handle_destroy", deepep_handle_destroy_(handle.handle, &error));
  deepep_alloc_args gone = {.size = sizeof gone, .kind = DEEPEP_MEMORY_DEVICE, .bytes = 1, .address = out};
  must("free", deepep_free_(buffer, &gone, &error));
}

/* The same tokens as bf16 rows per (token, expert); combine weighs entry 0 by 1 and entry 1 by 0.5. */
static void low_latency(uint64_t x, uint64_t topk_idx) {
  deepep_stream_create_args stream = {.size = sizeof stream};
  must("stream_create", deepep_stream_create_(buffer, &stream, &error));
  deepep_low_latency_dispatch_args d = {.size = sizeof d, .slot = -1, .num_tokens = kTokens, .num_topk = kTopk,
                                        .topk_idx_bytes = 4, .topk_idx = topk_idx, .x = x, .x_stride = 2 * kHidden,
                                        .row_bytes = 2 * kHidden, .stream = stream.stream};
  must("low_latency_dispatch", deepep_low_latency_dispatch_(buffer, &d, &error));
  const float weights[kTokens * kTopk] = {1, 0.5f, 1, 0.5f};
  const uint64_t topk_weights = allocate(sizeof weights, weights), out = allocate(kTokens * 2 * kHidden, NULL);
  deepep_low_latency_combine_args c = {.size = sizeof c, .slot = d.slot, .num_tokens = kTokens, .num_topk = kTopk,
                                       .topk_idx_bytes = 4, .topk_idx = topk_idx, .topk_weights = topk_weights,
                                       .x = d.recv_x, .out = out, .stream = stream.stream, .done_id = 4};
  must("low_latency_combine", deepep_low_latency_combine_(buffer, &c, &error));
  const deepep_stream_sync_args sync = {.size = sizeof sync, .timeout_ms = 10000};
  must("stream_synchronize", deepep_stream_synchronize_(stream.stream, &sync, &error));
  expect("status of the low-latency combine", completed(4), DEEPEP_OK);
  int32_t count[2];
  deepep_host_read_(d.recv_count, count, sizeof count);
  expect("rows of the first local expert", count[0], rank == 0 ? 2 : 3);
  uint16_t result[kTokens * kHidden];
  deepep_host_read_(out, result, sizeof result);
  for (int t = 0; t < kTokens; t++) {
    expect("twice a weighted token", (long)(2 * bf16(result[t * kHidden])), 3 * (1 + 2 * rank + t));
  }
  must("stream_destroy", deepep_stream_destroy_(stream.stream, &error));
}

/* An expert index that does not exist: the rank that gave it and the other hear it in their own words. */
static void refusal(uint64_t x) {
  const int32_t bad[kTokens * kTopk] = {0, rank == 0 ? 4 : 1, 2, 3};
  const uint64_t topk_idx = allocate(sizeof bad, bad);
  deepep_handle_create_args handle = {.size = sizeof handle, .num_tokens = kTokens, .num_topk = kTopk};
  must("handle_create", deepep_handle_create_(buffer, &handle, &error));
  deepep_dispatch_args d = {.size = sizeof d, .handle = handle.handle, .slot = -1, .expert_alignment = 1,
                            .num_tokens = kTokens, .num_topk = kTopk, .topk_idx_bytes = 4, .topk_idx = topk_idx, .x = x,
                            .x_stride = 2 * kHidden, .row_bytes = 2 * kHidden, .counts_id = 5, .done_id = 6};
  must("dispatch", deepep_dispatch_(buffer, &d, &error));
  const int32_t want = rank == 0 ? DEEPEP_ERROR_INVALID_ARGUMENT : DEEPEP_ERROR_ABORTED;
  expect("status of the refused call", completed(5), want);
  const deepep_status_args ask = {.size = sizeof ask, .id = 5};
  expect("the record's code", deepep_get_status_(buffer, &ask, &error), want);
  if (rank == 1) expect("the rank to blame", error.peer, 0);
  if (!strstr(error.message, rank == 0 ? "4" : "rank 0")) {
    fprintf(stderr, "rank %d: the message is: %s\n", rank, error.message);
    exit(1);
  }
  deepep_dispatch_args short_args = {.size = 8};
  expect("a struct of another size", deepep_dispatch_(buffer, &short_args, &error), DEEPEP_ERROR_INVALID_ARGUMENT);
}

static void run_rank(const char* path) {
  library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    fprintf(stderr, "%s\n", dlerror());
    exit(1);
  }
  FUNCTIONS(FIND)
  expect("abi_version", deepep_abi_version_(), DEEPEP_ABI_VERSION);
  connect_ranks();
  uint16_t rows[kTokens * kHidden];
  for (int i = 0; i < kTokens * kHidden; i++) rows[i] = to_bf16((float)(1 + 2 * rank + i / kHidden));
  const int32_t routes[kTokens * kTopk] = {0, 2, 3, 3 - rank};
  const uint64_t x = allocate(sizeof rows, rows), topk_idx = allocate(sizeof routes, routes);
  normal(x, topk_idx);
  low_latency(x, topk_idx);
  refusal(x);
  char ready = 1, everybody[kRanks];
  all_gather(&ready, everybody, 1);
  expect("a queue in use", deepep_queue_destroy_(queue, &error), DEEPEP_ERROR_INVALID_ARGUMENT);
  must("buffer_destroy", deepep_buffer_destroy_(buffer, &error));
  expect("use after destroy", deepep_buffer_destroy_(buffer, &error), DEEPEP_ERROR_CLOSED);
  must("queue_destroy", deepep_queue_destroy_(queue, &error));
}

int main(int argc, char** argv) {
  if (argc != 2) return fprintf(stderr, "usage: %s LIBRARY\n", argv[0]), 2;
  for (int from = 0; from < kRanks; from++) {
    for (int to = 0; to < kRanks; to++) {
      if (pipe(pipes[from][to])) return perror("pipe"), 1;
    }
  }
  pid_t children[kRanks];
  for (rank = 0; rank < kRanks; rank++) {
    children[rank] = fork();
    if (children[rank] == 0) {
      alarm(60);
      run_rank(argv[1]);
      return 0;
    }
  }
  int failed = 0;
  for (int r = 0; r < kRanks; r++) {
    int status = 0;
    waitpid(children[r], &status, 0);
    if (status != 0) failed = 1;
  }
  if (!failed) puts("ok");
  return failed;
}
