// Threads of the operating system for blocks and streams.
//
// In: tasks, each of which may wait for others. Out: all of them run at once. Threads are kept for the next tasks, and never
// end. Callers: grid.cpp, stream.cpp, graph.cpp.
#pragma once

#include <functional>

namespace emulator {

void run_elsewhere(std::function<void()> task);

}  // namespace emulator
