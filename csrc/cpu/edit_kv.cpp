#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../tensors.h"
#include "rows.h"
#include "work.h"

namespace memkern {
namespace {

// K and V read the same rows, each with its own scale.
std::tuple<Tensor, Tensor> edit_kv(Tensor k, Tensor v, std::optional<Tensor> k_bank,
                                   std::optional<Tensor> v_bank, Tensor source, Tensor k_scale,
                                   Tensor v_scale) {
  const Edit k_edit = check_edit("k", k, "k_bank", k_bank, "k_scale", k_scale);
  const Edit v_edit = check_edit("v", v, "v_bank", v_bank, "v_scale", v_scale);
  check_pair(k_edit, v_edit);
  const Tensor sources = check_plan("source", source, k, ScalarType::Int);
  const int32_t* source_data = sources.const_data_ptr<int32_t>();
  const int64_t length = k_edit.length();
  const int64_t width = k_edit.width();
  check_range("source", source_data, k_edit.count(), length + k_edit.bank_length());
  if (k_edit.out.numel() == 0) {
    return {k_edit.out, v_edit.out};
  }
  MEMKERN_DISPATCH(k.scalar_type(), "edit_kv", [&] {
    const Rows<scalar_t> k_rows = view_rows<scalar_t>(k_edit.rows);
    const Rows<scalar_t> v_rows = view_rows<scalar_t>(v_edit.rows);
    const Rows<scalar_t> k_extra = view_rows<scalar_t>(k_edit.bank);
    const Rows<scalar_t> v_extra = view_rows<scalar_t>(v_edit.bank);
    const float* k_scale_data = k_edit.scale.const_data_ptr<float>();
    const float* v_scale_data = v_edit.scale.const_data_ptr<float>();
    scalar_t* k_out = k_edit.out.mutable_data_ptr<scalar_t>();
    scalar_t* v_out = v_edit.out.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(
        0, k_edit.count(), rows_per_thread(2 * width, sizeof(scalar_t)), [&](int64_t begin, int64_t end) {
          edit_rows(k_rows, k_extra, length, source_data, k_scale_data, k_out, width, begin, end);
          edit_rows(v_rows, v_extra, length, source_data, v_scale_data, v_out, width, begin, end);
        });
  });
  return {k_edit.out, v_edit.out};
}

}  // namespace
}  // namespace memkern

STABLE_TORCH_LIBRARY_IMPL(memkern, CPU, m) { m.impl("edit_kv", TORCH_BOX(&memkern::edit_kv)); }
