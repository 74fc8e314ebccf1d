// The CUDA kernels' own bodies, run on the CPU in the geometry that they are launched in. The compiler is
// told to read shim.h first.
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include "edit_rows.cuh"
#include "embed_tokens.cuh"

namespace {

using namespace memkern;

// `blocks` replaces the number of blocks, so that a few stride over all rows; 0 leaves it. Returns whether
// the rows were moved 16 bytes at a time.
template <typename T>
bool edit(const EditRows<T>* edits, int tensors, const EditPlan& plan, unsigned blocks) {
  const EditRows<T>& last = edits[tensors - 1];
  const Geometry geometry = edit_rows_geometry(edits, tensors, plan);
  const Index grid{blocks ? blocks : geometry.blocks, static_cast<unsigned>(tensors)};
  const Index block{geometry.threads_x, geometry.threads_y};
  for_every_thread(grid, block, [&] {
    geometry.vectors ? edit_rows_kernel<T, kVectorSize<T>>(edits[0], last, plan)
                     : edit_rows_kernel<T, 1>(edits[0], last, plan);
  });
  return geometry.vectors;
}

template <typename T>
bool embed(const EmbedTokens<T>& arguments, unsigned blocks) {
  const Geometry geometry = embed_tokens_geometry(arguments);
  const Index block{geometry.threads_x, geometry.threads_y};
  for_every_thread({blocks ? blocks : geometry.blocks, 1}, block, [&] {
    geometry.vectors ? embed_tokens_kernel<T, kVectorSize<T>>(arguments)
                     : embed_tokens_kernel<T, 1>(arguments);
  });
  return geometry.vectors;
}

}  // namespace

// The structs of parameters.h as ctypes lays them out; one pair of functions per dtype.
#define MEMKERN_EXPORT(name, T)                                                            \
  extern "C" bool edit_##name(const EditRows<T>* edits, int tensors, const EditPlan* plan, \
                              unsigned blocks) {                                           \
    return edit(edits, tensors, *plan, blocks);                                            \
  }                                                                                        \
  extern "C" bool embed_##name(const EmbedTokens<T>* arguments, unsigned blocks) {         \
    return embed(*arguments, blocks);                                                      \
  }

MEMKERN_EXPORT(float32, float)
MEMKERN_EXPORT(float64, double)
MEMKERN_EXPORT(float16, torch::headeronly::Half)
MEMKERN_EXPORT(bfloat16, torch::headeronly::BFloat16)
