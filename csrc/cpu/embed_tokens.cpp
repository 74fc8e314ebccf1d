#include <torch/csrc/stable/library.h>

#include "tensors.h"

namespace memkern {
namespace {

constexpr uint8_t kPad = 3;  // memkern.Role.PAD

// Pad swap, token gather and position add; schema and contract: memkern/ops/embed_tokens.py
Tensor embed_tokens(Tensor input_ids, Tensor roles, Tensor token_weight, Tensor position_weight,
                    int64_t pad_id) {
  STD_TORCH_CHECK(input_ids.dim() == 2 && input_ids.scalar_type() == ScalarType::Long && input_ids.is_cpu(),
                  "input_ids: expected a CPU int64 tensor [B, L]");
  STD_TORCH_CHECK(roles.dim() == 2 && roles.size(0) == input_ids.size(0) &&
                      roles.size(1) == input_ids.size(1) && roles.scalar_type() == ScalarType::Byte &&
                      roles.is_cpu(),
                  "roles: expected a CPU uint8 tensor of the shape of input_ids");
  STD_TORCH_CHECK(token_weight.dim() == 2 && position_weight.dim() == 2 &&
                      token_weight.size(1) == position_weight.size(1) &&
                      token_weight.scalar_type() == position_weight.scalar_type() && token_weight.is_cpu() &&
                      position_weight.is_cpu(),
                  "token_weight, position_weight: expected CPU tensors [V, D] and [P, D] of one dtype");
  STD_TORCH_CHECK(input_ids.size(1) <= position_weight.size(0), "input_ids: more positions than [P, D] has");
  const int64_t vocabulary = token_weight.size(0);
  STD_TORCH_CHECK(pad_id >= 0 && pad_id < vocabulary, "pad_id: index ", pad_id, " is out of range [0, ",
                  vocabulary, ")");

  const Tensor ids = torch::stable::contiguous(input_ids);
  const Tensor role_rows = torch::stable::contiguous(roles);
  const Tensor tokens = dense_rows(token_weight);
  const Tensor positions = dense_rows(position_weight);
  const int64_t length = ids.size(1);
  const int64_t width = tokens.size(1);
  const int64_t count = ids.size(0) * length;
  const int64_t* id_data = ids.const_data_ptr<int64_t>();
  const uint8_t* role_data = role_rows.const_data_ptr<uint8_t>();
  check_range("input_ids", id_data, count, vocabulary);

  Tensor out = torch::stable::new_empty(tokens, {ids.size(0), length, width});
  if (out.numel() == 0) {
    return out;
  }
  MEMKERN_DISPATCH(tokens.scalar_type(), "embed_tokens", [&] {
    const scalar_t* token_data = tokens.const_data_ptr<scalar_t>();
    const scalar_t* position_data = positions.const_data_ptr<scalar_t>();
    const int64_t token_stride = tokens.stride(0);
    const int64_t position_stride = positions.stride(0);
    scalar_t* out_data = out.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(
        0, count, rows_per_thread(width, sizeof(scalar_t)), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t id = role_data[i] == kPad ? pad_id : id_data[i];
            add(token_data + id * token_stride, position_data + (i % length) * position_stride,
                out_data + i * width, width);
          }
        });
  });
  return out;
}

}  // namespace
}  // namespace memkern

STABLE_TORCH_LIBRARY_IMPL(memkern, CPU, m) { m.impl("embed_tokens", TORCH_BOX(&memkern::embed_tokens)); }
