// The C ABI, part 4: what is enqueued on the communication stream, routing handles and graphs.
//
// In: calls of any thread. Out: operations.hpp's functions run under the buffer's mutex, so that the order of epochs is the
// order on the stream; a slot that a rejected call had taken is given back.

#include "border.hpp"
#include "operations.hpp"

using namespace deepep;

namespace {

// Calls `operation` with the buffer locked and usable, and the args checked.
template <class Args, class Operation>
int32_t operate(const char* doing, int32_t op, uint64_t handle, Args* args, deepep_error* error, Operation operation) noexcept {
  return cross(doing, op, error, [&](Call& call) {
    const auto buffer = find_buffer(call, handle);
    check(args);
    const std::lock_guard lock(buffer->mutex);
    buffer->enter();
    try {
      operation(*buffer, *args);
    } catch (...) {
      buffer->slots.give_back_taken();
      throw;
    }
  });
}

}  // namespace

extern "C" {

int32_t deepep_get_dispatch_layout(uint64_t buffer, const deepep_dispatch_layout_args* args, deepep_error* error) {
  return operate("get the dispatch layout", DEEPEP_OP_LAYOUT, buffer, args, error, get_dispatch_layout);
}

int32_t deepep_handle_create(uint64_t buffer, deepep_handle_create_args* args, deepep_error* error) {
  return operate("create a handle", DEEPEP_OP_CREATE, buffer, args, error, handle_create);
}

int32_t deepep_handle_destroy(uint64_t handle, deepep_error* error) {
  return cross("destroy a handle", DEEPEP_OP_NONE, error, [&](Call&) { handle_destroy(handle); });
}

int32_t deepep_dispatch(uint64_t buffer, deepep_dispatch_args* args, deepep_error* error) {
  return operate("dispatch", DEEPEP_OP_DISPATCH, buffer, args, error, dispatch);
}

int32_t deepep_combine(uint64_t buffer, const deepep_combine_args* args, deepep_error* error) {
  return operate("combine", DEEPEP_OP_COMBINE, buffer, args, error, combine);
}

int32_t deepep_low_latency_dispatch(uint64_t buffer, deepep_low_latency_dispatch_args* args, deepep_error* error) {
  return operate("dispatch with low latency", DEEPEP_OP_LOW_LATENCY_DISPATCH, buffer, args, error, low_latency_dispatch);
}

int32_t deepep_low_latency_dispatch_receive(uint64_t buffer, const deepep_receive_args* args, deepep_error* error) {
  return operate("receive a low-latency dispatch", DEEPEP_OP_LOW_LATENCY_DISPATCH, buffer, args, error,
                 low_latency_dispatch_receive);
}

int32_t deepep_low_latency_combine(uint64_t buffer, const deepep_low_latency_combine_args* args, deepep_error* error) {
  return operate("combine with low latency", DEEPEP_OP_LOW_LATENCY_COMBINE, buffer, args, error, low_latency_combine);
}

int32_t deepep_low_latency_combine_receive(uint64_t buffer, const deepep_receive_args* args, deepep_error* error) {
  return operate("receive a low-latency combine", DEEPEP_OP_LOW_LATENCY_COMBINE, buffer, args, error,
                 low_latency_combine_receive);
}

int32_t deepep_expert_output(uint64_t buffer, deepep_expert_output_args* args, deepep_error* error) {
  return operate("get the expert-output region", DEEPEP_OP_EXPERT_OUTPUT, buffer, args, error, expert_output);
}

int32_t deepep_barrier(uint64_t buffer, const deepep_barrier_args* args, deepep_error* error) {
  return operate("enter a barrier", DEEPEP_OP_BARRIER, buffer, args, error, barrier);
}

int32_t deepep_graph_begin(uint64_t buffer, deepep_graph_args* args, deepep_error* error) {
  return operate("begin a graph", DEEPEP_OP_NONE, buffer, args, error, graph_begin);
}

int32_t deepep_graph_end(uint64_t buffer, deepep_graph_args* args, deepep_error* error) {
  return operate("end a graph", DEEPEP_OP_NONE, buffer, args, error, graph_end);
}

int32_t deepep_graph_launch(uint64_t graph, deepep_graph_args* args, deepep_error* error) {
  return cross("launch a graph", DEEPEP_OP_NONE, error, [&](Call&) { graph_launch(graph, check(args)); });
}

int32_t deepep_graph_destroy(uint64_t graph, deepep_error* error) {
  return cross("destroy a graph", DEEPEP_OP_NONE, error, [&](Call&) { graph_destroy(graph); });
}

int32_t deepep_refuse(uint64_t buffer, const deepep_refuse_args* args, deepep_error* error) {
  return operate("refuse a call", DEEPEP_OP_NONE, buffer, args, error, refuse_call);
}

}  // extern "C"
