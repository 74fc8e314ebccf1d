// Attention over biased keys in float, a few queries at a time, so that the data between the products stays
// in the first-level cache.
#pragma once

#include <cstdint>

namespace memkern {

// Rows of keys and of values are padded to 16 floats, so that no loop over them has a rest.
constexpr int64_t kPadding = 15;
inline int64_t padded(int64_t count) { return (count + kPadding) / 16 * 16; }

// A head of one sequence.
struct Head {
  int64_t width;      // D
  int64_t keys;       // up to the last one that is not excluded; with none the output is 0
  const float* k;     // [D, padded(keys)], the attention's scale included
  const float* v;     // [keys, padded(D)]
  const float* bias;  // [padded(keys)]; -inf excludes a key for any logit, and is the padding
};

// Floats that attend() and add_mass() need besides their output.
inline int64_t attention_scratch(const Head& head) { return 4 * (padded(head.keys) + padded(head.width)); }

// softmax(q kᵀ + bias) v of `rows` queries [rows, D] with a row stride, into [rows, D] with another.
void attend(const Head& head, const float* q, int64_t q_stride, int64_t rows, float* out, int64_t out_stride,
            float* scratch);

// p = softmax(q kᵀ + bias) of `rows` queries: by_key [padded(keys)] += their p, by_query [rows] = p weight,
// for a weight [padded(keys)].
void add_mass(const Head& head, const float* q, int64_t q_stride, int64_t rows, const float* weight,
              float* by_key, float* by_query, float* scratch);

// softmax(logits + bias) per head, of the logits [heads, keys] of one query, into `out` of the same shape;
// both have room for kPadding more. The bias is as a Head's, for all heads or with a stride per head.
// `weights` is scratch of padded(keys).
void softmax_heads(const float* logits, const float* bias, int64_t bias_stride, int64_t heads, int64_t keys,
                   float* weights, float* out);

}  // namespace memkern
