// The options of a buffer: see options.hpp.

#include "options.hpp"

#include "../common/failure.hpp"
#include "operations.hpp"

namespace deepep {
namespace {

// One line an option, where it is in the three structs that carry it, and what it may be (0 where it stands for a default).
struct Field {
  const char* name;
  uint32_t Options::* resolved;
  uint32_t deepep_buffer_create_args::* given;
  uint32_t deepep_peer_handle::* peer;
  uint32_t least;
  uint32_t most;
};

#define DEEPEP_OPTION(name, least, most) \
  {#name, &Options::name, &deepep_buffer_create_args::name, &deepep_peer_handle::name, least, most}
constexpr Field kFields[] = {
    DEEPEP_OPTION(num_ranks, 1, DEEPEP_MAX_RANKS),
    DEEPEP_OPTION(hidden, 8, DEEPEP_MAX_HIDDEN),
    DEEPEP_OPTION(num_experts, 1, DEEPEP_MAX_EXPERTS),
    DEEPEP_OPTION(num_topk, 1, DEEPEP_MAX_TOPK),
    DEEPEP_OPTION(max_tokens_per_rank, 0, DEEPEP_MAX_TOKENS),
    DEEPEP_OPTION(max_low_latency_tokens_per_rank, 0, DEEPEP_MAX_TOKENS),
    DEEPEP_OPTION(max_recv_tokens, 0, DEEPEP_MAX_RECV_TOKENS),
    DEEPEP_OPTION(num_slots, 0, DEEPEP_MAX_SLOTS),
    DEEPEP_OPTION(max_row_bytes, 0, DEEPEP_MAX_ROW_BYTES),
    DEEPEP_OPTION(max_scale_bytes, 0, DEEPEP_MAX_ROW_BYTES),
};
#undef DEEPEP_OPTION
static_assert(sizeof kFields / sizeof kFields[0] == sizeof(Options) / sizeof(uint32_t), "an option is missing above");

void check_flags_and_rank(uint64_t device, const deepep_buffer_create_args& args) {
  // The index comes twice: as the call's self and, for those who fill the struct only, as a field. They may differ only when
  // one of them is left 0.
  if (device != 0 && args.device != 0 && static_cast<int64_t>(device) != args.device) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "device is %llu, the args say %d", static_cast<unsigned long long>(device),
           args.device);
  }
  check_device(device_of(device, args));
  if (args.flags & ~static_cast<uint32_t>(DEEPEP_BUFFER_MASK_ON_TIMEOUT)) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "flags is 0x%x, known bits are 0x%x", args.flags, DEEPEP_BUFFER_MASK_ON_TIMEOUT);
  }
  if (args.rank >= args.num_ranks) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "rank is %u, num_ranks %u", args.rank, args.num_ranks);
  }
  if (args.num_sms < 0) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "num_sms is %d, at least 0", args.num_sms);
}

}  // namespace

uint64_t device_of(uint64_t device, const deepep_buffer_create_args& args) {
  return device != 0 ? device : static_cast<uint64_t>(static_cast<int64_t>(args.device));
}

Options checked_options(uint64_t device, const deepep_buffer_create_args& args) {
  Options options;
  for (const Field& field : kFields) {
    const uint32_t value = args.*field.given;
    if (value < field.least) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "%s is %u, at least %u", field.name, value, field.least);
    if (value > field.most) reject(DEEPEP_ERROR_INVALID_ARGUMENT, "%s is %u, at most %u", field.name, value, field.most);
    options.*field.resolved = value;
  }
  check_flags_and_rank(device, args);
  if (options.hidden * 2 % 16 != 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "hidden is %u, hidden * 2 must be a multiple of 16", options.hidden);
  }
  if (options.max_row_bytes % 16 != 0) {
    reject(DEEPEP_ERROR_INVALID_ARGUMENT, "max_row_bytes is %u, a multiple of 16 is needed", options.max_row_bytes);
  }
  resolve_defaults(options);
  return options;
}

void fill_sizes(deepep_buffer_create_args& args, const Options& options) {
  const Regions regions = make_regions(options);
  for (const Field& field : kFields) args.*field.given = options.*field.resolved;
  if (args.timeout_ms == 0) args.timeout_ms = 30000;
  args.symmetric_bytes = regions.symmetric_bytes;
  args.control_bytes = regions.control_bytes;
  args.slot_bytes = regions.slot_bytes;
  args.recv_x_bytes = regions.recv_x_bytes;
  args.recv_scales_bytes = regions.recv_scales_bytes;
  args.expert_output_bytes = regions.expert_output_bytes;
  args.metadata_bytes = regions.metadata_bytes;
  args.local_bytes = local_bytes(options);
  args.handle_bytes = handle_bytes(options);
}

void fill_options(deepep_peer_handle& handle, const Options& options) {
  for (const Field& field : kFields) handle.*field.peer = options.*field.resolved;
}

void compare_options(const deepep_peer_handle& handle, const Options& options, uint32_t rank) {
  for (const Field& field : kFields) {
    if (handle.*field.peer == options.*field.resolved) continue;
    reject(DEEPEP_ERROR_MISMATCH, "rank %u has %s %u, rank %u has %u", handle.rank, field.name, handle.*field.peer, rank,
           options.*field.resolved);
  }
}

}  // namespace deepep
