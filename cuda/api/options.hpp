// The options of a buffer: checked, resolved, compared.
//
// In: deepep_buffer_create_args, or a peer's handle. Out: Options with their defaults, the sizes they come to, or a rejection
// that names the field, its value and the limit. Used by the life cycle of a buffer only.
#pragma once

#include <cstdint>

#include "../abi/deepep.h"
#include "../common/regions.hpp"

namespace deepep {

// The device that a buffer is made on.
uint64_t device_of(uint64_t device, const deepep_buffer_create_args& args);
// Checks everything in `args` that needs no other object, and resolves defaults. Rejects with INVALID_ARGUMENT.
Options checked_options(uint64_t device, const deepep_buffer_create_args& args);
// Writes the [out] sizes, and the resolved options, into `args`.
void fill_sizes(deepep_buffer_create_args& args, const Options& options);
// Writes the options into a peer handle.
void fill_options(deepep_peer_handle& handle, const Options& options);
// Rejects with MISMATCH, naming the first field in which a peer differs.
void compare_options(const deepep_peer_handle& handle, const Options& options, uint32_t rank);
// Of the backend: bytes that a buffer allocates for itself beside the symmetric memory.
uint64_t local_bytes(const Options& options);
// Of the backend: device memory of a handle for the most tokens of a rank.
uint64_t handle_bytes(const Options& options);

}  // namespace deepep
