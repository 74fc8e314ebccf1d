#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>
#include <vector>

#include "heads.h"

namespace memkern {
namespace {

// The memory that one block of queries of a sequence reads and writes.
template <typename T>
struct Block {
  const T* q;  // [rows, H, D]
  int64_t rows;
  const float* weight;  // [padded(n)]
  float* by_key;        // [H, padded(n)], zeros
  float* by_query;      // [H, rows] with a stride of `queries`
  int64_t queries;
};

// `heads` of the packed ones from `first` on; `buffer` is for the rows as float and add_mass()'s scratch.
template <typename T>
void add_block(const Heads& packed, int64_t first, int64_t heads, const Block<T>& block, float* buffer) {
  const int64_t width = packed[first].width;
  const int64_t row = heads * width;
  to_float(block.q, buffer, block.rows * row);
  for (int64_t h = 0; h < heads; ++h) {
    add_mass(packed[first + h], buffer + h * width, row, block.rows, block.weight,
             block.by_key + h * packed.padded_keys(), block.by_query + h * block.queries,
             buffer + kBlock * row);
  }
}

// [B, padded(n)], zeros after the keys.
std::vector<float> pad_weight(const Tensor& weight) {
  const int64_t keys = weight.size(1);
  std::vector<float> wide(weight.size(0) * padded(keys), 0.0f);
  for (int64_t b = 0; b < weight.size(0); ++b) {
    to_float(weight.const_data_ptr<float>() + b * keys, wide.data() + b * padded(keys), keys);
  }
  return wide;
}

// Schema: memkern/ops/cpu.py. q is [B, N, H, D], k [B, H, n, D]; sums [B, H, n] over queries, and [B, H, N].
std::tuple<Tensor, Tensor> attention_mass(Tensor q, Tensor k, Tensor bias, Tensor weight, double scale) {
  check_queries(q);
  check_keys(k, q);
  check_bias(bias, k);
  STD_TORCH_CHECK(weight.dim() == 2 && weight.is_cpu() && weight.scalar_type() == ScalarType::Float &&
                      weight.is_contiguous() && weight.size(0) == k.size(0) && weight.size(1) == k.size(2),
                  "weight: expected a contiguous float32 CPU tensor [B, n]");
  const int64_t batch = q.size(0), queries = q.size(1), heads = q.size(2), keys = k.size(2);
  const int64_t row = heads * q.size(3), sums = heads * padded(keys);
  Tensor by_key = torch::stable::new_zeros(bias, {batch, heads, keys});
  Tensor by_query = torch::stable::new_zeros(bias, {batch, heads, queries});
  const int64_t blocks = (queries + kBlock - 1) / kBlock;
  if (q.numel() == 0 || keys == 0) {
    return {by_key, by_query};
  }
  std::vector<float> by_block(batch * blocks * sums, 0.0f);
  const std::vector<float> weights = pad_weight(weight);
  float* masses = by_query.mutable_data_ptr<float>();
  THO_DISPATCH_V2(q.scalar_type(), "attention_mass", AT_WRAP([&] {
                    const Heads packed = pack_heads<scalar_t>(k, nullptr, bias, static_cast<float>(scale));
                    const scalar_t* q_data = q.const_data_ptr<scalar_t>();
                    torch::stable::parallel_for(0, batch * blocks, 1, [&](int64_t begin, int64_t end) {
                      std::vector<float> buffer(kBlock * row + packed.scratch());
                      for (int64_t i = begin; i < end; ++i) {
                        const int64_t b = i / blocks, first = i % blocks * kBlock;
                        add_block<scalar_t>(
                            packed, b * heads, heads,
                            {q_data + (b * queries + first) * row, std::min(kBlock, queries - first),
                             weights.data() + b * padded(keys), by_block.data() + i * sums,
                             masses + b * heads * queries + first, queries},
                            buffer.data());
                      }
                    });
                  }),
                  ScalarType::Float, ScalarType::Half, ScalarType::BFloat16);
  float* totals = by_key.mutable_data_ptr<float>();
  for (int64_t i = 0; i < batch * blocks; ++i) {
    for (int64_t h = 0; h < heads; ++h) {
      float* total = totals + (i / blocks * heads + h) * keys;
      add(total, by_block.data() + i * sums + h * padded(keys), total, keys);
    }
  }
  return {by_key, by_query};
}

}  // namespace
}  // namespace memkern

STABLE_TORCH_LIBRARY_IMPL(memkern_cpu, CPU, m) {
  m.impl("attention_mass", TORCH_BOX(&memkern::attention_mass));
}
