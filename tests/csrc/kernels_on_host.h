// What kernels.cu needs of CUDA, for a compiler of the host: to be included before it, in one source of a program or
// shared object (g++ -include). A kernel is a plain function then, and collective_run() launches it.
//
//   g++ -std=c++20 -ffp-contract=off -x c++ -include kernels_on_host.h kernels.cu
#pragma once

#include "launch.h"

struct Index {
  unsigned x;
};
inline thread_local Index gridDim, blockIdx, blockDim, threadIdx;

#define __global__
#define __device__
#define __launch_bounds__(...)

inline unsigned __float_as_uint(float x) {
  unsigned bits;
  __builtin_memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  __builtin_memcpy(&x, &bits, sizeof x);
  return x;
}

// One thread after the other.
extern "C" __attribute__((visibility("default"))) void collective_run(void (*kernel)(collective::Launch),
                                                                      const collective::Launch* launch, unsigned grid,
                                                                      unsigned block) {
  gridDim.x = grid, blockDim.x = block;
  for (blockIdx.x = 0; blockIdx.x < grid; blockIdx.x++)
    for (threadIdx.x = 0; threadIdx.x < block; threadIdx.x++) kernel(*launch);
}
