#include "panels.h"

#include <cstring>

#include "levels.h"
#include "numeric.h"

#ifdef MEMKERN_LEVELS
#include <immintrin.h>
#endif

namespace memkern {

#ifdef MEMKERN_LEVELS

#define MEMKERN_DOTS __attribute__((target("arch=x86-64-v4,avx512bf16")))

namespace {

constexpr int64_t kWidth = 16;
constexpr int kRows = 8;  // times 3 vectors of columns: 24 sums in registers, besides their factors

// Rows [0, R) of a panel's first V vectors of columns.
template <int R, int V>
MEMKERN_DOTS inline void tile(const BFloat16* left, int64_t inner, const BFloat16* panel, float* out,
                              int64_t out_stride) {
  __m512 sums[R][V];
  for (auto& row : sums) {
    for (auto& sum : row) {
      sum = _mm512_setzero_ps();
    }
  }
  for (int64_t i = 0; i < inner; i += 2) {
    __m512i columns[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      columns[v] = _mm512_loadu_si512(panel + i * kPanel + v * 2 * kWidth);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int pair;
      std::memcpy(&pair, left + r * inner + i, sizeof(pair));
      const auto both = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) {
        sums[r][v] = _mm512_dpbf16_ps(sums[r][v], both, reinterpret_cast<__m512bh>(columns[v]));
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      _mm512_storeu_ps(out + r * out_stride + v * kWidth, sums[r][v]);
    }
  }
}

}  // namespace

bool multiplies_bfloat16() {
  static const bool can = __builtin_cpu_supports("x86-64-v4") && __builtin_cpu_supports("avx512bf16") &&
                          !held_to("default") && !held_to("avx2");
  return can;
}

namespace {

template <int V>
MEMKERN_DOTS void multiply_panel(const BFloat16* left, int64_t rows, int64_t inner, const BFloat16* panel,
                                 float* out, int64_t out_stride) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    tile<kRows, V>(left + row * inner, inner, panel, out + row * out_stride, out_stride);
  }
  for (; row < rows; ++row) {
    tile<1, V>(left + row * inner, inner, panel, out + row * out_stride, out_stride);
  }
}

}  // namespace

void multiply_panels(const BFloat16* left, int64_t rows, const Panels& right, float* out) {
  for (int64_t begin = 0; begin < right.columns; begin += kPanel) {
    const BFloat16* panel = static_cast<const BFloat16*>(right.data) + begin * right.inner;
    const int64_t vectors = (right.columns - begin + kWidth - 1) / kWidth;
    const auto multiply = vectors >= 3   ? multiply_panel<3>
                          : vectors == 2 ? multiply_panel<2>
                                         : multiply_panel<1>;
    multiply(left, rows, right.inner, panel, out + begin, right.stride());
  }
}

#else

bool multiplies_bfloat16() { return false; }
void multiply_panels(const BFloat16*, int64_t, const Panels&, float*) {}

#endif

}  // namespace memkern
