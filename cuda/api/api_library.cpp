// The C ABI, part 1: the library itself, host memory and completion queues.
//
// In: calls of any thread. Out: facts about this machine, copies, queues. Documentation is in deepep.h.

#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/sysinfo.h>

#include "border.hpp"
#include "queue.hpp"

using namespace deepep;

namespace {

// The text after "<key>...: " in a file of /proc; false when there is none.
bool proc_value(const char* path, const char* key, char* out, size_t capacity) {
  FILE* const file = fopen(path, "re");
  if (!file) return false;
  char line[512];
  bool found = false;
  while (!found && fgets(line, sizeof line, file)) {
    const char* const colon = strchr(line, ':');
    if (strncmp(line, key, strlen(key)) != 0 || !colon) continue;
    const char* const text = colon + 1 + strspn(colon + 1, " \t");
    snprintf(out, capacity, "%.*s", static_cast<int>(strcspn(text, "\n")), text);
    found = true;
  }
  fclose(file);
  return found;
}

int32_t num_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  const int count = sched_getaffinity(0, sizeof set, &set) == 0 ? CPU_COUNT(&set) : get_nprocs();
  return count > 0 ? count : 1;
}

void fill_capabilities(deepep_capabilities& out) {
  out.abi_version = DEEPEP_ABI_VERSION;
  out.backend = DEEPEP_BACKEND_CPU;
  out.num_devices = 1;
  out.features = DEEPEP_FEATURE_NORMAL | DEEPEP_FEATURE_LOW_LATENCY | DEEPEP_FEATURE_PROCESSES | DEEPEP_FEATURE_HOST_MEMORY |
                 DEEPEP_FEATURE_INJECT;
  out.max_ranks = DEEPEP_MAX_RANKS;
  out.max_topk = DEEPEP_MAX_TOPK;
  out.max_slots = DEEPEP_MAX_SLOTS;
  out.num_sms = num_cores();
  out.compute_capability = 0;
  out.driver_version = 0;
  out.total_bytes = out.free_bytes = 0;
  struct sysinfo info = {};
  if (sysinfo(&info) == 0) {
    out.total_bytes = uint64_t{info.totalram} * info.mem_unit;
    out.free_bytes = uint64_t{info.freeram} * info.mem_unit;
  }
  // What the kernel could free counts as free.
  char text[128];
  unsigned long long kilobytes = 0;
  if (proc_value("/proc/meminfo", "MemAvailable", text, sizeof text) && sscanf(text, "%llu", &kilobytes) == 1) {
    out.free_bytes = kilobytes * 1024;
  }
  memset(out.name, 0, sizeof out.name);
  if (!proc_value("/proc/cpuinfo", "model name", out.name, sizeof out.name)) snprintf(out.name, sizeof out.name, "CPU");
}

// Copies `bytes`; 0 of them are nothing, from anywhere but address 0.
int32_t copy_host(uint64_t address, void* dst, const void* src, uint64_t bytes) {
  if (address == 0) return DEEPEP_ERROR_INVALID_ARGUMENT;
  if (bytes == 0) return DEEPEP_OK;
  if (!dst || !src) return DEEPEP_ERROR_INVALID_ARGUMENT;
  memcpy(dst, src, bytes);
  return DEEPEP_OK;
}

}  // namespace

extern "C" {

uint32_t deepep_abi_version(void) { return DEEPEP_ABI_VERSION; }

int32_t deepep_get_capabilities(uint64_t device, deepep_capabilities* args, deepep_error* error) {
  return cross("read the capabilities", DEEPEP_OP_NONE, error, [&](Call&) {
    if (device != 0) {
      reject(DEEPEP_ERROR_INVALID_ARGUMENT, "device is %llu, the cpu backend has only device 0",
             static_cast<unsigned long long>(device));
    }
    fill_capabilities(check(args));
  });
}

int32_t deepep_host_read(uint64_t address, void* dst, uint64_t bytes) {
  return copy_host(address, dst, reinterpret_cast<const void*>(address), bytes);
}

int32_t deepep_host_write(uint64_t address, const void* src, uint64_t bytes) {
  return copy_host(address, reinterpret_cast<void*>(address), src, bytes);
}

int32_t deepep_queue_create(uint64_t, deepep_queue_create_args* args, deepep_error* error) {
  return cross("create a queue", DEEPEP_OP_CREATE, error, [&](Call&) { check(args).queue = queue_create(); });
}

int32_t deepep_queue_drain(uint64_t queue, void* out, uint32_t capacity) {
  return queue_drain(queue, static_cast<deepep_completion*>(out), capacity);
}

int32_t deepep_queue_wake(uint64_t queue, const deepep_queue_wake_args* args, deepep_error* error) {
  return cross("set up the wake-up of a queue", DEEPEP_OP_NONE, error, [&](Call&) {
    check(args);
    queue_wake(queue, args->action, args->callback);
  });
}

int32_t deepep_queue_destroy(uint64_t queue, deepep_error* error) {
  return cross("destroy a queue", DEEPEP_OP_NONE, error, [&](Call&) { queue_destroy(queue); });
}

}  // extern "C"
