#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <limits>
#include <type_traits>
#include <vector>

#include "../tensors.h"
#include "attention.h"
#include "numeric.h"
#include "work.h"

namespace memkern {
namespace {

constexpr int64_t kBlock = 32;  // queries whose head's keys and values stay in the first-level cache

// The heads of all sequences as attend() reads them; excluded rows are 0, so that a NaN in them stays there.
class Heads {
 public:
  Heads(int64_t length, int64_t width, int64_t count)
      : length_(length),
        width_(width),
        size_(width * padded(length) + length * padded(width) + padded(length)),
        storage_(count * size_) {
    heads_.reserve(count);
  }

  // One more head: rows [length, D] of k and v, and the bias [length].
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
    float* v_out = k_out + width_ * keys;
    float* bias_out = v_out + length * columns;
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
      to_float(v + i * v_stride, v_out + i * columns, width_);
    }
    heads_.push_back({width_, length, k_out, v_out, bias_out});
    scratch_ = std::max(scratch_, attention_scratch(heads_.back()));
  }

  const Head& operator[](int64_t index) const { return heads_[index]; }
  int64_t scratch() const { return scratch_; }

 private:
  int64_t length_, width_, size_;
  int64_t scratch_ = 0;
  std::vector<float> storage_;
  std::vector<Head> heads_;
};

template <typename T>
Heads pack(const Tensor& k, const Tensor& v, const Tensor& bias, float scale) {
  Heads packed(k.size(2), k.size(3), k.size(0) * k.size(1));
  const int64_t bias_step = bias.size(1) == 1 ? 0 : bias.stride(1);
  for (int64_t b = 0; b < k.size(0); ++b) {
    for (int64_t h = 0; h < k.size(1); ++h) {
      packed.add(k.const_data_ptr<T>() + b * k.stride(0) + h * k.stride(1), k.stride(2),
                 v.const_data_ptr<T>() + b * v.stride(0) + h * v.stride(1), v.stride(2),
                 bias.const_data_ptr<float>() + b * bias.stride(0) + h * bias_step, scale);
    }
  }
  return packed;
}

// `rows` queries of one sequence, q and out [rows, H * D], its heads from `first` on. `buffer` is for the
// rows as float and what attend() needs.
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
  STD_TORCH_CHECK(q.dim() == 4 && q.is_cpu() && q.is_contiguous(),
                  "q: expected a contiguous CPU tensor [B, N, H, D]");
  const int64_t batch = q.size(0);
  const int64_t queries = q.size(1);
  const int64_t heads = q.size(2);
  const int64_t width = q.size(3);
  for (const Tensor* rows : {&k, &v}) {
    STD_TORCH_CHECK(rows->dim() == 4 && rows->is_cpu() && rows->scalar_type() == q.scalar_type() &&
                        rows->size(0) == batch && rows->size(1) == heads && rows->size(2) == k.size(2) &&
                        rows->size(3) == width && (width <= 1 || rows->numel() == 0 || rows->stride(3) == 1),
                    "k, v: expected [B, H, n, D] of q's dtype with a dense last dimension");
  }
  STD_TORCH_CHECK(bias.dim() == 3 && bias.is_cpu() && bias.scalar_type() == ScalarType::Float &&
                      bias.is_contiguous() && bias.size(0) == batch &&
                      (bias.size(1) == 1 || bias.size(1) == heads) && bias.size(2) == k.size(2),
                  "bias: expected a contiguous float32 CPU tensor [B, 1, n] or [B, H, n]");
  Tensor out = torch::stable::empty_like(q);
  if (q.numel() == 0) {
    return out;
  }
  const int64_t blocks = (queries + kBlock - 1) / kBlock;
  THO_DISPATCH_V2(
      q.scalar_type(), "biased_attention", AT_WRAP([&] {
        const Heads packed = pack<scalar_t>(k, v, bias, static_cast<float>(scale));
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
