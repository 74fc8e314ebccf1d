// Pad swap, token gather and position add: out[b, l] = tokens[role is PAD ? pad_id : id] + positions[l].
// Arithmetic is float (double for double), rounded once, as in the torch reference.
#pragma once

#include <cmath>
#include <cstdint>

#include "geometry.h"
#include "parameters.h"

namespace memkern {

// An id out of range gives a row of NaN, since reporting it would need a device sync.
template <typename T, int kSize>
__global__ void embed_tokens_kernel(EmbedTokens<T> embed) {
  using wide = typename Wide<T>::type;
  const int64_t rows_at_once = static_cast<int64_t>(gridDim.x) * blockDim.y;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y; i < embed.count;
       i += rows_at_once) {
    const int64_t id = embed.roles[i] == embed.pad_role ? embed.pad_id : embed.ids[i];
    const bool valid = id >= 0 && id < embed.vocabulary;
    const T* token = embed.tokens + (valid ? id : 0) * embed.token_stride;
    const T* position = embed.positions + (i % embed.length) * embed.position_stride;
    T* out = embed.out + i * embed.width;
    for (int64_t column = static_cast<int64_t>(threadIdx.x) * kSize; column < embed.width;
         column += static_cast<int64_t>(blockDim.x) * kSize) {
      const auto a = *reinterpret_cast<const Vector<T, kSize>*>(token + column);
      const auto b = *reinterpret_cast<const Vector<T, kSize>*>(position + column);
      Vector<T, kSize> sum;
      for (int v = 0; v < kSize; ++v) {
        const wide total = static_cast<wide>(a.values[v]) + static_cast<wide>(b.values[v]);
        sum.values[v] = static_cast<T>(valid ? total : static_cast<wide>(nanf("")));
      }
      *reinterpret_cast<Vector<T, kSize>*>(out + column) = sum;
    }
  }
}

template <typename T>
Geometry embed_tokens_geometry(const EmbedTokens<T>& embed) {
  const bool aligned = embed.token_stride % kVectorSize<T> == 0 &&
                       embed.position_stride % kVectorSize<T> == 0 && starts_at_16_bytes(embed.tokens) &&
                       starts_at_16_bytes(embed.positions) && starts_at_16_bytes(embed.out);
  return cover<T>(embed.count, embed.width, aligned);
}

}  // namespace memkern
