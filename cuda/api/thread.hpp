// Threads of the library: detached, named, deaf to signals.
//
// In: a name and a body. Out: a running thread that owns what its body holds, so a process may exit at any moment. Whoever
// needs the end waits for it by means of its own. Callers: streams, notifiers, the watchdog.
#pragma once

#include <functional>
#include <string>

namespace deepep {

// Starts a detached thread with all signals blocked; `name` is cut to 15 characters. Rejects with SYSTEM.
void start_thread(const std::string& name, std::function<void()> body);

}  // namespace deepep
