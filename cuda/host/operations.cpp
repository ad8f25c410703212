// The operations of the CUDA backend but for dispatch and combine of either mode: each is checked, made into params, and
// launched.
//
// In: args structs of the ABI; Buffer::mutex is held. Out: one kernel each.

#include "../api/operations.hpp"

#include "../api/checks.hpp"
#include "../api/low_latency.hpp"
#include "../kernels/launch.hpp"
#include "buffer.hpp"

namespace deepep {

void get_dispatch_layout(Buffer& buffer, const deepep_dispatch_layout_args& args) {
  check_layout(buffer, args);
  const int32_t sms = buffer.sms(args.num_sms);
  buffer.enqueue(stream_fields(args), {.op = DEEPEP_OP_LAYOUT}, [&](const CallParams& call, Place place) {
    return launch_layout({.call = call, .args = args}, sms, place);
  });
}

void barrier(Buffer& buffer, const deepep_barrier_args& args) {
  buffer.sms(args.num_sms);  // One block whatever is asked for; what could not be had is refused as elsewhere.
  buffer.enqueue(stream_fields(args), {.op = DEEPEP_OP_BARRIER, .collective = true},
                 [](const CallParams& call, Place place) {
                   return launch_message({.call = call, .refusal = 0, .reserved = 0}, place);
                 });
}

void refuse_call(Buffer& buffer, const deepep_refuse_args& args) {
  check_refusal(args);
  buffer.enqueue({}, {.op = args.op, .collective = true}, [&](const CallParams& call, Place place) {
    return launch_message({.call = call, .refusal = args.code, .reserved = 0}, place);
  });
}

void expert_output(Buffer& buffer, deepep_expert_output_args& args) {
  check_no_pending_combine(buffer, args.slot);
  const auto slot = static_cast<uint32_t>(args.slot);
  buffer.enqueue(stream_fields(args), {.op = DEEPEP_OP_EXPERT_OUTPUT}, [&](const CallParams& call, Place place) {
    ReadersParams params = {.call = call};
    params.call.slot = slot;
    return launch_readers(params, place);
  });
  args.address = reinterpret_cast<uint64_t>(buffer.symmetric(buffer.rank)) + slot_offset(buffer.regions, slot) +
                 buffer.regions.expert_output;
  args.bytes = buffer.regions.expert_output_bytes;
}

void release_slot(Buffer& buffer, const deepep_slot_release_args& args) {
  const Slot& slot = buffer.slots.owned(args.slot);
  const cudaStream_t stream = stream_of(args.stream, "stream");
  const CaptureId capture = stream ? capture_of(stream) : 0;
  if (capture == 0 && slot.capture != 0 && slot.capture == buffer.present_capture()) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT,
           "the slot was taken in a capture that is open, and is given back there: name a stream that takes part in it");
  }
  if (capture != 0) {
    buffer.slots.held(args.slot);
    if (slot.capture != capture) {
      reject(DEEPEP_ERROR_INVALID_ARGUMENT, "the stream is being captured, but the slot was not taken in that capture");
    }
    check_no_pending_combine(buffer, args.slot);
    auto readers = std::make_shared<Record>(buffer.device->index);
    readers->mark(stream, capture);
    return buffer.slots.give_in_capture(args.slot, std::move(readers));
  }
  if (!slot.given_back) give_up_pending_combine(buffer, args.slot);
  std::shared_ptr<Record> readers;
  if (stream) {
    if (stream == buffer.comm() && buffer.present_capture() == 0) buffer.settle();
    readers = std::make_shared<Record>(buffer.device->index);
    readers->mark(stream, 0);
  }
  buffer.slots.give(args.slot, std::move(readers));
}

}  // namespace deepep
