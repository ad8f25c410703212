// The table behind every 64-bit handle of the ABI (buffer, stream, event, routing handle, graph).
//
// In: an object and its kind. Out: a number that names it until it is retired. A handle holds kind, generation and index, so
// one that was retired answers CLOSED and one that never existed or is of another kind answers INVALID_ARGUMENT; a call in
// flight keeps the object alive through the shared_ptr that it was given. In a process that was forked off, the objects of
// the other answer INVALID_ARGUMENT. Queues have a table of their own (queue.hpp).
#pragma once

#include <cstdint>
#include <memory>

namespace deepep {

enum class Kind : uint32_t { buffer = 1, stream = 2, event = 3, queue = 4, handle = 5, graph = 6 };
constexpr Kind kLastKind = Kind::graph;

// "buffer", "stream", …
const char* kind_name(Kind kind);

// Puts an object into the table. The result is never 0.
uint64_t publish(Kind kind, std::shared_ptr<void> object);

// The object. Rejects with INVALID_ARGUMENT or CLOSED; `name` is the argument's name in the message.
std::shared_ptr<void> find_object(Kind kind, uint64_t id, const char* name);

// Takes the object out of the table: from now on its handle answers CLOSED. Exactly one of several callers gets it, the
// others are rejected with CLOSED.
std::shared_ptr<void> retire(Kind kind, uint64_t id, const char* name);

// As retire, but answers nullptr where that rejects: for owners that clean up after their users.
std::shared_ptr<void> retire_if_present(Kind kind, uint64_t id);

template <class T>
std::shared_ptr<T> find(Kind kind, uint64_t id, const char* name) {
  return std::static_pointer_cast<T>(find_object(kind, id, name));
}

}  // namespace deepep
