// Captures and graphs: see stream.hpp.

#include <algorithm>
#include <set>

#include "runtime.hpp"
#include "stream.hpp"
#include "threads.hpp"

struct CUgraphExec_st {
  std::shared_ptr<emulator::Graph> graph;
  // Launches of one graph run one after another.
  std::shared_ptr<std::mutex> turn = std::make_shared<std::mutex>();
};

namespace emulator {
namespace {

// A launch. Nodes that do not wait for each other run at once.
struct Run {
  std::shared_ptr<Graph> graph;
  std::vector<std::shared_ptr<Point>> points;  // that nodes wait for
  std::vector<std::atomic<size_t>> missing;    // nodes before each
  std::atomic<size_t> left;
  Point end;

  explicit Run(std::shared_ptr<Graph> launched)
      : graph(std::move(launched)), points(graph->nodes.size()), missing(graph->nodes.size()), left(graph->nodes.size()) {}
};

void run_from(const std::shared_ptr<Run>& run, Node* node) {
  while (node) {
    const auto& point = run->points[node->index];
    if (node->work) node->work();
    if (node->wait && point) point->wait();
    Node* next = nullptr;
    for (Node* const after : node->after) {
      if (run->missing[after->index].fetch_sub(1) != 1) continue;
      if (next)
        run_elsewhere([run, after] { run_from(run, after); });
      else
        next = after;
    }
    if (run->left.fetch_sub(1) == 1) run->end.reach();
    node = next;
  }
}

void run_graph(const std::shared_ptr<Run>& run) {
  Nodes first;
  for (const auto& node : run->graph->nodes) {
    run->missing[node->index] = node->before.size();
    if (node->before.empty()) first.push_back(node.get());
  }
  if (first.empty()) return;
  for (size_t i = 1; i < first.size(); ++i) run_elsewhere([run, node = first[i]] { run_from(run, node); });
  run_from(run, first[0]);
  run->end.wait();
}

// Whether everything on the streams of a capture comes before what is on its first one.
bool is_joined(const Capture& capture, const std::vector<std::shared_ptr<CUstream_st>>& streams) {
  std::set<const Node*> before;
  Nodes rest;
  for (const auto& stream : streams) {
    if (stream.get() == capture.origin) rest = stream->ends;
  }
  while (!rest.empty()) {
    const Node* const node = rest.back();
    rest.pop_back();
    if (before.insert(node).second) rest.insert(rest.end(), node->before.begin(), node->before.end());
  }
  return std::all_of(streams.begin(), streams.end(), [&](const auto& stream) {
    return std::all_of(stream->ends.begin(), stream->ends.end(), [&](const Node* node) { return before.contains(node); });
  });
}

}  // namespace
}  // namespace emulator

using emulator::fail;
using emulator::find_stream;
using emulator::runtime_mutex;

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode) {
  static unsigned long long last_id = 0;
  const std::lock_guard lock(runtime_mutex());
  const auto stream = find_stream(handle);
  if (!stream) return fail(cudaErrorInvalidResourceHandle);
  if (stream->capture || handle == nullptr || handle == cudaStreamLegacy) return fail(cudaErrorStreamCaptureUnsupported);
  stream->capture = std::make_shared<emulator::Capture>();
  stream->capture->id = ++last_id;
  stream->capture->origin = stream.get();
  stream->ends.clear();
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  *graph = nullptr;
  const std::lock_guard lock(runtime_mutex());
  const auto stream = find_stream(handle);
  if (!stream || !stream->capture) return fail(cudaErrorInvalidValue);
  const auto capture = stream->capture;
  if (capture->origin != stream.get()) {
    capture->failed = true;
    return fail(cudaErrorStreamCaptureUnmatched);
  }
  const auto streams = emulator::streams_of(*capture);
  const bool joined = emulator::is_joined(*capture, streams);
  for (const auto& each : streams) {
    each->capture = nullptr;
    each->ends.clear();
  }
  capture->ended = true;
  if (capture->failed) return fail(cudaErrorStreamCaptureInvalidated);
  if (!joined) return fail(cudaErrorStreamCaptureUnjoined);
  *graph = new CUgraph_st{capture->made};
  return cudaSuccess;
}

// Edges are all plain: there are no arrays of what they are like.
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                     size_t* num_nodes) {
  const std::lock_guard lock(runtime_mutex());
  const auto stream = find_stream(handle);
  if (!stream) return fail(cudaErrorInvalidResourceHandle);
  *status = !stream->capture          ? cudaStreamCaptureStatusNone
            : stream->capture->failed ? cudaStreamCaptureStatusInvalidated
                                      : cudaStreamCaptureStatusActive;
  if (*status != cudaStreamCaptureStatusActive) return cudaSuccess;
  if (id) *id = stream->capture->id;
  if (graph) *graph = &stream->capture->made;
  if (nodes) *nodes = stream->ends.data();
  if (edges) *edges = nullptr;
  if (num_nodes) *num_nodes = stream->ends.size();
  return cudaSuccess;
}

cudaError_t cudaStreamUpdateCaptureDependencies(cudaStream_t handle, cudaGraphNode_t* nodes, const cudaGraphEdgeData*,
                                                size_t num_nodes, unsigned flags) {
  const std::lock_guard lock(runtime_mutex());
  const auto stream = find_stream(handle);
  if (!stream) return fail(cudaErrorInvalidResourceHandle);
  if (!stream->capture || flags != cudaStreamSetCaptureDependencies) return fail(cudaErrorInvalidValue);
  stream->ends.assign(nodes, nodes + num_nodes);
  return cudaSuccess;
}

// Arrays that are nullptr are only counted; those that there are have room for all.
cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t node, cudaGraphNode_t* before, cudaGraphEdgeData* edges, size_t* num) {
  const std::lock_guard lock(runtime_mutex());
  *num = node->before.size();
  if (before) std::copy(node->before.begin(), node->before.end(), before);
  if (edges) std::fill_n(edges, *num, cudaGraphEdgeData{});
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, size_t* num) {
  const std::lock_guard lock(runtime_mutex());
  *num = 0;
  for (const auto& node : graph->graph->nodes) {
    if (nodes) nodes[*num] = node.get();
    *num += 1;
  }
  return cudaSuccess;
}

cudaError_t cudaGraphGetEdges(cudaGraph_t graph, cudaGraphNode_t* from, cudaGraphNode_t* to, cudaGraphEdgeData* edges,
                              size_t* num) {
  const std::lock_guard lock(runtime_mutex());
  *num = 0;
  for (const auto& node : graph->graph->nodes) {
    for (emulator::Node* const before : node->before) {
      if (from) from[*num] = before;
      if (to) to[*num] = node.get();
      if (edges) edges[*num] = {};
      *num += 1;
    }
  }
  return cudaSuccess;
}

cudaError_t cudaGraphInstantiate(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long) {
  *exec = new CUgraphExec_st{graph->graph};
  return cudaSuccess;
}

cudaError_t cudaGraphUpload(cudaGraphExec_t, cudaStream_t) { return cudaSuccess; }

cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t handle) {
  const std::lock_guard lock(runtime_mutex());
  const auto stream = find_stream(handle);
  if (!stream) return fail(cudaErrorInvalidResourceHandle);
  if (stream->capture) return fail(cudaErrorStreamCaptureUnsupported);
  const auto run = std::make_shared<emulator::Run>(exec->graph);
  for (const auto& node : exec->graph->nodes) {
    if (node->wait) run->points[node->index] = node->wait->latest;
  }
  stream->push([run, turn = exec->turn] {
    const std::lock_guard one(*turn);
    emulator::run_graph(run);
  });
  return cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return cudaSuccess;
}

cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;
  return cudaSuccess;
}
