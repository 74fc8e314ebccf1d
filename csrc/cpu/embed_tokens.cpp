#include <torch/csrc/stable/library.h>

#include "../tensors.h"
#include "numeric.h"
#include "work.h"

namespace memkern {
namespace {

// Pad swap, token gather and position add.
Tensor embed_tokens(Tensor input_ids, Tensor roles, Tensor token_weight, Tensor position_weight,
                    int64_t pad_id) {
  const Lookup lookup = check_lookup(input_ids, roles, token_weight, position_weight, pad_id);
  const int64_t* ids = lookup.ids.const_data_ptr<int64_t>();
  const uint8_t* role_data = lookup.roles.const_data_ptr<uint8_t>();
  const int64_t width = lookup.width();
  check_range("input_ids", ids, lookup.count(), lookup.vocabulary());
  if (lookup.out.numel() == 0) {
    return lookup.out;
  }
  MEMKERN_DISPATCH(lookup.tokens.scalar_type(), "embed_tokens", [&] {
    const scalar_t* tokens = lookup.tokens.const_data_ptr<scalar_t>();
    const scalar_t* positions = lookup.positions.const_data_ptr<scalar_t>();
    const int64_t token_stride = lookup.tokens.stride(0);
    const int64_t position_stride = lookup.positions.stride(0);
    scalar_t* out = lookup.out.mutable_data_ptr<scalar_t>();
    torch::stable::parallel_for(
        0, lookup.count(), rows_per_thread(width, sizeof(scalar_t)), [&](int64_t begin, int64_t end) {
          for (int64_t i = begin; i < end; ++i) {
            const int64_t id = role_data[i] == kPad ? pad_id : ids[i];
            add(tokens + id * token_stride, positions + (i % lookup.length()) * position_stride,
                out + i * width, width);
          }
        });
  });
  return lookup.out;
}

}  // namespace
}  // namespace memkern

STABLE_TORCH_LIBRARY_IMPL(memkern, CPU, m) { m.impl("embed_tokens", TORCH_BOX(&memkern::embed_tokens)); }
