// Streams and events: see stream.hpp. The two default streams are ordinary ones here: they wait for no others.

#include "stream.hpp"

#include <algorithm>
#include <chrono>
#include <map>

#include "runtime.hpp"
#include "threads.hpp"

namespace emulator {
namespace {

// A stream that the runtime does not know any more goes when its work has ended.
struct Streams {
  std::mutex mutex;
  std::map<cudaStream_t, std::shared_ptr<CUstream_st>> alive;
  std::vector<std::weak_ptr<CUstream_st>> all;
};

Streams& streams() {
  static Streams* const leaked = new Streams;
  return *leaked;
}

std::shared_ptr<CUstream_st> make_stream() {
  static unsigned long long last_id = 1;
  auto stream = std::make_shared<CUstream_st>();
  stream->id = ++last_id;
  std::erase_if(streams().all, [](const auto& each) { return each.expired(); });
  streams().all.push_back(stream);
  return stream;
}

// Work that waits is not put where nothing is to be waited for.
void push_wait(CUstream_st& stream, const std::shared_ptr<Point>& point) {
  if (!point || point->reached != 0) return;
  stream.push([point] { point->wait(); });
}

cudaError_t invalidate(Capture& capture, cudaError_t error) {
  capture.failed = true;
  return fail(error);
}

}  // namespace

void Point::reach() {
  ns = std::chrono::steady_clock::now().time_since_epoch().count();
  reached = 1;
  reached.notify_all();
}

Node* Capture::add(const Nodes& before) {
  auto& nodes = made.graph->nodes;
  auto& node = nodes.emplace_back(std::make_unique<Node>());
  node->index = nodes.size() - 1;
  node->before = before;
  for (Node* const each : before) each->after.push_back(node.get());
  return node.get();
}

std::mutex& runtime_mutex() { return streams().mutex; }

std::shared_ptr<CUstream_st> find_stream(cudaStream_t handle) {
  if (handle == nullptr || handle == cudaStreamLegacy) {
    static const auto* const legacy = new std::shared_ptr<CUstream_st>(make_stream());
    return *legacy;
  }
  if (handle == cudaStreamPerThread) {
    thread_local const std::shared_ptr<CUstream_st> mine = make_stream();
    return mine;
  }
  const auto found = streams().alive.find(handle);
  return found == streams().alive.end() ? nullptr : found->second;
}

std::vector<std::shared_ptr<CUstream_st>> streams_of(const Capture& capture) {
  std::vector<std::shared_ptr<CUstream_st>> found;
  for (const auto& weak : streams().all) {
    if (auto stream = weak.lock(); stream && stream->capture.get() == &capture) found.push_back(std::move(stream));
  }
  return found;
}

cudaError_t enqueue(cudaStream_t handle, std::function<void()> work) {
  const std::lock_guard lock(runtime_mutex());
  const auto stream = find_stream(handle);
  if (!stream) return fail(cudaErrorInvalidResourceHandle);
  if (!stream->capture) {
    stream->push(std::move(work));
    return cudaSuccess;
  }
  if (stream->capture->failed) return fail(cudaErrorStreamCaptureInvalidated);
  Node* const node = stream->capture->add(stream->ends);
  node->work = std::move(work);
  stream->ends = {node};
  return cudaSuccess;
}

void wait_for_device() {
  std::vector<std::shared_ptr<Point>> ends;
  {
    const std::lock_guard lock(runtime_mutex());
    for (const auto& weak : streams().all) {
      if (const auto stream = weak.lock()) ends.push_back(stream->mark());
    }
  }
  for (const auto& end : ends) end->wait();
}

}  // namespace emulator

using emulator::fail;
using emulator::find_stream;
using emulator::invalidate;
using emulator::runtime_mutex;

void CUstream_st::push(std::function<void()> work) {
  const std::lock_guard lock(mutex_);
  work_.push_back(std::move(work));
  if (served_) return;
  served_ = true;
  emulator::run_elsewhere([self = shared_from_this()] { self->serve(); });
}

void CUstream_st::serve() {
  std::unique_lock lock(mutex_);
  while (!work_.empty()) {
    {
      const std::function<void()> work = std::move(work_.front());
      work_.pop_front();
      lock.unlock();
      work();
    }
    lock.lock();
  }
  served_ = false;
}

bool CUstream_st::idle() {
  const std::lock_guard lock(mutex_);
  return !served_;
}

std::shared_ptr<emulator::Point> CUstream_st::mark() {
  auto point = std::make_shared<emulator::Point>();
  if (idle())
    point->reach();
  else
    push([point] { point->reach(); });
  return point;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* out, unsigned) {
  const std::lock_guard lock(runtime_mutex());
  auto stream = emulator::make_stream();
  *out = stream.get();
  emulator::streams().alive[*out] = std::move(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* out, unsigned flags, int) {
  return cudaStreamCreateWithFlags(out, flags);
}

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  const std::lock_guard lock(runtime_mutex());
  const auto found = emulator::streams().alive.find(handle);
  if (found == emulator::streams().alive.end()) return fail(cudaErrorInvalidResourceHandle);
  if (found->second->capture) found->second->capture->failed = true;
  emulator::streams().alive.erase(found);
  return cudaSuccess;
}

cudaError_t cudaStreamGetId(cudaStream_t handle, unsigned long long* id) {
  const std::lock_guard lock(runtime_mutex());
  const auto stream = find_stream(handle);
  if (!stream) return fail(cudaErrorInvalidResourceHandle);
  *id = stream->id;
  return cudaSuccess;
}

cudaError_t cudaStreamQuery(cudaStream_t handle) {
  const std::lock_guard lock(runtime_mutex());
  const auto stream = find_stream(handle);
  if (!stream) return fail(cudaErrorInvalidResourceHandle);
  if (stream->capture) return invalidate(*stream->capture, cudaErrorStreamCaptureUnsupported);
  return stream->idle() ? cudaSuccess : fail(cudaErrorNotReady);
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  std::shared_ptr<emulator::Point> end;
  {
    const std::lock_guard lock(runtime_mutex());
    const auto stream = find_stream(handle);
    if (!stream) return fail(cudaErrorInvalidResourceHandle);
    if (stream->capture) return invalidate(*stream->capture, cudaErrorStreamCaptureUnsupported);
    end = stream->mark();
  }
  end->wait();
  return cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned flags) {
  const std::lock_guard lock(runtime_mutex());
  const auto stream = find_stream(handle);
  if (!stream || !event) return fail(cudaErrorInvalidResourceHandle);
  if (stream->capture && stream->capture->failed) return fail(cudaErrorStreamCaptureInvalidated);
  if (flags == cudaEventWaitExternal && stream->capture) {
    emulator::Node* const node = stream->capture->add(stream->ends);
    node->wait = event;
    stream->ends = {node};
    return cudaSuccess;
  }
  if (!event->capture) {
    if (stream->capture) return invalidate(*stream->capture, cudaErrorStreamCaptureIsolation);
    emulator::push_wait(*stream, event->latest);
    return cudaSuccess;
  }
  if (event->capture->ended) return fail(cudaErrorCapturedEvent);
  if (stream->capture && stream->capture != event->capture) {
    event->capture->failed = true;
    return invalidate(*stream->capture, cudaErrorStreamCaptureMerge);
  }
  stream->capture = event->capture;
  for (emulator::Node* const node : event->nodes) {
    if (std::find(stream->ends.begin(), stream->ends.end(), node) == stream->ends.end()) stream->ends.push_back(node);
  }
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, cudaEventDefault); }

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags) {
  *event = new CUevent_st;
  (*event)->timed = (flags & cudaEventDisableTiming) == 0;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const std::lock_guard lock(runtime_mutex());
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  const std::lock_guard lock(runtime_mutex());
  const auto stream = find_stream(handle);
  if (!stream || !event) return fail(cudaErrorInvalidResourceHandle);
  if (!stream->capture) {
    event->capture = nullptr;
    event->nodes.clear();
    event->latest = stream->mark();
    return cudaSuccess;
  }
  if (stream->capture->failed) return fail(cudaErrorStreamCaptureInvalidated);
  event->capture = stream->capture;
  event->nodes = stream->ends;
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  const std::lock_guard lock(runtime_mutex());
  if (event->capture && !event->capture->ended) return invalidate(*event->capture, cudaErrorCapturedEvent);
  return !event->latest || event->latest->reached != 0 ? cudaSuccess : fail(cudaErrorNotReady);
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  std::shared_ptr<emulator::Point> point;
  {
    const std::lock_guard lock(runtime_mutex());
    if (event->capture && !event->capture->ended) return invalidate(*event->capture, cudaErrorCapturedEvent);
    point = event->latest;
  }
  if (point) point->wait();
  return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t since, cudaEvent_t until) {
  const std::lock_guard lock(runtime_mutex());
  for (const cudaEvent_t event : {since, until}) {
    if (!event->timed || !event->latest) return fail(cudaErrorInvalidResourceHandle);
    if (event->latest->reached == 0) return fail(cudaErrorNotReady);
  }
  *ms = static_cast<float>(until->latest->ns - since->latest->ns) * 1e-6f;
  return cudaSuccess;
}
