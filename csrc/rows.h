// A [B, L, D] tensor as kernels see it: raw memory whose last dimension is dense. Strides are in elements.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define MEMKERN_HOST_DEVICE __host__ __device__
#else
#define MEMKERN_HOST_DEVICE
#endif

namespace memkern {

template <typename T>
struct Rows {
  const T* data;
  int64_t batch_stride;
  int64_t row_stride;

  MEMKERN_HOST_DEVICE const T* at(int64_t batch, int64_t row) const {
    return data + batch * batch_stride + row * row_stride;
  }
};

}  // namespace memkern
