#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "../tensors.h"
#include "heads.h"
#include "numeric.h"

namespace memkern {
namespace {

// `rows` queries of one sequence, q and out [rows, H * D], its heads from `first` on. `buffer` is for the
// rows as float and the scratch of attend().
template <typename T>
void attend_block(const Heads& packed, int64_t first, int64_t heads, int64_t width, const T* q, int64_t rows,
                  T* out, float* buffer) {
  const int64_t row = heads * width;
  if constexpr (std::is_same_v<T, float>) {
    for (int64_t h = 0; h < heads; ++h) {
      attend(packed[first + h], q + h * width, row, rows, out + h * width, row, buffer);
    }
  } else {
    float* wide_out = buffer + rows * row;
    to_float(q, buffer, rows * row);
    attend_block(packed, first, heads, width, const_cast<const float*>(buffer), rows, wide_out,
                 wide_out + rows * row);
    from_float(wide_out, out, rows * row);
  }
}

// Schema: memkern/ops/cpu.py. q is [B, N, H, D], k and v [B, H, n, D]; the output [B, N, H, D].
Tensor biased_attention(Tensor q, Tensor k, Tensor v, Tensor bias, double scale) {
  check_queries(q);
  const int64_t batch = q.size(0);
  const int64_t queries = q.size(1);
  const int64_t heads = q.size(2);
  const int64_t width = q.size(3);
  for (const Tensor* rows : {&k, &v}) {
    check_keys(*rows, q);
    STD_TORCH_CHECK(rows->size(2) == k.size(2), "v: expected as many rows as k has");
  }
  check_bias(bias, k);
  Tensor out = torch::stable::empty_like(q);
  if (q.numel() == 0) {
    return out;
  }
  const int64_t blocks = (queries + kBlock - 1) / kBlock;
  THO_DISPATCH_V2(
      q.scalar_type(), "biased_attention", AT_WRAP([&] {
        const Heads packed = pack_heads<scalar_t>(k, &v, bias, static_cast<float>(scale));
        const scalar_t* q_data = q.const_data_ptr<scalar_t>();
        scalar_t* out_data = out.mutable_data_ptr<scalar_t>();
        const int64_t row_width = heads * width;
        torch::stable::parallel_for(0, batch * blocks, 1, [&](int64_t begin, int64_t end) {
          std::vector<float> buffer(2 * kBlock * row_width + packed.scratch());
          for (int64_t block = begin; block < end; ++block) {
            const int64_t b = block / blocks, first = block % blocks * kBlock;
            const int64_t rows = std::min(kBlock, queries - first), at = (b * queries + first) * row_width;
            attend_block(packed, b * heads, heads, width, q_data + at, rows, out_data + at, buffer.data());
          }
        });
      }),
      ScalarType::Float, ScalarType::Half, ScalarType::BFloat16);
  return out;
}

}  // namespace
}  // namespace memkern

STABLE_TORCH_LIBRARY_IMPL(memkern_cpu, CPU, m) {
  m.impl("biased_attention", TORCH_BOX(&memkern::biased_attention));
}
