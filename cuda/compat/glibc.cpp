// Lets a library that is linked on a new system run on glibc 2.28 and later (RHEL 8, Ubuntu 20.04).
//
// In: calls from this library, libstdc++.a and libgcc_eh.a to functions whose default version in the linking system's glibc is
// newer. Out: the same calls to the older version that every glibc has, or the same work without it. The definitions are
// hidden, so that they serve this library only. scripts/build.ts links this into every library and then checks the versions.

#include <dlfcn.h>
#include <link.h>
#include <sys/random.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>

#include "older.hpp"

#if defined(__x86_64__) && defined(__GLIBC__)

#pragma GCC visibility push(hidden)
extern "C" {

DEEPEP_OLDER(pthread_create, "2.2.5");
DEEPEP_OLDER(pthread_join, "2.2.5");
DEEPEP_OLDER(pthread_detach, "2.2.5");
DEEPEP_OLDER(pthread_once, "2.2.5");
DEEPEP_OLDER(pthread_key_create, "2.2.5");
DEEPEP_OLDER(__pthread_key_create, "2.2.5");
DEEPEP_OLDER(pthread_key_delete, "2.2.5");
DEEPEP_OLDER(pthread_getspecific, "2.2.5");
DEEPEP_OLDER(pthread_setspecific, "2.2.5");
DEEPEP_OLDER(pthread_mutex_trylock, "2.2.5");
DEEPEP_OLDER(pthread_sigmask, "2.2.5");
DEEPEP_OLDER(pthread_setname_np, "2.12");

// glibc 2.32. 0 = there may be threads, which is always right.
char __libc_single_threaded = 0;

// glibc 2.33. The kernel's struct stat is glibc's on this machine.
int fstat(int file, struct stat* out) noexcept { return static_cast<int>(syscall(SYS_fstat, file, out)); }

// glibc 2.36. std::random_device may ask for it.
std::uint32_t arc4random() noexcept {
  std::uint32_t value = 0;
  while (getrandom(&value, sizeof value, 0) != static_cast<ssize_t>(sizeof value)) {
  }
  return value;
}

// glibc 2.30. The deadline is moved to the clock that condition variables have had before. Setting that clock moves the
// deadline too; the waits of this library are short and repeated.
__attribute__((visibility("default"))) int pthread_cond_timedwait(void* condition, void* mutex, const struct timespec* deadline);
int pthread_cond_clockwait(void* condition, void* mutex, int clock, const struct timespec* deadline) {
  struct timespec then = *deadline;
  if (clock != CLOCK_REALTIME) {
    struct timespec from, to;
    if (clock_gettime(clock, &from) != 0 || clock_gettime(CLOCK_REALTIME, &to) != 0) return EINVAL;
    then.tv_sec += to.tv_sec - from.tv_sec;
    then.tv_nsec += to.tv_nsec - from.tv_nsec;
    if (then.tv_nsec < 0) then.tv_sec -= 1, then.tv_nsec += 1'000'000'000;
    if (then.tv_nsec >= 1'000'000'000) then.tv_sec += 1, then.tv_nsec -= 1'000'000'000;
  }
  return pthread_cond_timedwait(condition, mutex, &then);
}

#ifdef DLFO_STRUCT_HAS_EH_DBASE
// glibc 2.35. The unwinder asks where the unwind table of an address is.
static int find_object(struct dl_phdr_info* info, size_t, void* data) {
  auto& out = *static_cast<struct dl_find_object*>(data);
  const auto address = reinterpret_cast<std::uintptr_t>(out.dlfo_map_start);
  const ElfW(Phdr)* table = nullptr;
  std::uintptr_t begin = UINTPTR_MAX, end = 0;
  bool inside = false;
  for (int i = 0; i < info->dlpi_phnum; ++i) {
    const ElfW(Phdr)& header = info->dlpi_phdr[i];
    if (header.p_type == PT_GNU_EH_FRAME) table = &header;
    if (header.p_type != PT_LOAD) continue;
    const std::uintptr_t from = info->dlpi_addr + header.p_vaddr, to = from + header.p_memsz;
    inside |= from <= address && address < to;
    if (from < begin) begin = from;
    if (to > end) end = to;
  }
  if (!inside || !table) return 0;
  out.dlfo_map_start = reinterpret_cast<void*>(begin);
  out.dlfo_map_end = reinterpret_cast<void*>(end);
  out.dlfo_eh_frame = reinterpret_cast<void*>(info->dlpi_addr + table->p_vaddr);
  return 1;
}

int _dl_find_object(void* address, struct dl_find_object* out) noexcept {
  *out = {};
  out->dlfo_map_start = address;  // what find_object looks for
  return dl_iterate_phdr(find_object, out) == 1 ? 0 : -1;
}
#endif

}  // extern "C"
#pragma GCC visibility pop

#endif
