#include <torch/csrc/stable/library.h>

#include "../tensors.h"
#include "rows.h"
#include "work.h"

namespace memkern {
namespace {

// out[b, l] = scale[b, l] * rows[b, source[b, l]]
Tensor edit_embeds(Tensor embeds, std::optional<Tensor> bank, Tensor source, Tensor scale) {
  const Edit edit = check_edit("embeds", embeds, "bank", bank, "scale", scale);
  const Tensor sources = check_plan("source", source, embeds, ScalarType::Int);
  const int32_t* source_data = sources.const_data_ptr<int32_t>();
  check_range("source", source_data, edit.count(), edit.length() + edit.bank_length());
  if (edit.out.numel() == 0) {
    return edit.out;
  }
  MEMKERN_DISPATCH(embeds.scalar_type(), "edit_embeds", [&] {
    const Rows<scalar_t> rows = view_rows<scalar_t>(edit.rows);
    const Rows<scalar_t> extra = view_rows<scalar_t>(edit.bank);
    const float* scale_data = edit.scale.const_data_ptr<float>();
    scalar_t* out = edit.out.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(
        0, edit.count(), rows_per_thread(edit.width(), sizeof(scalar_t)), [&](int64_t begin, int64_t end) {
          edit_rows(rows, extra, edit.length(), source_data, scale_data, out, edit.width(), begin, end);
        });
  });
  return edit.out;
}

}  // namespace
}  // namespace memkern

STABLE_TORCH_LIBRARY_IMPL(memkern, CPU, m) { m.impl("edit_embeds", TORCH_BOX(&memkern::edit_embeds)); }
