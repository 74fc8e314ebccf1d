// Parts that the op files of the CPU and of CUDA share: checks of an operator's tensors, strided views, dtype
// dispatch. Schemas and contracts: memkern/ops/<operator>.py
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/Dispatch_v2.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <optional>

#include "rows.h"

namespace memkern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#define MEMKERN_DISPATCH(dtype, name, ...)                                                           \
  THO_DISPATCH_V2(dtype, name, AT_WRAP(__VA_ARGS__), AT_EXPAND(AT_FLOATING_TYPES), ScalarType::Half, \
                  ScalarType::BFloat16)

// The tensor itself if its last dimension is dense, else a contiguous copy.
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

inline bool on_device_of(const Tensor& tensor, const Tensor& other) {
  return tensor.device() == other.device();
}

// A plan's [B, L] tensor, contiguous.
inline Tensor check_plan(const char* name, const Tensor& tensor, const Tensor& rows, ScalarType dtype) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows.size(0) && tensor.size(1) == rows.size(1) &&
                      tensor.scalar_type() == dtype && on_device_of(tensor, rows),
                  name, ": expected [B, L] of the plan's dtype, on the device of the rows");
  return torch::stable::contiguous(tensor);
}

// The tensors that an edit reads and writes: embeddings, or K, or V.
struct Edit {
  Tensor rows;                 // [B, L, D], last dimension dense
  std::optional<Tensor> bank;  // [B, M, D], the rows that follow
  Tensor scale;                // [B, L]
  Tensor out;                  // [B, L, D]

  int64_t length() const { return rows.size(1); }
  int64_t bank_length() const { return bank.has_value() ? bank->size(1) : 0; }
  int64_t width() const { return rows.size(2); }
  int64_t count() const { return rows.size(0) * rows.size(1); }
};

inline Edit check_edit(const char* name, const Tensor& rows, const char* bank_name,
                       const std::optional<Tensor>& bank, const char* scale_name, const Tensor& scale) {
  STD_TORCH_CHECK(rows.dim() == 3, name, ": expected 3 dimensions");
  std::optional<Tensor> extra;
  if (bank.has_value()) {
    STD_TORCH_CHECK(bank->dim() == 3 && bank->size(0) == rows.size(0) && bank->size(2) == rows.size(2) &&
                        bank->scalar_type() == rows.scalar_type() && on_device_of(*bank, rows),
                    bank_name, ": expected [B, M, D] of the dtype and device of the rows it follows");
    extra = dense_rows(*bank);
  }
  return {dense_rows(rows), extra, check_plan(scale_name, scale, rows, ScalarType::Float),
          torch::stable::new_empty(rows, {rows.size(0), rows.size(1), rows.size(2)})};
}

// K and V of one edit: the same shape and dtype, and banks for both or neither.
inline void check_pair(const Edit& k, const Edit& v) {
  STD_TORCH_CHECK(k.rows.size(0) == v.rows.size(0) && k.length() == v.length() && k.width() == v.width() &&
                      k.rows.scalar_type() == v.rows.scalar_type() && on_device_of(v.rows, k.rows),
                  "v: expected the shape, dtype and device of k");
  STD_TORCH_CHECK(k.bank.has_value() == v.bank.has_value(), "k_bank, v_bank: expected both or neither");
  STD_TORCH_CHECK(k.bank_length() == v.bank_length(), "v_bank: expected the shape of k_bank");
}

// The tensors that embed_tokens reads and writes.
struct Lookup {
  Tensor ids;        // int64 [B, L]
  Tensor roles;      // uint8 [B, L]
  Tensor tokens;     // [V, D], last dimension dense
  Tensor positions;  // [P, D], last dimension dense
  Tensor out;        // [B, L, D]

  int64_t length() const { return ids.size(1); }
  int64_t width() const { return tokens.size(1); }
  int64_t vocabulary() const { return tokens.size(0); }
  int64_t count() const { return ids.size(0) * ids.size(1); }
};

constexpr uint8_t kPad = 3;  // memkern.Role.PAD

inline Lookup check_lookup(const Tensor& input_ids, const Tensor& roles, const Tensor& token_weight,
                           const Tensor& position_weight, int64_t pad_id) {
  STD_TORCH_CHECK(input_ids.dim() == 2 && input_ids.scalar_type() == ScalarType::Long,
                  "input_ids: expected int64 [B, L]");
  STD_TORCH_CHECK(roles.dim() == 2 && roles.size(0) == input_ids.size(0) &&
                      roles.size(1) == input_ids.size(1) && roles.scalar_type() == ScalarType::Byte &&
                      on_device_of(roles, input_ids),
                  "roles: expected uint8 of the shape and device of input_ids");
  STD_TORCH_CHECK(token_weight.dim() == 2 && position_weight.dim() == 2 &&
                      token_weight.size(1) == position_weight.size(1) &&
                      token_weight.scalar_type() == position_weight.scalar_type() &&
                      on_device_of(token_weight, input_ids) && on_device_of(position_weight, input_ids),
                  "token_weight, position_weight: expected [V, D] and [P, D] of one dtype, beside input_ids");
  STD_TORCH_CHECK(input_ids.size(1) <= position_weight.size(0), "input_ids: more positions than [P, D] has");
  STD_TORCH_CHECK(pad_id >= 0 && pad_id < token_weight.size(0), "pad_id: index ", pad_id,
                  " is out of range [0, ", token_weight.size(0), ")");
  return {
      torch::stable::contiguous(input_ids), torch::stable::contiguous(roles), dense_rows(token_weight),
      dense_rows(position_weight),
      torch::stable::new_empty(token_weight, {input_ids.size(0), input_ids.size(1), token_weight.size(1)})};
}

}  // namespace memkern
