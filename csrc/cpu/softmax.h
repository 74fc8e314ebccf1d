// A biased softmax over the keys of each head, in place.
#pragma once

#include <cstdint>

namespace memkern {

// Turns the logits [heads, keys] of one query into probabilities: softmax(logits + bias) per head. `bias` is
// [keys], or [heads, keys] with bias_stride = keys; -inf excludes a key, whatever its logit. A head without
// keys gets 0.
void softmax_heads(float* logits, const float* bias, int64_t bias_stride, int64_t heads, int64_t keys);

}  // namespace memkern
