#include <torch/csrc/stable/library.h>

#include "../tensors.h"
#include "launch.h"
#include "stream.h"

namespace memkern {
namespace {

template <typename T>
const char* launch(const Lookup& lookup, int64_t pad_id, int32_t device) {
  const EmbedTokens<T> embed{
      lookup.ids.const_data_ptr<int64_t>(),
      lookup.roles.const_data_ptr<uint8_t>(),
      lookup.tokens.const_data_ptr<T>(),
      lookup.positions.const_data_ptr<T>(),
      lookup.out.mutable_data_ptr<T>(),
      lookup.tokens.stride(0),
      lookup.positions.stride(0),
      lookup.count(),
      lookup.length(),
      lookup.vocabulary(),
      lookup.width(),
      pad_id,
      kPad,
  };
  return launch_embed_tokens(embed, device, current_stream(device));
}

Tensor embed_tokens(Tensor input_ids, Tensor roles, Tensor token_weight, Tensor position_weight,
                    int64_t pad_id) {
  const Lookup lookup = check_lookup(input_ids, roles, token_weight, position_weight, pad_id);
  STD_TORCH_CHECK(lookup.ids.is_cuda(), "memkern_cuda: expected CUDA tensors");
  const int32_t device = lookup.ids.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  if (lookup.out.numel() == 0) {
    return lookup.out;
  }
  const char* error = nullptr;
  MEMKERN_DISPATCH(lookup.tokens.scalar_type(), "embed_tokens",
                   [&] { error = launch<scalar_t>(lookup, pad_id, device); });
  STD_TORCH_CHECK(error == nullptr, "memkern_cuda: ", error);
  return lookup.out;
}

}  // namespace
}  // namespace memkern

STABLE_TORCH_LIBRARY_IMPL(memkern_cuda, CUDA, m) {
  m.impl("embed_tokens", TORCH_BOX(&memkern::embed_tokens));
}
