// What the CPU backend can do, and what it does not have.
//
// In: calls of the API layer. Out: facts about this machine; UNSUPPORTED, with words, for what only a GPU has.

#include <sched.h>
#include <stdio.h>
#include <string.h>
#include <sys/sysinfo.h>

#include "../api/operations.hpp"

namespace deepep {
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

}  // namespace

void fill_capabilities(uint64_t, deepep_capabilities& out) {
  out.abi_version = DEEPEP_ABI_VERSION;
  out.backend = backend();
  out.num_devices = 1;
  out.features = DEEPEP_FEATURE_NORMAL | DEEPEP_FEATURE_LOW_LATENCY | DEEPEP_FEATURE_PROCESSES | DEEPEP_FEATURE_HOST_MEMORY |
                 DEEPEP_FEATURE_INJECT;
  out.max_ranks = DEEPEP_MAX_RANKS;
  out.max_topk = DEEPEP_MAX_TOPK;
  out.max_slots = DEEPEP_MAX_SLOTS;
  out.num_sms = num_cores();
  out.compute_capability = 0;
  out.driver_version = 0;
  out.mps = 0;
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

int32_t backend() { return DEEPEP_BACKEND_CPU; }

void check_device(uint64_t device) {
  if (device == 0) return;
  reject(DEEPEP_ERROR_INVALID_ARGUMENT, "device is %lld, the cpu backend has only device 0", static_cast<long long>(device));
}

void get_peer_access(uint64_t, deepep_peer_access_args&) {
  reject(DEEPEP_ERROR_UNSUPPORTED, "the cpu backend has one device only: ranks meet in shared memory");
}

void measure_copy(uint64_t, deepep_measure_copy_args&) {
  reject(DEEPEP_ERROR_UNSUPPORTED, "the cpu backend has no copy kernel");
}

void plan_operation(Buffer*, deepep_plan_args&) {
  reject(DEEPEP_ERROR_UNSUPPORTED, "the cpu backend launches no kernels");
}

void graph_begin(Buffer&, deepep_graph_args&) { reject(DEEPEP_ERROR_UNSUPPORTED, "the cpu backend has no graphs"); }

void graph_end(Buffer&, deepep_graph_args&) { reject(DEEPEP_ERROR_UNSUPPORTED, "the cpu backend has no graphs"); }

void graph_launch(uint64_t, deepep_graph_args&) { reject(DEEPEP_ERROR_UNSUPPORTED, "the cpu backend has no graphs"); }

void graph_destroy(uint64_t) { reject(DEEPEP_ERROR_UNSUPPORTED, "the cpu backend has no graphs"); }

}  // namespace deepep
