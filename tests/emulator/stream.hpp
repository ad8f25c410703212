// Streams, events, captures and graphs, as the runtime's functions see them.
//
// In: work. Out: each stream's work in order, on whichever thread of the operating system serves the stream at the moment. A
// capture keeps the work as the nodes of a graph instead. Callers: stream.cpp, graph.cpp.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

// Work of a graph, or an event that it waits for.
struct CUgraphNode_st {
  std::function<void()> work;
  cudaEvent_t wait = nullptr;
  std::vector<CUgraphNode_st*> before;
  std::vector<CUgraphNode_st*> after;
  size_t index = 0;
};

namespace emulator {

using Node = CUgraphNode_st;
using Nodes = std::vector<Node*>;

// A point in a stream. It is reached once.
struct Point {
  std::atomic<uint32_t> reached{0};
  int64_t ns = 0;  // when it was

  void reach();
  void wait() const { reached.wait(0); }
};

struct Graph {
  std::vector<std::unique_ptr<Node>> nodes;
};

}  // namespace emulator

struct CUgraph_st {
  std::shared_ptr<emulator::Graph> graph = std::make_shared<emulator::Graph>();
};

namespace emulator {

struct Capture {
  unsigned long long id = 0;
  cudaStream_t origin = nullptr;
  bool failed = false;
  bool ended = false;
  CUgraph_st made;

  Node* add(const Nodes& before);
};

}  // namespace emulator

struct CUevent_st {
  bool timed = false;
  std::shared_ptr<emulator::Point> latest;
  // Recorded in a capture: what comes before it.
  std::shared_ptr<emulator::Capture> capture;
  emulator::Nodes nodes;
};

struct CUstream_st : std::enable_shared_from_this<CUstream_st> {
  unsigned long long id = 0;
  std::shared_ptr<emulator::Capture> capture;
  emulator::Nodes ends;  // of what was captured on it

  void push(std::function<void()> work);
  bool idle();
  std::shared_ptr<emulator::Point> mark();  // its present end

 private:
  void serve();

  std::mutex mutex_;
  std::deque<std::function<void()>> work_;
  bool served_ = false;
};

namespace emulator {

// Of everything but the streams' own work.
std::mutex& runtime_mutex();

// With the runtime locked. nullptr for what is no stream.
std::shared_ptr<CUstream_st> find_stream(cudaStream_t handle);
// All of a capture.
std::vector<std::shared_ptr<CUstream_st>> streams_of(const Capture& capture);

}  // namespace emulator
