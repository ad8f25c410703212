// CUDA graphs of a buffer's calls: see graph.hpp.

#include "graph.hpp"

#include <utility>

#include "../api/operations.hpp"
#include "../api/registry.hpp"
#include "buffer.hpp"

namespace deepep {

Graph::~Graph() {
  if (exec && cudaGraphExecDestroy(exec) != cudaSuccess) cudaGetLastError();
}

void abandon_capture(Graph& graph) noexcept {
  cudaGraph_t dropped = nullptr;
  if (cudaStreamEndCapture(graph.stream, &dropped) != cudaSuccess) cudaGetLastError();
  if (dropped) cudaGraphDestroy(dropped);
}

void graph_begin(Buffer& buffer, deepep_graph_args& args) {
  const cudaStream_t stream = stream_of(args.stream, "stream");
  if (args.stream == 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "stream is 0");
  if (stream == buffer.comm())
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "it is the buffer's communication stream, which joins by itself");
  if (stream == cudaStreamLegacy) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "the legacy default stream cannot be captured");
  if (buffer.capturing) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "a graph of this buffer was begun and not ended");
  if (capture_of(stream) != 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "the stream is being captured already");
  buffer.settle();
  auto graph = std::make_shared<Graph>();
  graph->buffer = buffer.weak_from_this();
  graph->stream = stream;
  // Relaxed: one thread may drive several ranks, whose other calls (allocations, queries) must go on beside the capture.
  DEEPEP_CUDA("begin a capture", cudaStreamBeginCapture(stream, cudaStreamCaptureModeRelaxed));
  buffer.capturing = std::move(graph);
}

void graph_end(Buffer& buffer, deepep_graph_args& args) {
  const cudaStream_t stream = stream_of(args.stream, "stream");
  if (!buffer.capturing) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "no graph of this buffer was begun");
  if (buffer.capturing->stream != stream) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "stream 0x%llx is not the one that is captured",
           static_cast<unsigned long long>(args.stream));
  }
  const std::shared_ptr<Graph> graph = std::exchange(buffer.capturing, nullptr);
  cudaGraph_t captured = nullptr;
  try {
    // Calls with ASYNC_FINISH have left the communication stream on its own; every fork must be joined before the end.
    const CaptureId own = buffer.present_capture();
    if (own != 0 && own == capture_of(stream)) buffer.order(buffer.comm(), stream, own);
  } catch (const Rejected&) {
    // The capture has failed; the call below says so, and makes the streams usable again.
  }
  const cudaError_t error = cudaStreamEndCapture(stream, &captured);
  if (error != cudaSuccess || !captured) {
    cudaGetLastError();
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "the capture has failed, and there is no graph: %s (%s)", cudaGetErrorString(error),
           cudaGetErrorName(error));
  }
  const cudaError_t made = cudaGraphInstantiate(&graph->exec, captured, 0);
  cudaGraphDestroy(captured);
  DEEPEP_CUDA("make the graph", made);
  DEEPEP_CUDA("upload the graph", cudaGraphUpload(graph->exec, buffer.comm()));
  args.graph = publish(Kind::graph, graph);
}

void graph_launch(uint64_t id, deepep_graph_args& args) {
  const auto graph = find<Graph>(Kind::graph, id, "graph");
  const auto buffer = graph->buffer.lock();
  if (!buffer) reject(DEEPEP_ERROR_CLOSED, "the graph's buffer was destroyed");
  const std::lock_guard lock(buffer->mutex);
  buffer->enter();
  if (graph->needs_peers) buffer->check_good();
  buffer->check_id(args.done_id, "done_id");
  std::shared_ptr<Event> event;
  if (args.event) event = find<Event>(Kind::event, args.event, "event");
  cudaStream_t stream = stream_of(args.stream, "stream");
  if (stream == buffer->comm()) stream = nullptr;
  if (buffer->present_capture() != 0 || (stream && capture_of(stream) != 0)) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "a graph cannot be launched into a capture");
  }
  auto ended = std::make_shared<Record>(buffer->device->index, true);
  buffer->settle();
  if (stream) buffer->order(stream, buffer->comm(), 0);
  DEEPEP_CUDA("launch the graph", cudaGraphLaunch(graph->exec, buffer->comm()));
  ended->mark(buffer->comm(), 0);
  if (stream) ended->make_wait(stream, 0);
  buffer->note_replay(ended, args.done_id, graph);
  if (event) event->set(std::move(ended));  // Whoever asks now finds the replay noted.
}

void graph_destroy(uint64_t id) { retire(Kind::graph, id, "graph"); }

}  // namespace deepep
