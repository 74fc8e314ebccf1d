// A matrix packed for multiplication from the left with many rows: panels of kPanel columns, one after
// another, zeros after the last column. The factors are float32 or, if the processor can, bfloat16; the sums
// are float32.
#pragma once

#include <torch/headeronly/util/BFloat16.h>

#include <cstdint>

namespace memkern {

using BFloat16 = torch::headeronly::BFloat16;

constexpr int64_t kPanel = 48;
inline int64_t count_panels(int64_t columns) { return (columns + kPanel - 1) / kPanel; }

struct Panels {
  int64_t inner;     // C, even if the data is bfloat16
  int64_t columns;   // O
  const void* data;  // float [panels, C, kPanel], or BFloat16 [panels, C / 2, kPanel, 2]

  int64_t stride() const { return count_panels(columns) * kPanel; }
};

// True if the processor has bfloat16 products.
bool multiplies_bfloat16();

// out [rows, stride()] = left [rows, C] right; values after the last column are undefined.
void multiply_panels(const float* left, int64_t rows, const Panels& right, float* out);
void multiply_panels(const BFloat16* left, int64_t rows, const Panels& right, float* out);

}  // namespace memkern
