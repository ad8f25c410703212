// The table behind the handles: see registry.hpp.
//
// One mutex, held for a few nanoseconds. The table is never freed: threads of a process that exits may still look into it.

#include "registry.hpp"

#include <pthread.h>

#include <atomic>
#include <mutex>
#include <utility>
#include <vector>

#include "../abi/deepep.h"
#include "../common/failure.hpp"

namespace deepep {
namespace {

// A handle: kind << 56 | generation << 24 | index, generation from 1.
constexpr uint32_t kIndexBits = 24;
constexpr uint64_t kIndexMask = (uint64_t{1} << kIndexBits) - 1;

struct Entry {
  uint32_t kind = 0;        // 0 = free
  uint32_t generation = 0;  // of the present or the last object
  uint32_t process = 0;     // num_forks() of the process that made the object, and has its threads
  std::shared_ptr<void> object;
};

struct Table {
  std::mutex mutex;
  std::vector<Entry> entries;
  std::vector<uint32_t> free;
};

Table& table() {
  static Table* const leaked = new Table;
  return *leaked;
}

// How many forks lie between the process that made the first object and this one: what tells a process from its parent without
// a system call each time. It does not count a bare clone().
std::atomic<uint32_t> forks{0};

uint32_t num_forks() {
  static const int counts = pthread_atfork(nullptr, nullptr, [] { forks.fetch_add(1, std::memory_order_relaxed); });
  return counts == 0 ? forks.load(std::memory_order_relaxed) : 0;
}

uint64_t make_id(Kind kind, uint32_t generation, uint64_t index) {
  return static_cast<uint64_t>(kind) << 56 | uint64_t{generation} << kIndexBits | index;
}

enum class Found { yes, never_existed, destroyed, other_kind, other_process };

// Call with the table locked.
Found look_up(Table& all, Kind kind, uint64_t id, Entry** entry) {
  const uint64_t index = id & kIndexMask;
  const auto generation = static_cast<uint32_t>(id >> kIndexBits);
  if (index >= all.entries.size() || generation == 0) return Found::never_existed;
  *entry = &all.entries[index];
  if (generation > (*entry)->generation) return Found::never_existed;
  const uint64_t found_kind = id >> 56;
  if (found_kind < 1 || found_kind > static_cast<uint64_t>(kLastKind)) return Found::never_existed;
  if (found_kind != static_cast<uint64_t>(kind)) return Found::other_kind;
  if (generation < (*entry)->generation || (*entry)->kind == 0) return Found::destroyed;
  if ((*entry)->kind != found_kind) return Found::never_existed;
  // A fork copies the table, but no thread: work enqueued there would never run, and a destroy would wait for it.
  return (*entry)->process == num_forks() ? Found::yes : Found::other_process;
}

[[noreturn]] void reject_id(Found found, Kind kind, uint64_t id, const char* name) {
  const auto shown = static_cast<unsigned long long>(id);
  if (found == Found::destroyed) reject(DEEPEP_ERROR_CLOSED, "%s 0x%llx was destroyed", name, shown);
  if (found == Found::other_process) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "%s 0x%llx belongs to the process that has forked this one", name, shown);
  }
  if (found == Found::other_kind) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "%s 0x%llx is the handle of something else (%s)", name, shown,
           kind_name(static_cast<Kind>(id >> 56)));
  }
  if (id == 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "%s is 0", name);
  reject(DEEPEP_ERROR_INVALID_ARGUMENT, "%s 0x%llx is no %s of this library", name, shown, kind_name(kind));
}

// The 24-bit index is shared by the kinds, so a generation lasts for 2^32 objects in one place: no handle comes twice.
std::shared_ptr<void> take_out(Table& all, uint64_t id, Entry& entry) {
  entry.kind = 0;
  all.free.push_back(static_cast<uint32_t>(id & kIndexMask));
  return std::move(entry.object);
}

}  // namespace

const char* kind_name(Kind kind) {
  switch (kind) {
    case Kind::buffer: return "buffer";
    case Kind::stream: return "stream";
    case Kind::event: return "event";
    case Kind::queue: return "queue";
    case Kind::handle: return "handle";
    case Kind::graph: return "graph";
  }
  return "object";
}

uint64_t publish(Kind kind, std::shared_ptr<void> object) {
  Table& all = table();
  const std::lock_guard lock(all.mutex);
  if (all.free.empty()) {
    if (all.entries.size() > kIndexMask) reject(DEEPEP_ERROR_OUT_OF_MEMORY, "%zu objects exist already", all.entries.size());
    // Room in the free list for every entry, so that taking an object out never allocates.
    all.free.reserve(all.entries.size() + 1);
    all.entries.emplace_back();
    all.free.push_back(static_cast<uint32_t>(all.entries.size() - 1));
  }
  const uint32_t index = all.free.back();
  all.free.pop_back();
  Entry& entry = all.entries[index];
  entry.kind = static_cast<uint32_t>(kind);
  entry.generation += 1;
  entry.process = num_forks();
  entry.object = std::move(object);
  return make_id(kind, entry.generation, index);
}

std::shared_ptr<void> find_object(Kind kind, uint64_t id, const char* name) {
  Table& all = table();
  Found found;
  {
    const std::lock_guard lock(all.mutex);
    Entry* entry = nullptr;
    found = look_up(all, kind, id, &entry);
    if (found == Found::yes) return entry->object;
  }
  reject_id(found, kind, id, name);
}

std::shared_ptr<void> retire(Kind kind, uint64_t id, const char* name) {
  Table& all = table();
  Found found;
  {
    const std::lock_guard lock(all.mutex);
    Entry* entry = nullptr;
    found = look_up(all, kind, id, &entry);
    if (found == Found::yes) return take_out(all, id, *entry);
  }
  reject_id(found, kind, id, name);
}

std::shared_ptr<void> retire_if_present(Kind kind, uint64_t id) {
  Table& all = table();
  const std::lock_guard lock(all.mutex);
  Entry* entry = nullptr;
  if (look_up(all, kind, id, &entry) != Found::yes) return nullptr;
  return take_out(all, id, *entry);
}

}  // namespace deepep
