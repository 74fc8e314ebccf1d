// A plan on rows, for edit_embeds and edit_kv: out[b, l] = scale[b, l] * rows[b, source[b, l]].
// Arithmetic is float (double for double), rounded once, as in the torch reference.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "geometry.h"
#include "parameters.h"

namespace memkern {

// blockIdx.y is 0 for `first` and 1 for `second`: K and V in one launch. A source out of range gives a row of
// NaN, since reporting it would need a device sync. A scale of 0 gives 0, and the row is not read.
template <typename T, int kSize>
__global__ void edit_rows_kernel(EditRows<T> first, EditRows<T> second, EditPlan plan) {
  using wide = typename Wide<T>::type;
  // A copy, since a reference to one of the two would put both into local memory.
  const EditRows<T> edit = blockIdx.y == 0 ? first : second;
  const int64_t rows_at_once = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; i < plan.count;
       i += rows_at_once) {
    const int64_t source = plan.source[i];
    const float scale = edit.scale[i];
    const bool valid = source >= 0 && source < plan.length + plan.bank_length;
    const T* row = nullptr;
    if (valid && scale != 0.0f) {
      const int64_t batch = i / plan.length;
      row = source < plan.length ? edit.rows.at(batch, source) : edit.bank.at(batch, source - plan.length);
    }
    T* out = edit.out + i * plan.width;
    for (int64_t column = static_cast<int64_t>(threadIdx.x) * kSize; column < plan.width;
         column += static_cast<int64_t>(blockDim.x) * kSize) {
      Vector<T, kSize> vector;
      if (row == nullptr) {
        for (int v = 0; v < kSize; ++v) {
          vector.values[v] = static_cast<T>(valid ? 0.0f : nanf(""));
        }
      } else {
        vector = *reinterpret_cast<const Vector<T, kSize>*>(row + column);
        if (scale != 1.0f) {
          for (int v = 0; v < kSize; ++v) {
            vector.values[v] = static_cast<T>(static_cast<wide>(vector.values[v]) * static_cast<wide>(scale));
          }
        }
      }
      *reinterpret_cast<Vector<T, kSize>*>(out + column) = vector;
    }
  }
}

// The launch geometry for `tensors` edits, 1 or 2.
template <typename T>
Geometry edit_rows_geometry(const EditRows<T>* edits, int tensors, const EditPlan& plan) {
  const bool aligned = std::all_of(edits, edits + tensors, [](const EditRows<T>& edit) {
    return starts_at_16_bytes(edit.rows) && starts_at_16_bytes(edit.bank) && starts_at_16_bytes(edit.out);
  });
  return cover<T>(plan.count, plan.width, aligned);
}

}  // namespace memkern
