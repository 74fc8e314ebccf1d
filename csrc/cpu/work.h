// The work of the CPU's op files: a check of the indices first, then pieces for threads.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

namespace memkern {

// Checks that every index of a plan or of token ids is in [0, size), before any thread starts.
template <typename Index>
void check_range(const char* name, const Index* index, int64_t count, int64_t size) {
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(index[i] >= 0 && index[i] < size, name, ": index ", index[i], " is out of range [0, ",
                    size, ")");
  }
}

// Rows of `width` values that make a piece of work worth a thread: about 32 KiB of output.
inline int64_t rows_per_thread(int64_t width, int64_t element_size) {
  return std::max<int64_t>(1, 32768 / std::max<int64_t>(1, width * element_size));
}

}  // namespace memkern
