// The kernels of the CUDA backend, as they are, but for primitives.cuh: build.ts puts the one of this folder in its place.

#include "language.hpp"

#include "cuda/kernels/launch.cu"
