// Streams and events: see stream.hpp.

#include "stream.hpp"

#include <map>
#include <unordered_map>
#include <unordered_set>
#include <utility>
#include <vector>

#include "../abi/deepep.h"
#include "device.hpp"

namespace deepep {
namespace {

// cudaEvent_t are reused: to make one costs more than all that is done with it.
struct Events {
  std::mutex mutex;
  std::map<std::pair<int, bool>, std::vector<cudaEvent_t>> free;  // by device, and whether they keep the time
};

Events& events() {
  static Events* const leaked = new Events;
  return *leaked;
}

cudaEvent_t take_event(int device, bool timed) {
  Events& all = events();
  {
    const std::lock_guard lock(all.mutex);
    auto& free = all.free[{device, timed}];
    if (!free.empty()) {
      const cudaEvent_t event = free.back();
      free.pop_back();
      return event;
    }
    free.reserve(free.capacity() + 1);
  }
  use_device(device);
  const Relaxed relaxed;
  cudaEvent_t event = nullptr;
  DEEPEP_CUDA("make an event", cudaEventCreateWithFlags(&event, timed ? cudaEventDefault : cudaEventDisableTiming));
  return event;
}

void give_event(int device, bool timed, cudaEvent_t event) noexcept {
  if (!event) return;
  Events& all = events();
  const std::lock_guard lock(all.mutex);
  try {
    all.free[{device, timed}].push_back(event);
  } catch (...) {
    // Lost until the process ends.
  }
}

// Our own streams, dead or alive, so that a wrong number is an error where that can be told.
struct Made {
  std::weak_ptr<void> owner;
  bool is_comm = false;
};
struct Streams {
  std::mutex mutex;
  std::unordered_map<uint64_t, Made> alive;
  std::unordered_set<uint64_t> dead;  // CUDA may give the number again
};

Streams& streams() {
  static Streams* const leaked = new Streams;
  return *leaked;
}

// Unlike its number it never comes again.
unsigned long long id_of(cudaStream_t stream) {
  unsigned long long id = 0;
  DEEPEP_CUDA("identify a stream", cudaStreamGetId(stream, &id));
  return id;
}

// One that has waited until all before it has ended, as edges do unless somebody asks for less.
bool is_whole(const cudaGraphEdgeData& edge) {
  return edge.from_port == 0 && edge.to_port == 0 && edge.type == cudaGraphDependencyTypeDefault;
}

// The nodes that a node waits for the end of. Rejects with SYSTEM.
std::vector<cudaGraphNode_t> nodes_before(cudaGraphNode_t node) {
  size_t num = 0;
  DEEPEP_CUDA("look at a graph", cudaGraphNodeGetDependencies(node, nullptr, nullptr, &num));
  std::vector<cudaGraphNode_t> nodes(num), whole;
  std::vector<cudaGraphEdgeData> edges(num);
  if (num != 0) DEEPEP_CUDA("look at a graph", cudaGraphNodeGetDependencies(node, nodes.data(), edges.data(), &num));
  for (size_t i = 0; i < num; ++i) {
    if (is_whole(edges[i])) whole.push_back(nodes[i]);
  }
  return whole;
}

uint64_t number_of(cudaStream_t stream) { return reinterpret_cast<uint64_t>(stream); }

cudaStream_t keep_stream(cudaStream_t stream, std::weak_ptr<void> owner, bool is_comm) {
  Streams& all = streams();
  const std::lock_guard lock(all.mutex);
  all.alive[number_of(stream)] = {std::move(owner), is_comm};
  all.dead.erase(number_of(stream));
  return stream;
}

}  // namespace

Record::Record(int device, bool timed) : device_(device), timed_(timed), event_(take_event(device, timed)) {}

Record::~Record() {
  // Work that waits for it keeps what it needs, even when the event is recorded anew.
  give_event(device_, timed_, event_);
}

void Record::mark(cudaStream_t stream, CaptureId capture) {
  capture_ = capture;
  if (capture == 0) stream_ = id_of(stream), stream_number_ = number_of(stream);
  DEEPEP_CUDA("record an event", cudaEventRecord(event_, stream));
}

bool Record::make_wait(cudaStream_t stream, CaptureId capture) {
  check_capture(capture);
  if (capture_ != 0) {
    DEEPEP_CUDA("order a capture", cudaStreamWaitEvent(stream, event_, cudaEventWaitDefault));
    drop_passed(stream);
    return false;
  }
  if (capture == 0 && id_of(stream) == stream_) return false;  // It is in order with itself.
  // To ask CUDA costs more than a wait for nothing, but a graph would wait for it in every replay.
  if (capture != 0 ? done() : done_.load(std::memory_order_acquire)) return false;
  const unsigned flags = capture != 0 ? cudaEventWaitExternal : cudaEventWaitDefault;
  DEEPEP_CUDA("make a stream wait", cudaStreamWaitEvent(stream, event_, flags));
  return capture != 0;
}

void Record::check_capture(CaptureId capture) const {
  if (capture_ == 0 || capture_ == capture) return;
  reject(DEEPEP_ERROR_INVALID_ARGUMENT,
         "what the event has recorded was captured, and orders only what is captured with it: use the event of the replay, "
         "which Graph.launch() gives, or record one after deepep_graph_launch");
}

bool Record::done() {
  check_capture(0);
  if (done_.load(std::memory_order_acquire)) return true;
  if (is_operation_) return false;
  use_device(device_);
  const Relaxed relaxed;
  const cudaError_t error = cudaEventQuery(event_);
  if (error == cudaErrorNotReady) {
    cudaGetLastError();
    return false;
  }
  if (error != cudaSuccess) reject_cuda(error, "query an event");
  done_.store(true, std::memory_order_release);
  return true;
}

void Record::complete(std::shared_ptr<const Status> failure) {
  {
    const std::lock_guard lock(mutex_);
    failure_ = std::move(failure);
  }
  done_.store(true, std::memory_order_release);
}

std::shared_ptr<const Status> Record::failure() const {
  const std::lock_guard lock(mutex_);
  return failure_;
}

int32_t Record::status() const {
  const auto known = failure();
  return known ? known->failure.code : 0;
}

std::shared_ptr<Record> Event::latest() {
  const std::lock_guard lock(mutex_);
  return latest_;
}

void Event::set(std::shared_ptr<Record> record) {
  const std::lock_guard lock(mutex_);
  latest_.swap(record);
}

cudaStream_t stream_of(uint64_t stream, const char* name) {
  const auto shown = static_cast<unsigned long long>(stream);
  if (stream <= number_of(cudaStreamPerThread)) return reinterpret_cast<cudaStream_t>(stream);
  // A stream is the address of something in this process: that rules out handles of other kinds and small numbers.
  if (stream >> 48 != 0 || stream < 4096) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "%s 0x%llx is no CUDA stream", name, shown);
  Streams& all = streams();
  const std::lock_guard lock(all.mutex);
  if (all.dead.contains(stream)) reject(DEEPEP_ERROR_CLOSED, "%s 0x%llx was destroyed", name, shown);
  return reinterpret_cast<cudaStream_t>(stream);
}

CaptureId capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  CaptureId id = 0;
  const cudaError_t error = cudaStreamGetCaptureInfo(stream, &status, &id, nullptr, nullptr, nullptr, nullptr);
  if (error == cudaErrorStreamCaptureImplicit) {
    cudaGetLastError();
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "the legacy default stream cannot be used while another stream is captured");
  }
  DEEPEP_CUDA("look at a stream", error);
  if (status == cudaStreamCaptureStatusInvalidated) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "the capture on the stream has failed before: end it");
  }
  return status == cudaStreamCaptureStatusActive ? id : 0;
}

void drop_passed(cudaStream_t stream) noexcept {
  constexpr size_t kMostNodes = 1024;  // to look at: what a stream has passed is seldom far back
  try {
    cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
    const cudaGraphNode_t* nodes = nullptr;
    const cudaGraphEdgeData* edges = nullptr;
    size_t num = 0;
    DEEPEP_CUDA("look at a stream", cudaStreamGetCaptureInfo(stream, &status, nullptr, nullptr, &nodes, &edges, &num));
    if (status != cudaStreamCaptureStatusActive || num < 2) return;
    for (size_t i = 0; edges && i < num; ++i) {
      if (!is_whole(edges[i])) return;
    }
    std::vector<cudaGraphNode_t> ends(nodes, nodes + num), before = ends;
    std::unordered_set<cudaGraphNode_t> seen;
    for (size_t i = 0; i < before.size() && i < kMostNodes && ends.size() > 1; ++i) {
      for (const cudaGraphNode_t node : nodes_before(before[i])) {
        if (!seen.insert(node).second) continue;
        before.push_back(node);
        std::erase(ends, node);
      }
    }
    if (ends.size() == num) return;
    DEEPEP_CUDA("order a capture", cudaStreamUpdateCaptureDependencies(stream, ends.data(), nullptr, ends.size(),
                                                                       cudaStreamSetCaptureDependencies));
  } catch (...) {
    // Then the graph has an edge more.
  }
}

cudaStream_t make_stream(std::weak_ptr<void> owner) {
  const Relaxed relaxed;
  cudaStream_t stream = nullptr;
  DEEPEP_CUDA("make a stream", cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  return keep_stream(stream, std::move(owner), false);
}

cudaStream_t make_comm_stream(std::weak_ptr<void> owner) {
  int least = 0, greatest = 0;
  DEEPEP_CUDA("make a stream", cudaDeviceGetStreamPriorityRange(&least, &greatest));
  cudaStream_t stream = nullptr;
  DEEPEP_CUDA("make a stream", cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest));
  return keep_stream(stream, std::move(owner), true);
}

std::weak_ptr<void> stream_owner(uint64_t stream) {
  Streams& all = streams();
  const std::lock_guard lock(all.mutex);
  const auto found = all.alive.find(stream);
  return found == all.alive.end() ? std::weak_ptr<void>() : found->second.owner;
}

void destroy_stream(uint64_t stream) {
  stream_of(stream, "stream");
  Streams& all = streams();
  {
    const std::lock_guard lock(all.mutex);
    const auto found = all.alive.find(stream);
    if (found == all.alive.end()) {
      reject(DEEPEP_ERROR_INVALID_ARGUMENT, "stream 0x%llx was not made by this library",
             static_cast<unsigned long long>(stream));
    }
    if (found->second.is_comm) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "it is the buffer's communication stream");
    all.alive.erase(found);
    all.dead.insert(stream);
  }
  // Returns at once; the stream goes when its work has ended.
  DEEPEP_CUDA("destroy a stream", cudaStreamDestroy(reinterpret_cast<cudaStream_t>(stream)));
}

void drop_stream(cudaStream_t stream) noexcept {
  Streams& all = streams();
  {
    const std::lock_guard lock(all.mutex);
    if (all.alive.erase(number_of(stream)) == 0) return;
    try {
      all.dead.insert(number_of(stream));
    } catch (...) {
      // Then a use of it is CUDA's to find out.
    }
  }
  if (cudaStreamDestroy(stream) != cudaSuccess) cudaGetLastError();
}

cudaEvent_t make_order_event() {
  cudaEvent_t event = nullptr;
  DEEPEP_CUDA("make an event", cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return event;
}

}  // namespace deepep
