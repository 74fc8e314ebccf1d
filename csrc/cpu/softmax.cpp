#include "softmax.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "numeric.h"

namespace memkern {
namespace {

constexpr float kExcluded = -std::numeric_limits<float>::infinity();

// exp(x) for x <= 0, to 2 units in the last place; 0 below e^-87, -inf included. NaN stays.
MEMKERN_INLINE float exp_nonpositive(float x) {
  constexpr float kLog2e = 1.44269504f;
  constexpr float kLn2High = 0.693145752f;
  constexpr float kLn2Low = 1.42860677e-6f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * kLog2e + kRound;
  const float whole = shifted - kRound;
  const float rest = (clamped - whole * kLn2High) - whole * kLn2Low;
  float series = rest * 1.38888889e-3f + 8.33333333e-3f;
  series = series * rest + 4.16666667e-2f;
  series = series * rest + 1.66666667e-1f;
  series = series * rest + 0.5f;
  series = series * rest + 1.0f;
  series = series * rest + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  const uint32_t power = (bits << 23) + 0x3f800000u;
  float scale;
  std::memcpy(&scale, &power, sizeof(scale));
  return x < -87.0f ? 0.0f : series * scale;
}

// One head. The pragmas allow sums and maxima in lanes, which the order of floating point forbids otherwise.
MEMKERN_INLINE void softmax(float* __restrict__ logits, const float* __restrict__ bias, int64_t keys) {
  float top = kExcluded;
#pragma omp simd reduction(max : top)
  for (int64_t i = 0; i < keys; ++i) {
    const float value = bias[i] == kExcluded ? kExcluded : logits[i] + bias[i];
    logits[i] = value;
    top = top > value ? top : value;
  }
  const float shift = top == kExcluded ? 0.0f : top;
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < keys; ++i) {
    const float weight = exp_nonpositive(logits[i] - shift);
    logits[i] = weight;
    total += weight;
  }
  const float inverse = total == 0.0f ? 1.0f : 1.0f / total;
#pragma omp simd
  for (int64_t i = 0; i < keys; ++i) {
    logits[i] *= inverse;
  }
}

}  // namespace

MEMKERN_CLONES void softmax_heads(float* logits, const float* bias, int64_t bias_stride, int64_t heads,
                                  int64_t keys) {
  for (int64_t head = 0; head < heads; ++head) {
    softmax(logits + head * keys, bias + head * bias_stride, keys);
  }
}

}  // namespace memkern
