// What CUDA C++ has that C++ has not, as far as the kernels on rows use it: one thread of one block at a
// time.
#pragma once

#define __global__
#define __host__
#define __device__

struct Index {
  unsigned x = 0;
  unsigned y = 0;
};

inline Index threadIdx, blockIdx, blockDim, gridDim;

// Calls `kernel` once for every thread of every block.
template <typename Kernel>
void for_every_thread(Index grid, Index block, Kernel kernel) {
  gridDim = grid;
  blockDim = block;
  for (blockIdx.y = 0; blockIdx.y < grid.y; ++blockIdx.y) {
    for (blockIdx.x = 0; blockIdx.x < grid.x; ++blockIdx.x) {
      for (threadIdx.y = 0; threadIdx.y < block.y; ++threadIdx.y) {
        for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) {
          kernel();
        }
      }
    }
  }
}
