/**
 * A library with the ABI's symbols and a working completion queue, for tests of the FFI layer alone.
 *
 * In: what should be wrong with it. Out: the compiled file. `deepep_event_notify(queue, { done_id, stream: µs }, …)` queues
 * a completion from a thread of its own after that many microseconds, with the status of `args.status`; every other call
 * answers UNSUPPORTED.
 */

import { ABI_VERSION, type Argument, functions, type FunctionSpec } from "../../lib/ffi/abi.ts";
import { compile } from "./compile.ts";

const queue = `
#include <pthread.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
#include "cuda/abi/deepep.h"

typedef struct { uint64_t id; int64_t us; int32_t status; } late;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t news = PTHREAD_COND_INITIALIZER;
static deepep_completion entries[4096];
static uint32_t count;
static int armed, stopped;
static pthread_t notifier;
static void (*callback)(uint32_t);

uint32_t deepep_abi_version(void) { return VERSION; }

int32_t deepep_queue_create(uint64_t zero, deepep_queue_create_args* args, deepep_error* error) {
  (void)zero, (void)error;
  args->queue = 1;
  return DEEPEP_OK;
}

int32_t deepep_queue_drain(uint64_t queue, void* out, uint32_t capacity) {
  if (queue != 1) return -DEEPEP_ERROR_INVALID_ARGUMENT;
  pthread_mutex_lock(&mutex);
  uint32_t taken = count < capacity ? count : capacity;
  memcpy(out, entries, taken * sizeof *entries);
  memmove(entries, entries + taken, (count - taken) * sizeof *entries);
  count -= taken;
  pthread_mutex_unlock(&mutex);
  return (int32_t)taken;
}

static void* notify(void* unused) {
  pthread_mutex_lock(&mutex);
  for (;;) {
    while (!stopped && !(armed && count)) pthread_cond_wait(&news, &mutex);
    uint32_t kind = stopped ? 1 : 0;
    armed = 0;
    pthread_mutex_unlock(&mutex);
    callback(kind);
    if (kind) return unused;
    pthread_mutex_lock(&mutex);
  }
}

int32_t deepep_queue_wake(uint64_t queue, const deepep_queue_wake_args* args, deepep_error* error) {
  (void)queue, (void)error;
  pthread_mutex_lock(&mutex);
  if (args->action == DEEPEP_WAKE_START) {
    callback = (void (*)(uint32_t))args->callback;
    stopped = armed = 0;
    pthread_create(&notifier, 0, notify, 0);
  }
  if (args->action == DEEPEP_WAKE_ARM) armed = 1;
  if (args->action == DEEPEP_WAKE_STOP) stopped = 1;
  pthread_cond_broadcast(&news);
  pthread_mutex_unlock(&mutex);
  if (args->action == DEEPEP_WAKE_JOIN) pthread_join(notifier, 0);
  return DEEPEP_OK;
}

static void* push(void* argument) {
  late* l = argument;
  usleep((useconds_t)l->us);
  pthread_mutex_lock(&mutex);
  entries[count++] = (deepep_completion){l->id, l->status, 0};
  pthread_cond_broadcast(&news);
  pthread_mutex_unlock(&mutex);
  free(l);
  return 0;
}

int32_t deepep_event_notify(uint64_t queue, deepep_event_args* args, deepep_error* error) {
  (void)queue, (void)error;
  if (args->size != sizeof *args) return DEEPEP_ERROR_INVALID_ARGUMENT;
  late* l = malloc(sizeof *l);
  *l = (late){args->done_id, (int64_t)args->stream, args->status};
  pthread_t thread;
  pthread_create(&thread, 0, push, l);
  pthread_detach(thread);
  return DEEPEP_OK;
}

// Writes back what it was called with, so that a test sees every argument arrive.
int32_t deepep_mask(uint64_t buffer, const deepep_mask_args* args, deepep_error* error) {
  error->code = DEEPEP_ERROR_INVALID_ARGUMENT;
  error->rank = (int32_t)args->rank;
  error->epoch = buffer;
  error->expected = -(int64_t)args->masked;
  strcpy(error->message, "größer");
  return error->code;
}

int32_t deepep_host_read(uint64_t address, void* dst, uint64_t bytes) {
  memset(dst, (int)(address & 255), bytes);
  return DEEPEP_OK;
}
`;

const real = ["deepep_abi_version", "deepep_queue_create", "deepep_queue_drain", "deepep_queue_wake"]
  .concat(["deepep_event_notify", "deepep_mask", "deepep_host_read"]);

/** The header's prototypes are in force, so that a stub of another type would not compile. */
function stub(name: string, spec: FunctionSpec): string {
  return `__typeof__(${name}) ${name} __attribute__((alias("unsupported_${spec.args.length}")));`;
}

const stubs = [0, 1, 2, 3].map((n) => `int32_t unsupported_${n}() { return DEEPEP_ERROR_UNSUPPORTED; }`).join("\n");

/** Compiles the library, of another ABI version or without one of the symbols if asked. */
export function fakeLibrary(
  { version = ABI_VERSION, without = "" }: { version?: number; without?: string } = {},
): string {
  const aliases = Object.entries<FunctionSpec & { args: readonly Argument[] }>(functions)
    .filter(([name]) => !real.includes(name) && name !== without).map(([name, spec]) => stub(name, spec));
  const flags = ["-shared", "-fPIC", "-Wno-attribute-alias", "-Wno-strict-prototypes", "-Wl,-z,nodelete"];
  return compile([queue, stubs, ...aliases].join("\n"), "libfake.so", [`-DVERSION=${version}`, ...flags]);
}
