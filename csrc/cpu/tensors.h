// What the op files share: checks of a plan's tensors, strided views, dtype dispatch, work per thread.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <optional>

#include "rows.h"

namespace memkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define MEMKERN_DISPATCH(dtype, name, ...)                                                           \
  THO_DISPATCH_V2(dtype, name, AT_WRAP(__VA_ARGS__), AT_EXPAND(AT_FLOATING_TYPES), ScalarType::Half, \
                  ScalarType::BFloat16)

// The tensor itself where its last dimension is dense, else a contiguous copy.
inline Tensor dense_rows(const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  const bool dense = tensor.size(last) <= 1 || tensor.stride(last) == 1;
  return dense ? tensor : torch::stable::contiguous(tensor);
}

template <typename T>
Rows<T> view_rows(const Tensor& tensor) {
  return {tensor.const_data_ptr<T>(), tensor.stride(0), tensor.stride(1)};
}

template <typename T>
Rows<T> view_rows(const std::optional<Tensor>& bank) {
  return bank.has_value() ? view_rows<T>(*bank) : Rows<T>{nullptr, 0, 0};
}

// The bank as dense rows, after checking that it goes with `rows`.
inline std::optional<Tensor> check_bank(const char* name, const std::optional<Tensor>& bank,
                                        const Tensor& rows) {
  if (!bank.has_value()) {
    return std::nullopt;
  }
  STD_TORCH_CHECK(bank->dim() == 3 && bank->size(0) == rows.size(0) && bank->size(2) == rows.size(2) &&
                      bank->scalar_type() == rows.scalar_type() && bank->is_cpu(),
                  name, ": expected [B, M, D] of the dtype and device of the rows it follows");
  return dense_rows(*bank);
}

// A plan's [B, L] tensor, contiguous.
inline Tensor check_plan(const char* name, const Tensor& tensor, const Tensor& rows, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows.size(0) && tensor.size(1) == rows.size(1) &&
                      tensor.scalar_type() == dtype && tensor.is_cpu(),
                  name, ": expected a CPU tensor [B, L] of the plan's dtype");
  return torch::stable::contiguous(tensor);
}

inline void check_rows(const char* name, const Tensor& rows) {
  STD_TORCH_CHECK(rows.dim() == 3 && rows.is_cpu(), name, ": expected a CPU tensor of 3 dimensions");
}

// Every index of a plan or of token ids lies in [0, size). Read here, before any thread starts.
template <typename Index>
void check_range(const char* name, const Index* index, int64_t count, int64_t size) {
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < size, name, ": index ", index[i], " is out of range [0, ",
                    size, ")");
  }
}

// Rows of `width` values that make a piece of work worth a thread: about 32 KiB of output.
inline int64_t rows_per_thread(int64_t width, int64_t element_size) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width * element_size));
}

}  // namespace memkern
