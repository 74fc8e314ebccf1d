#include <torch/csrc/stable/library.h>

#include "tensors.h"

namespace memkern {
namespace {

// out[b, l] = scale[b, l] * rows[b, source[b, l]]; schema and contract: memkern/ops/edit_embeds.py
Tensor edit_embeds(Tensor embeds, std::optional<Tensor> bank, Tensor source, Tensor scale) {
  check_rows("embeds", embeds);
  const Tensor rows = dense_rows(embeds);
  const std::optional<Tensor> extra = check_bank("bank", bank, embeds);
  const Tensor sources = check_plan("source", source, embeds, ScalarType::Int);
  const Tensor scales = check_plan("scale", scale, embeds, ScalarType::Float);

  const int64_t length = embeds.size(1);
  const int64_t width = embeds.size(2);
  const int64_t count = embeds.size(0) * length;
  const int64_t bank_length = extra.has_value() ? extra->size(1) : 0;
  const int32_t* source_data = sources.const_data_ptr<int32_t>();
  check_range("source", source_data, count, length + bank_length);

  Tensor out = torch::stable::new_empty(embeds, {embeds.size(0), length, width});
  if (out.numel() == 0) {
    return out;
  }
  const float* scale_data = scales.const_data_ptr<float>();
  MEMKERN_DISPATCH(embeds.scalar_type(), "edit_embeds", [&] {
    const Rows<scalar_t> from = view_rows<scalar_t>(rows);
    const Rows<scalar_t> from_bank = view_rows<scalar_t>(extra);
    scalar_t* out_data = out.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(
        0, count, rows_per_thread(width, sizeof(scalar_t)), [&](int64_t begin, int64_t end) {
          edit_rows(from, from_bank, length, source_data, scale_data, out_data, width, begin, end);
        });
  });
  return out;
}

}  // namespace
}  // namespace memkern

STABLE_TORCH_LIBRARY_IMPL(memkern, CPU, m) { m.impl("edit_embeds", TORCH_BOX(&memkern::edit_embeds)); }
