#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../tensors.h"
#include "launch.h"
#include "stream.h"

namespace memkern {
namespace {

using torch::stable::accelerator::DeviceGuard;

template <typename T>
EditRows<T> view(const Edit& edit) {
  return {view_rows<T>(edit.rows), view_rows<T>(edit.bank), edit.scale.const_data_ptr<float>(),
          edit.out.mutable_data_ptr<T>()};
}

// One edit, or K's and V's in one launch.
template <typename T>
const char* launch(const Edit& first, const Edit& last, int tensors, const EditPlan& plan, int32_t device) {
  const EditRows<T> edits[] = {view<T>(first), view<T>(last)};
  return launch_edit_rows(edits, tensors, plan, device, current_stream(device));
}

// Fills the outputs of `tensors` edits, 1 or 2, that share `source`.
void run(const Edit& first, const Edit& last, int tensors, const Tensor& source) {
  STD_TORCH_CHECK(first.rows.is_cuda(), "memkern_cuda: expected CUDA tensors");
  const Tensor sources = check_plan("source", source, first.rows, ScalarType::Int);
  const int32_t device = first.rows.get_device_index();
  const DeviceGuard guard(device);
  if (first.out.numel() == 0) {
    return;
  }
  const EditPlan plan{sources.const_data_ptr<int32_t>(), first.count(), first.length(), first.bank_length(),
                      first.width()};
  const char* error = nullptr;
  MEMKERN_DISPATCH(first.rows.scalar_type(), "edit_rows",
                   [&] { error = launch<scalar_t>(first, last, tensors, plan, device); });
  STD_TORCH_CHECK(error == nullptr, "memkern_cuda: ", error);
}

Tensor edit_embeds(Tensor embeds, std::optional<Tensor> bank, Tensor source, Tensor scale) {
  const Edit edit = check_edit("embeds", embeds, "bank", bank, "scale", scale);
  run(edit, edit, 1, source);
  return edit.out;
}

std::tuple<Tensor, Tensor> edit_kv(Tensor k, Tensor v, std::optional<Tensor> k_bank,
                                   std::optional<Tensor> v_bank, Tensor source, Tensor k_scale,
                                   Tensor v_scale) {
  const Edit k_edit = check_edit("k", k, "k_bank", k_bank, "k_scale", k_scale);
  const Edit v_edit = check_edit("v", v, "v_bank", v_bank, "v_scale", v_scale);
  check_pair(k_edit, v_edit);
  run(k_edit, v_edit, 2, source);
  return {k_edit.out, v_edit.out};
}

}  // namespace
}  // namespace memkern

STABLE_TORCH_LIBRARY_IMPL(memkern_cuda, CUDA, m) {
  m.impl("edit_embeds", TORCH_BOX(&memkern::edit_embeds));
  m.impl("edit_kv", TORCH_BOX(&memkern::edit_kv));
}
