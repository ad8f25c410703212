// Words for what went wrong, and for what was being done: written once for all backends.
//
// In: a Finding, which is numbers. Out: a Failure with a whole sentence ("Cannot dispatch: waited 30000.000 ms for the rows of
// rank 3 in call 7"). Host code only. Callers: the CPU backend where an operation fails, the CUDA backend where it learns of
// it.
#pragma once

#include <cstdint>

#include "failure.hpp"
#include "finding.hpp"

namespace deepep {

// What an operation does: "dispatch" in "Cannot dispatch: …".
const char* doing(int32_t op);
// The operation as a thing: "a dispatch".
const char* op_name(int32_t op);

// The failure that a finding of rank `rank` stands for.
Failure describe(const Finding& finding, uint32_t rank);

// What a call is told that comes after a failure half-way: whose fault it was, and in the words of then. `first` is what made
// the buffer fail, of rank `rank`.
Failure needs_recovery(const Failure& first, uint32_t rank);

}  // namespace deepep
