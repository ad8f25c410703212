// Routing handles: see handles.hpp.

#include "handles.hpp"

#include "handle.hpp"
#include "operations.hpp"
#include "registry.hpp"

namespace deepep {

std::shared_ptr<Handle> find_handle(Buffer& buffer, uint64_t id) {
  auto handle = find<Handle>(Kind::handle, id, "handle");
  if (handle->buffer.lock().get() != &buffer) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "the handle belongs to another buffer");
  return handle;
}

void handle_create(Buffer& buffer, deepep_handle_create_args& args) {
  if (args.num_tokens > buffer.options.max_tokens_per_rank) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "num_tokens is %u, the buffer holds %u a rank", args.num_tokens,
           buffer.options.max_tokens_per_rank);
  }
  if (args.num_topk > buffer.options.num_topk) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "num_topk is %u, the buffer has at most %u", args.num_topk, buffer.options.num_topk);
  }
  auto handle = std::make_shared<Handle>();
  handle->buffer = buffer.weak_from_this();
  handle->max_tokens = args.num_tokens;
  handle->max_topk = args.num_topk;
  prepare_handle(buffer, *handle);
  args.handle = publish(Kind::handle, handle);
}

void handle_destroy(uint64_t handle) { retire(Kind::handle, handle, "handle"); }

}  // namespace deepep
