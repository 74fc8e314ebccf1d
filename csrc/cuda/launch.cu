#include <cuda_runtime.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "edit_rows.cuh"
#include "embed_tokens.cuh"
#include "launch.h"

namespace memkern {
namespace {

const char* message(cudaError_t error) { return error == cudaSuccess ? nullptr : cudaGetErrorString(error); }

}  // namespace

// This library links its own CUDA runtime, which needs the device that torch's guard set.
template <typename T>
const char* launch_edit_rows(const EditRows<T>* edits, int tensors, const EditPlan& plan, int device,
                             void* stream) {
  if (const cudaError_t error = cudaSetDevice(device)) {
    return message(error);
  }
  const EditRows<T>& last = edits[tensors - 1];
  const Geometry geometry = edit_rows_geometry(edits, tensors, plan);
  const dim3 grid(geometry.blocks, tensors);
  const dim3 block(geometry.threads_x, geometry.threads_y);
  const auto queue = static_cast<cudaStream_t>(stream);
  if (geometry.vectors) {
    edit_rows_kernel<T, kVectorSize<T>><<<grid, block, 0, queue>>>(edits[0], last, plan);
  } else {
    edit_rows_kernel<T, 1><<<grid, block, 0, queue>>>(edits[0], last, plan);
  }
  return message(cudaGetLastError());
}

template <typename T>
const char* launch_embed_tokens(const EmbedTokens<T>& embed, int device, void* stream) {
  if (const cudaError_t error = cudaSetDevice(device)) {
    return message(error);
  }
  const Geometry geometry = embed_tokens_geometry(embed);
  const dim3 block(geometry.threads_x, geometry.threads_y);
  const auto queue = static_cast<cudaStream_t>(stream);
  if (geometry.vectors) {
    embed_tokens_kernel<T, kVectorSize<T>><<<geometry.blocks, block, 0, queue>>>(embed);
  } else {
    embed_tokens_kernel<T, 1><<<geometry.blocks, block, 0, queue>>>(embed);
  }
  return message(cudaGetLastError());
}

#define MEMKERN_INSTANTIATE(T)                                                                 \
  template const char* launch_edit_rows(const EditRows<T>*, int, const EditPlan&, int, void*); \
  template const char* launch_embed_tokens(const EmbedTokens<T>&, int, void*);

MEMKERN_INSTANTIATE(float)
MEMKERN_INSTANTIATE(double)
MEMKERN_INSTANTIATE(torch::headeronly::Half)
MEMKERN_INSTANTIATE(torch::headeronly::BFloat16)

}  // namespace memkern
