#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "../tensors.h"
#include "attention.h"
#include "numeric.h"
#include "panels.h"
#include "work.h"

namespace memkern {
namespace {

// The bias as attend() expects it, [heads or 1, padded(keys)].
std::vector<float> pad_bias(const float* bias, int64_t rows, int64_t keys) {
  std::vector<float> wide(rows * padded(keys), -std::numeric_limits<float>::infinity());
  for (int64_t row = 0; row < rows; ++row) {
    to_float(bias + row * keys, wide.data() + row * padded(keys), keys);
  }
  return wide;
}

void check_bias(const Tensor& bias, int64_t heads) {
  STD_TORCH_CHECK(bias.dim() == 2 && bias.is_cpu() && bias.scalar_type() == ScalarType::Float &&
                      bias.is_contiguous() && (bias.size(0) == 1 || bias.size(0) == heads),
                  "bias: expected a contiguous float32 CPU tensor [1, n] or [H, n]");
}

// In place; schema: memkern/ops/cpu.py
void biased_softmax(Tensor logits, Tensor bias) {
  STD_TORCH_CHECK(logits.dim() == 3 && logits.is_cpu() && logits.is_contiguous() &&
                      logits.scalar_type() == ScalarType::Float,
                  "logits: expected a contiguous float32 CPU tensor [N, H, n]");
  const int64_t heads = logits.size(1);
  const int64_t keys = logits.size(2);
  check_bias(bias, heads);
  STD_TORCH_CHECK(bias.size(1) == keys, "bias: expected as many keys as logits has");
  if (logits.numel() == 0) {
    return;
  }
  const std::vector<float> padded_bias = pad_bias(bias.const_data_ptr<float>(), bias.size(0), keys);
  const int64_t bias_stride = bias.size(0) == 1 ? 0 : padded(keys);
  const int64_t count = heads * keys;
  float* data = logits.mutable_data_ptr<float>();
  const int64_t grain = rows_per_thread(count, sizeof(float));
  torch::stable::parallel_for(0, logits.size(0), grain, [&](int64_t begin, int64_t end) {
    std::vector<float> wide(count + kPadding), weights(padded(keys)), out(count + kPadding);
    for (int64_t row = begin; row < end; ++row) {
      std::copy_n(data + row * count, count, wide.data());
      softmax_heads(wide.data(), padded_bias.data(), bias_stride, heads, keys, weights.data(), out.data());
      std::copy_n(out.data(), count, data + row * count);
    }
  });
}

constexpr int64_t kGroup = 8;        // rows whose products are computed together
constexpr int64_t kRowsAtOnce = 48;  // rows whose logits stay in the second-level cache until the softmax

// The logits of some rows of x.
template <typename T>
void multiply_rows(const T* x, int64_t rows, const Panels& a, bool in_pairs, float* wide, float* logits) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (in_pairs) {
      multiply_panels(x, rows, a, logits);
      return;
    }
  }
  to_float(x, wide, rows * a.inner);
  multiply_panels(wide, rows, a, logits);
}

// Schema: memkern/ops/cpu.py
Tensor absorbed_softmax(Tensor x, Tensor a, Tensor bias, int64_t heads) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_cpu() && x.is_contiguous(),
                  "x: expected a contiguous CPU tensor [N, C]");
  check_bias(bias, heads);
  const int64_t rows = x.size(0);
  const int64_t keys = bias.size(1);
  const int64_t count = heads * keys;
  const Panels panels{x.size(1), count, a.const_data_ptr()};
  const bool in_pairs = a.scalar_type() == ScalarType::BFloat16;
  const bool known = in_pairs ? multiplies_bfloat16() && x.scalar_type() == ScalarType::BFloat16
                              : a.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(known && a.is_cpu() && a.is_contiguous() && a.numel() == panels.stride() * panels.inner,
                  "a: expected what pack_panels makes of [H * n, C]");
  Tensor out = torch::stable::new_empty(x, {rows, count});
  if (out.numel() == 0) {
    return out;
  }
  const std::vector<float> padded_bias = pad_bias(bias.const_data_ptr<float>(), bias.size(0), keys);
  const int64_t bias_stride = bias.size(0) == 1 ? 0 : padded(keys);
  const int64_t groups = (rows + kGroup - 1) / kGroup;
  THO_DISPATCH_V2(
      x.scalar_type(), "absorbed_softmax", AT_WRAP([&] {
        const scalar_t* x_data = x.const_data_ptr<scalar_t>();
        scalar_t* out_data = out.mutable_data_ptr<scalar_t>();
        torch::stable::parallel_for(0, groups, 1, [&](int64_t begin, int64_t end) {
          std::vector<float> logits(kRowsAtOnce * panels.stride() + kPadding), weights(padded(keys));
          std::vector<float> p(count + kPadding), wide(in_pairs ? 0 : kRowsAtOnce * panels.inner);
          const int64_t last = std::min(rows, end * kGroup);
          for (int64_t first = begin * kGroup; first < last; first += kRowsAtOnce) {
            const int64_t here = std::min(kRowsAtOnce, last - first);
            multiply_rows(x_data + first * panels.inner, here, panels, in_pairs, wide.data(), logits.data());
            for (int64_t row = 0; row < here; ++row) {
              softmax_heads(logits.data() + row * panels.stride(), padded_bias.data(), bias_stride, heads,
                            keys, weights.data(), p.data());
              from_float(p.data(), out_data + (first + row) * count, count);
            }
          }
        });
      }),
      ScalarType::Float, ScalarType::Half, ScalarType::BFloat16);
  return out;
}

}  // namespace
}  // namespace memkern

STABLE_TORCH_LIBRARY_IMPL(memkern_cpu, CPU, m) {
  m.impl("biased_softmax_", TORCH_BOX(&memkern::biased_softmax));
  m.impl("absorbed_softmax", TORCH_BOX(&memkern::absorbed_softmax));
}
