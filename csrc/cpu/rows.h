// Row kernels on raw pointers: the work of edit_embeds, edit_kv and embed_tokens on one row of D values.
// Arithmetic is float (double for double), rounded once, as in the torch reference.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../rows.h"
#include "numeric.h"

namespace memkern {

// out = scale * row. A scale of 0 selects 0, so that a NaN or Inf in the row does not survive; 1 is a copy.
template <typename T>
void scale_row(const T* row, float scale, T* out, int64_t width) {
  if (scale == 0.0f) {
    zero(out, width * static_cast<int64_t>(sizeof(T)));
  } else if (scale == 1.0f) {
    copy(row, out, width * static_cast<int64_t>(sizeof(T)));
  } else {
    multiply(row, scale, out, width);
  }
}

// The keys [begin, end) of a plan, counted through the batch: key i reads row source[i] of its sequence's own
// `length` rows, or of the bank that follows them. Neighbours that are all zeroed, or that copy neighbouring
// rows, are moved as one piece: most of a prompt is such rows, and `copy` gains on long pieces only.
template <typename T>
void edit_rows(const Rows<T>& rows, const Rows<T>& bank, int64_t length, const int32_t* source,
               const float* scale, T* out, int64_t width, int64_t begin, int64_t end) {
  for (int64_t i = begin; i < end;) {
    const int64_t batch = i / length;
    const int64_t first = source[i];
    const int64_t last = std::min(end, (batch + 1) * length);
    const bool zeroed = scale[i] == 0.0f;
    const bool copied = scale[i] == 1.0f && first < length && rows.row_stride == width;
    int64_t count = 1;
    while ((zeroed || copied) && i + count < last && scale[i + count] == scale[i] &&
           (zeroed || (source[i + count] == first + count && first + count < length))) {
      ++count;
    }
    const T* row = first < length ? rows.at(batch, first) : bank.at(batch, first - length);
    scale_row(row, scale[i], out + i * width, count * width);
    i += count;
  }
}

}  // namespace memkern
