#include <torch/csrc/stable/library.h>

#include <tuple>

#include "tensors.h"

namespace memkern {
namespace {

// K and V read the same rows, each with its own scale; schema and contract: memkern/ops/edit_kv.py
std::tuple<Tensor, Tensor> edit_kv(Tensor k, Tensor v, std::optional<Tensor> k_bank,
                                   std::optional<Tensor> v_bank, Tensor source, Tensor k_scale,
                                   Tensor v_scale) {
  check_rows("k", k);
  check_rows("v", v);
  STD_TORCH_CHECK(k.size(0) == v.size(0) && k.size(1) == v.size(1) && k.size(2) == v.size(2) &&
                      k.scalar_type() == v.scalar_type(),
                  "v: expected the shape and dtype of k");
  STD_TORCH_CHECK(k_bank.has_value() == v_bank.has_value(), "k_bank, v_bank: expected both or neither");
  const Tensor k_rows = dense_rows(k);
  const Tensor v_rows = dense_rows(v);
  const std::optional<Tensor> k_extra = check_bank("k_bank", k_bank, k);
  const std::optional<Tensor> v_extra = check_bank("v_bank", v_bank, v);
  const Tensor sources = check_plan("source", source, k, ScalarType::Int);
  const Tensor k_scales = check_plan("k_scale", k_scale, k, ScalarType::Float);
  const Tensor v_scales = check_plan("v_scale", v_scale, k, ScalarType::Float);

  const int64_t length = k.size(1);
  const int64_t width = k.size(2);
  const int64_t count = k.size(0) * length;
  const int64_t bank_length = k_extra.has_value() ? k_extra->size(1) : 0;
  STD_TORCH_CHECK(!v_extra.has_value() || v_extra->size(1) == bank_length,
                  "v_bank: expected the shape of k_bank");
  const int32_t* source_data = sources.const_data_ptr<int32_t>();
  check_range("source", source_data, count, length + bank_length);

  Tensor k_out = torch::stable::new_empty(k, {k.size(0), length, width});
  Tensor v_out = torch::stable::new_empty(v, {v.size(0), length, width});
  if (k_out.numel() == 0) {
    return {k_out, v_out};
  }
  const float* k_scale_data = k_scales.const_data_ptr<float>();
  const float* v_scale_data = v_scales.const_data_ptr<float>();
  MEMKERN_DISPATCH(k.scalar_type(), "edit_kv", [&] {
    const Rows<scalar_t> k_from = view_rows<scalar_t>(k_rows);
    const Rows<scalar_t> v_from = view_rows<scalar_t>(v_rows);
    const Rows<scalar_t> k_from_bank = view_rows<scalar_t>(k_extra);
    const Rows<scalar_t> v_from_bank = view_rows<scalar_t>(v_extra);
    scalar_t* k_data = k_out.mutable_data_ptr<scalar_t>();
    scalar_t* v_data = v_out.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(
        0, count, rows_per_thread(2 * width, sizeof(scalar_t)), [&](int64_t begin, int64_t end) {
          edit_rows(k_from, k_from_bank, length, source_data, k_scale_data, k_data, width, begin, end);
          edit_rows(v_from, v_from_bank, length, source_data, v_scale_data, v_data, width, begin, end);
        });
  });
  return {k_out, v_out};
}

}  // namespace
}  // namespace memkern

STABLE_TORCH_LIBRARY_IMPL(memkern, CPU, m) { m.impl("edit_kv", TORCH_BOX(&memkern::edit_kv)); }
