// Symmetric memory: see shared_memory.hpp.
//
// The file begins with a page of its own: a header that says whose it is, and the `alive` word that retire() clears. The file
// is sealed against shrinking, so that no peer can make another one's mapping fault.

#include "shared_memory.hpp"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <map>
#include <mutex>

#include "../abi/deepep.h"
#include "../common/failure.hpp"
#include "operations.hpp"

namespace deepep {

struct SharedMemory::Header {
  uint64_t magic;
  uint64_t nonce[2];
  uint64_t bytes;               // of data
  std::atomic<uint32_t> alive;  // 1 until retire(); written by the owner, read by all
};

namespace {

// "deepepN2": N tells the backends apart, which must not import each other's handles, 2 is the layout's version.
uint64_t magic() { return 0x3200706565706564 + (static_cast<uint64_t>(backend()) << 48); }

constexpr uint64_t kHeaderBytes = 4096;
constexpr uint64_t kHugePage = uint64_t{2} << 20;

// What the opaque bytes of a peer handle hold.
struct Handle {
  uint64_t magic;
  uint64_t nonce[2];
  uint64_t bytes;
  uint64_t start_time;
  int32_t pid;
  int32_t fd;
};
static_assert(sizeof(Handle) <= kRegionHandleBytes);

using Nonce = std::array<uint64_t, 2>;

// What this process has created and not dropped, for peers in the same process.
struct Shared {
  std::mutex mutex;
  std::map<Nonce, std::weak_ptr<SharedMemory>> regions;
};

Shared& shared() {
  static Shared* const leaked = new Shared;
  return *leaked;
}

void fill_nonce(uint64_t (&nonce)[2]) {
  if (getrandom(nonce, sizeof nonce, 0) != static_cast<ssize_t>(sizeof nonce)) {
    reject(DEEPEP_ERROR_SYSTEM, "no random bytes (%s)", strerror(errno));
  }
}

// State letter and start time of a process, from /proc/<pid>/stat: the fields after the last ")". False when it is gone.
bool process_stat(int32_t pid, char* state, uint64_t* start_time) {
  char path[64], text[1024];
  snprintf(path, sizeof path, "/proc/%d/stat", pid);
  const int fd = open(path, O_RDONLY | O_CLOEXEC);
  if (fd < 0) return false;
  const ssize_t n = read(fd, text, sizeof text - 1);
  close(fd);
  if (n <= 0) return false;
  text[n] = 0;
  const char* after = strrchr(text, ')');
  unsigned long long start = 0;
  // The state is field 3, the start time field 22.
  if (!after || sscanf(after + 1, " %c %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %*s %llu", state,
                       &start) != 2) {
    return false;
  }
  *start_time = start;
  return true;
}

bool process_alive(int32_t pid, uint64_t start_time) {
  char state = 0;
  uint64_t found = 0;
  return process_stat(pid, &state, &found) && found == start_time && state != 'Z' && state != 'X';
}

int open_pidfd(int32_t pid) {
#ifdef SYS_pidfd_open
  return static_cast<int>(syscall(SYS_pidfd_open, pid, 0));
#else
  (void)pid;
  return -1;
#endif
}

uint8_t* map(int fd, uint64_t bytes) {
  void* const base = mmap(nullptr, kHeaderBytes + bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
  if (base == MAP_FAILED) {
    reject(errno == ENOMEM ? DEEPEP_ERROR_OUT_OF_MEMORY : DEEPEP_ERROR_SYSTEM, "%llu bytes could not be mapped (%s)",
           static_cast<unsigned long long>(bytes), strerror(errno));
  }
  // Only a hint, for systems whose shared memory takes huge pages on request.
  if (bytes >= kHugePage) madvise(base, kHeaderBytes + bytes, MADV_HUGEPAGE);
  return static_cast<uint8_t*>(base);
}

// Opens the file of another process; answers -1 with errno.
int open_of(int32_t pid, int fd) {
  char path[64];
  snprintf(path, sizeof path, "/proc/%d/fd/%d", pid, fd);
  // The number may meanwhile belong to something else: never wait for it, never take it as a terminal.
  return open(path, O_RDWR | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
}

}  // namespace

std::shared_ptr<SharedMemory> SharedMemory::create(uint64_t bytes) {
  std::shared_ptr<SharedMemory> memory(new SharedMemory);
  memory->bytes_ = bytes;
  memory->pid_ = getpid();
  char state = 0;
  process_stat(memory->pid_, &state, &memory->start_time_);
  fill_nonce(memory->nonce_);
  memory->fd_ = memfd_create("deepep", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (memory->fd_ < 0) reject(DEEPEP_ERROR_SYSTEM, "shared memory could not be created (%s)", strerror(errno));
  // The kernel would end the process (SIGXFSZ) rather than answer.
  rlimit limit = {};
  if (getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur != RLIM_INFINITY && limit.rlim_cur < kHeaderBytes + bytes) {
    reject(DEEPEP_ERROR_OUT_OF_MEMORY, "%llu bytes of shared memory are more than the limit of a file's size (ulimit -f), %llu",
           static_cast<unsigned long long>(bytes), static_cast<unsigned long long>(limit.rlim_cur));
  }
  if (ftruncate(memory->fd_, static_cast<off_t>(kHeaderBytes + bytes)) != 0) {
    reject(DEEPEP_ERROR_OUT_OF_MEMORY, "%llu bytes of shared memory could not be had (%s)",
           static_cast<unsigned long long>(bytes), strerror(errno));
  }
  if (fcntl(memory->fd_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    reject(DEEPEP_ERROR_SYSTEM, "shared memory could not be sealed (%s)", strerror(errno));
  }
  memory->base_ = map(memory->fd_, bytes);
  Header* const header = new (memory->base_) Header{};
  header->nonce[0] = memory->nonce_[0];
  header->nonce[1] = memory->nonce_[1];
  header->bytes = bytes;
  header->alive.store(1, std::memory_order_relaxed);
  header->magic = magic();
  Shared& all = shared();
  const std::lock_guard lock(all.mutex);
  all.regions[{memory->nonce_[0], memory->nonce_[1]}] = memory;
  return memory;
}

std::shared_ptr<SharedMemory> SharedMemory::import(const char (&bytes_of_handle)[kRegionHandleBytes], uint64_t bytes,
                                                   uint32_t rank) {
  Handle handle;
  memcpy(&handle, bytes_of_handle, sizeof handle);
  if (handle.magic != magic()) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "the handle of rank %u was not made by this backend, or by another version of it",
           rank);
  }
  if (handle.bytes != bytes) {
    reject(DEEPEP_ERROR_MISMATCH, "rank %u has %llu bytes of symmetric memory, this rank %llu", rank,
           static_cast<unsigned long long>(handle.bytes), static_cast<unsigned long long>(bytes));
  }
  if (handle.pid == getpid()) {
    Shared& all = shared();
    const std::lock_guard lock(all.mutex);
    const auto found = all.regions.find({handle.nonce[0], handle.nonce[1]});
    if (found != all.regions.end()) {
      if (auto memory = found->second.lock()) return memory;
    }
    // Not found: exported by another copy of the library in this process, whose file is reached as another process's is.
  }
  std::shared_ptr<SharedMemory> memory(new SharedMemory);
  memory->bytes_ = bytes;
  memory->pid_ = handle.pid;
  memory->start_time_ = handle.start_time;
  memcpy(memory->nonce_, handle.nonce, sizeof handle.nonce);
  // First the pidfd, then the look at the start time: a process that passes is the one whose end the pidfd will tell.
  memory->pidfd_ = open_pidfd(handle.pid);
  if (!process_alive(handle.pid, handle.start_time)) {
    reject(DEEPEP_ERROR_PEER_LOST,
           "process %d of rank %u has ended, or is not visible here: ranks of one machine must share a PID namespace",
           handle.pid, rank);
  }
  const int fd = open_of(handle.pid, handle.fd);
  // The process lives, but the file is closed, or the number is something else's by now.
  const auto destroyed = [&] {
    reject(DEEPEP_ERROR_PEER_LOST, "the buffer of rank %u in process %d was destroyed", rank, handle.pid);
  };
  if (fd < 0 && (errno == ENOENT || errno == ENXIO)) destroyed();
  if (fd < 0) {
    reject(DEEPEP_ERROR_SYSTEM, "the memory of rank %u in process %d could not be opened (%s): ranks must run as one user",
           rank, handle.pid, strerror(errno));
  }
  struct stat stat = {};
  const bool fits =
      fstat(fd, &stat) == 0 && S_ISREG(stat.st_mode) && static_cast<uint64_t>(stat.st_size) == kHeaderBytes + bytes;
  // Without the seal the file could be cut off under this mapping: a read would then end the process. Ours always has it.
  const int seals = fits ? fcntl(fd, F_GET_SEALS) : 0;
  try {
    if (!fits || seals < 0 || !(seals & F_SEAL_SHRINK)) destroyed();
    memory->base_ = map(fd, bytes);
  } catch (...) {
    close(fd);
    throw;
  }
  close(fd);
  const auto* header = reinterpret_cast<const Header*>(memory->base_);
  if (header->magic != magic() || header->bytes != bytes || memcmp(header->nonce, handle.nonce, sizeof handle.nonce) != 0) {
    destroyed();
  }
  return memory;
}

SharedMemory::~SharedMemory() {
  if (fd_ >= 0) {
    Shared& all = shared();
    {
      const std::lock_guard lock(all.mutex);
      all.regions.erase({nonce_[0], nonce_[1]});
    }
    close(fd_);
  }
  if (base_) munmap(base_, kHeaderBytes + bytes_);
  if (pidfd_ >= 0) close(pidfd_);
}

uint8_t* SharedMemory::data() const { return base_ + kHeaderBytes; }

void SharedMemory::export_to(char (&handle)[kRegionHandleBytes]) const {
  const Handle filled = {magic(), {nonce_[0], nonce_[1]}, bytes_, start_time_, pid_, fd_};
  memset(handle, 0, sizeof handle);
  memcpy(handle, &filled, sizeof filled);
}

void SharedMemory::retire() {
  // Pairs with the acquire in alive(): who sees the owner gone sees all that it wrote.
  reinterpret_cast<Header*>(base_)->alive.store(0, std::memory_order_release);
}

bool SharedMemory::alive() const {
  if (reinterpret_cast<const Header*>(base_)->alive.load(std::memory_order_acquire) == 0) return false;
  if (fd_ >= 0) return true;  // this process
  if (pidfd_ < 0) return process_alive(pid_, start_time_);
  // A pidfd becomes readable when the process ends, before its parent has reaped it.
  pollfd poll_fd = {pidfd_, POLLIN, 0};
  return poll(&poll_fd, 1, 0) <= 0;
}

}  // namespace deepep
