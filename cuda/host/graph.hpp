// CUDA graphs of a buffer's calls.
//
// In: a stream between deepep_graph_begin and deepep_graph_end; the communication stream joins its capture with the first call.
// Out: a graph whose replays run in the order of the buffer's other operations. Epochs, masks and failures are in device
// memory, so a replay is a call like any other; what the captured calls need (handles, events from before) lives as long as the
// graph.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <vector>

namespace deepep {

class Buffer;

struct Graph {
  Graph() = default;
  ~Graph();  // No replay is under way: each holds the graph.
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  std::weak_ptr<Buffer> buffer;
  cudaStream_t stream = nullptr;  // that is captured
  cudaGraphExec_t exec = nullptr;
  uint64_t num_collective = 0;  // collective calls in it
  bool needs_peers = false;     // some call in it does
  std::vector<std::shared_ptr<void>> needs;
};

// Ends a capture whose buffer is destroyed: its graph is dropped.
void abandon_capture(Graph& graph) noexcept;

}  // namespace deepep
