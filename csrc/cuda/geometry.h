// The launch geometry of kernels on rows, and a vector of 16 bytes.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../rows.h"

namespace memkern {

// Values that a thread moves at once: 16 bytes, or one value if rows do not start at 16 bytes.
template <typename T, int kSize>
struct alignas(sizeof(T) * kSize) Vector {
  T values[kSize];
};

template <typename T>
constexpr int kVectorSize = 16 / sizeof(T);

// Threads of a block: x along a row, y over rows. Blocks stride over the rows that are left.
struct Geometry {
  unsigned blocks;
  unsigned threads_x;
  unsigned threads_y;
  bool vectors;  // true if a thread moves 16 bytes at once, false for one value
};

// Covers `count` rows of `width` values; `aligned` says that each starts at 16 bytes.
template <typename T>
Geometry cover(int64_t count, int64_t width, bool aligned) {
  constexpr unsigned kThreads = 256;
  constexpr int64_t kMostBlocks = 1 << 16;
  const bool vectors = aligned && width % kVectorSize<T> == 0;
  const int64_t moves = vectors ? width / kVectorSize<T> : width;
  unsigned threads_x = 8;
  while (threads_x < kThreads && threads_x < moves) {
    threads_x *= 2;
  }
  const unsigned threads_y = kThreads / threads_x;
  const int64_t blocks = (count + threads_y - 1) / threads_y;
  return {static_cast<unsigned>(std::min(blocks, kMostBlocks)), threads_x, threads_y, vectors};
}

// The type that a value is computed in.
template <typename T>
struct Wide {
  using type = float;
};
template <>
struct Wide<double> {
  using type = double;
};

inline bool starts_at_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// True if every row of `rows` starts at 16 bytes; also true for a missing bank.
template <typename T>
bool starts_at_16_bytes(const Rows<T>& rows) {
  return starts_at_16_bytes(rows.data) && rows.batch_stride % kVectorSize<T> == 0 &&
         rows.row_stride % kVectorSize<T> == 0;
}

}  // namespace memkern
