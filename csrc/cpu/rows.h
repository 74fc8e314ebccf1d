// Row kernels on raw pointers: what edit_embeds, edit_kv and embed_tokens do to one row of D values.
// Arithmetic is float (double for double), rounded once, as in the torch reference.
#pragma once

#include <cstdint>
#include <cstring>

#include "numeric.h"

namespace memkern {

// A [B, L, D] tensor whose last dimension is dense; strides are in elements.
template <typename T>
struct Rows {
  const T* data;
  int64_t batch_stride;
  int64_t row_stride;

  const T* at(int64_t batch, int64_t row) const { return data + batch * batch_stride + row * row_stride; }
};

// out = scale * row. A scale of 0 selects 0, so that a NaN or Inf in the row does not survive; 1 is a copy.
template <typename T>
void scale_row(const T* row, float scale, T* out, int64_t width) {
  if (scale == 0.0f) {
    std::memset(out, 0, static_cast<size_t>(width) * sizeof(T));
  } else if (scale == 1.0f) {
    std::memcpy(out, row, static_cast<size_t>(width) * sizeof(T));
  } else {
    multiply(row, scale, out, width);
  }
}

// One key of a plan: reads row `source` of the sequence's own rows, or of the bank that follows them.
template <typename T>
void edit_row(const Rows<T>& rows, const Rows<T>& bank, int64_t length, int64_t batch, int64_t source,
              float scale, T* out, int64_t width) {
  const T* row = source < length ? rows.at(batch, source) : bank.at(batch, source - length);
  scale_row(row, scale, out, width);
}

}  // namespace memkern
