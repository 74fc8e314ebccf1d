#include <torch/csrc/stable/library.h>

#include <limits>
#include <vector>

#include "../tensors.h"
#include "attention.h"
#include "numeric.h"
#include "work.h"

namespace memkern {
namespace {

// The bias as attend() wants it, [heads or 1, padded(keys)].
std::vector<float> pad_bias(const float* bias, int64_t rows, int64_t keys) {
  std::vector<float> wide(rows * padded(keys), -std::numeric_limits<float>::infinity());
  for (int64_t row = 0; row < rows; ++row) {
    to_float(bias + row * keys, wide.data() + row * padded(keys), keys);
  }
  return wide;
}

// Rows [begin, end) of logits [rows, heads, keys].
template <typename T>
void softmax_rows(T* logits, const float* bias, int64_t bias_stride, int64_t heads, int64_t keys,
                  int64_t begin, int64_t end) {
  const int64_t count = heads * keys;
  std::vector<float> wide(count + kPadding), weights(padded(keys)), out(count + kPadding);
  for (int64_t row = begin; row < end; ++row) {
    T* values = logits + row * count;
    to_float(values, wide.data(), count);
    softmax_heads(wide.data(), bias, bias_stride, heads, keys, weights.data(), out.data());
    from_float(out.data(), values, count);
  }
}

// In place; schema: memkern/ops/cpu.py
void biased_softmax(Tensor logits, Tensor bias) {
  STD_TORCH_CHECK(logits.dim() == 3 && logits.is_cpu() && logits.is_contiguous(),
                  "logits: expected a contiguous CPU tensor [N, H, n]");
  STD_TORCH_CHECK(bias.dim() == 2 && bias.is_cpu() && bias.scalar_type() == ScalarType::Float &&
                      bias.is_contiguous() && (bias.size(0) == 1 || bias.size(0) == logits.size(1)) &&
                      bias.size(1) == logits.size(2),
                  "bias: expected a contiguous float32 CPU tensor [1, n] or [H, n]");
  const int64_t heads = logits.size(1);
  const int64_t keys = logits.size(2);
  if (logits.numel() == 0) {
    return;
  }
  const std::vector<float> padded_bias = pad_bias(bias.const_data_ptr<float>(), bias.size(0), keys);
  const int64_t bias_stride = bias.size(0) == 1 ? 0 : padded(keys);
  const int64_t grain = rows_per_thread(heads * keys, sizeof(float));
  THO_DISPATCH_V2(logits.scalar_type(), "biased_softmax", AT_WRAP([&] {
                    scalar_t* data = logits.mutable_data_ptr<scalar_t>();
                    torch::stable::parallel_for(0, logits.size(0), grain, [&](int64_t begin, int64_t end) {
                      softmax_rows(data, padded_bias.data(), bias_stride, heads, keys, begin, end);
                    });
                  }),
                  ScalarType::Float, ScalarType::Half, ScalarType::BFloat16);
}

}  // namespace
}  // namespace memkern

STABLE_TORCH_LIBRARY_IMPL(memkern_cpu, CPU, m) {
  m.impl("biased_softmax_", TORCH_BOX(&memkern::biased_softmax));
}
