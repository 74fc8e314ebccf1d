// The keys and values of all heads, packed for attention.h, and the checks of the tensors they come from.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "../tensors.h"
#include "attention.h"
#include "numeric.h"

namespace memkern {

constexpr int64_t kBlock = 32;  // queries whose head's keys and values stay in the first-level cache

inline void check_queries(const Tensor& q) {
  STD_TORCH_CHECK(q.dim() == 4 && q.is_cpu() && q.is_contiguous(),
                  "q: expected a contiguous CPU tensor [B, N, H, D]");
}

inline void check_keys(const Tensor& rows, const Tensor& q) {
  STD_TORCH_CHECK(rows.dim() == 4 && rows.is_cpu() && rows.scalar_type() == q.scalar_type() &&
                      rows.size(0) == q.size(0) && rows.size(1) == q.size(2) && rows.size(3) == q.size(3) &&
                      (q.size(3) <= 1 || rows.numel() == 0 || rows.stride(3) == 1),
                  "k, v: expected [B, H, n, D] of q's dtype with a dense last dimension");
}

inline void check_bias(const Tensor& bias, const Tensor& k) {
  STD_TORCH_CHECK(bias.dim() == 3 && bias.is_cpu() && bias.scalar_type() == ScalarType::Float &&
                      bias.is_contiguous() && bias.size(0) == k.size(0) &&
                      (bias.size(1) == 1 || bias.size(1) == k.size(1)) && bias.size(2) == k.size(2),
                  "bias: expected a contiguous float32 CPU tensor [B, 1, n] or [B, H, n]");
}

// The heads of all sequences as attend() reads them; excluded rows are 0, so that a NaN in them is not read.
class Heads {
 public:
  // Room for `count` heads, and for their values if `values`.
  Heads(int64_t length, int64_t width, int64_t count, bool values)
      : length_(length),
        width_(width),
        size_((width + 1) * padded(length) + (values ? length * padded(width) : 0)),
        storage_(count * size_) {
    heads_.reserve(count);
  }

  // One more head: rows [length, D] of k and of v, which may be null, and the bias [length].
  template <typename T>
  void add(const T* k, int64_t k_stride, const T* v, int64_t v_stride, const float* bias, float scale) {
    constexpr float kExcluded = -std::numeric_limits<float>::infinity();
    int64_t length = length_;
    while (length > 0 && bias[length - 1] == kExcluded) {
      --length;
    }
    const int64_t keys = padded(length);
    const int64_t columns = padded(width_);
    float* k_out = storage_.data() + heads_.size() * size_;
    float* bias_out = k_out + width_ * keys;
    float* v_out = bias_out + keys;
    std::vector<float> row(width_);
    for (int64_t i = 0; i < keys; ++i) {
      bias_out[i] = i < length ? bias[i] : kExcluded;
      if (bias_out[i] == kExcluded) {
        continue;
      }
      to_float(k + i * k_stride, row.data(), width_);
      for (int64_t d = 0; d < width_; ++d) {
        k_out[d * keys + i] = row[d] * scale;
      }
      if (v != nullptr) {
        to_float(v + i * v_stride, v_out + i * columns, width_);
      }
    }
    heads_.push_back({width_, length, k_out, v_out, bias_out});
    scratch_ = std::max(scratch_, attention_scratch(heads_.back()));
  }

  const Head& operator[](int64_t index) const { return heads_[index]; }
  int64_t padded_keys() const { return padded(length_); }
  int64_t scratch() const { return scratch_; }

 private:
  int64_t length_, width_, size_;
  int64_t scratch_ = 0;
  std::vector<float> storage_;
  std::vector<Head> heads_;
};

template <typename T>
Heads pack_heads(const Tensor& k, const Tensor* v, const Tensor& bias, float scale) {
  Heads packed(k.size(2), k.size(3), k.size(0) * k.size(1), v != nullptr);
  const int64_t bias_step = bias.size(1) == 1 ? 0 : bias.stride(1);
  for (int64_t b = 0; b < k.size(0); ++b) {
    for (int64_t h = 0; h < k.size(1); ++h) {
      const T* values = v == nullptr ? nullptr : v->const_data_ptr<T>() + b * v->stride(0) + h * v->stride(1);
      packed.add(k.const_data_ptr<T>() + b * k.stride(0) + h * k.stride(1), k.stride(2), values,
                 v == nullptr ? 0 : v->stride(2),
                 bias.const_data_ptr<float>() + b * bias.stride(0) + h * bias_step, scale);
    }
  }
  return packed;
}

}  // namespace memkern
