// The kernels of decode steps for the emulated device: in its library, since they launch on the streams of its runtime.
// DEEPEP_DECODE_LIBRARY names it for those who load them.

#include "language.hpp"

#include "../../scripts/decode/decode.cu"
