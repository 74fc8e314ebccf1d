#include "numeric.h"

#include <cstring>

#if defined(__x86_64__) && defined(__GNUC__)
#define MEMKERN_F16C
#include <immintrin.h>
#endif

namespace memkern {
namespace {

// bfloat16 is the upper half of a float; rounding is to nearest even. Branch-free, so that it vectorizes.
inline float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.x) << 16u;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}

inline void narrow(float wide, BFloat16* out) {
  uint32_t bits;
  std::memcpy(&bits, &wide, sizeof(bits));
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16u) & 1u)) >> 16u;
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  out->x = static_cast<uint16_t>(is_nan ? 0x7fc0u : rounded);
}

inline float widen(Half value) { return static_cast<float>(value); }
inline void narrow(float wide, Half* out) { *out = Half(wide); }
inline float widen(float value) { return value; }
inline void narrow(float wide, float* out) { *out = wide; }
inline double widen(double value) { return value; }
inline void narrow(double wide, double* out) { *out = wide; }

template <typename T>
inline void multiply_loop(const T* in, float factor, T* out, int64_t begin, int64_t n) {
  for (int64_t i = begin; i < n; ++i) {
    narrow(widen(in[i]) * factor, out + i);
  }
}

template <typename T>
inline void add_loop(const T* a, const T* b, T* out, int64_t begin, int64_t n) {
  for (int64_t i = begin; i < n; ++i) {
    narrow(widen(a[i]) + widen(b[i]), out + i);
  }
}

#ifdef MEMKERN_F16C
// Compilers do not use the float16 conversion instructions of x86 by themselves, so eight lanes are written
// out.
const bool has_f16c = __builtin_cpu_supports("avx") && __builtin_cpu_supports("f16c");

#define MEMKERN_TARGET_F16C __attribute__((target("avx,f16c")))

MEMKERN_TARGET_F16C inline __m256 load8(const Half* in) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in)));
}

MEMKERN_TARGET_F16C inline void store8(__m256 wide, Half* out) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm256_cvtps_ph(wide, _MM_FROUND_TO_NEAREST_INT));
}

MEMKERN_TARGET_F16C int64_t multiply8(const Half* in, float factor, Half* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    store8(_mm256_mul_ps(load8(in + i), _mm256_set1_ps(factor)), out + i);
  }
  return i;
}

MEMKERN_TARGET_F16C int64_t add8(const Half* a, const Half* b, Half* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    store8(_mm256_add_ps(load8(a + i), load8(b + i)), out + i);
  }
  return i;
}

MEMKERN_TARGET_F16C int64_t to_float8(const Half* in, float* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    _mm256_storeu_ps(out + i, load8(in + i));
  }
  return i;
}

MEMKERN_TARGET_F16C int64_t from_float8(const float* in, Half* out, int64_t n) {
  int64_t i = 0;
  for (; i + 8 <= n; i += 8) {
    store8(_mm256_loadu_ps(in + i), out + i);
  }
  return i;
}
#else
constexpr bool has_f16c = false;
inline int64_t to_float8(const Half*, float*, int64_t) { return 0; }
inline int64_t from_float8(const float*, Half*, int64_t) { return 0; }
inline int64_t multiply8(const Half*, float, Half*, int64_t) { return 0; }
inline int64_t add8(const Half*, const Half*, Half*, int64_t) { return 0; }
#endif

}  // namespace

MEMKERN_COPY_LOOP void copy(const void* in, void* out, int64_t bytes) {
  const auto* from = static_cast<const unsigned char*>(in);
  auto* to = static_cast<unsigned char*>(out);
  for (int64_t i = 0; i < bytes; ++i) {
    to[i] = from[i];
  }
}

MEMKERN_COPY_LOOP void zero(void* out, int64_t bytes) {
  auto* to = static_cast<unsigned char*>(out);
  for (int64_t i = 0; i < bytes; ++i) {
    to[i] = 0;
  }
}

MEMKERN_CLONES void to_float(const BFloat16* in, float* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    out[i] = widen(in[i]);
  }
}

MEMKERN_CLONES void from_float(const float* in, BFloat16* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    narrow(in[i], out + i);
  }
}

void to_float(const Half* in, float* out, int64_t n) {
  for (int64_t i = has_f16c ? to_float8(in, out, n) : 0; i < n; ++i) {
    out[i] = widen(in[i]);
  }
}

void from_float(const float* in, Half* out, int64_t n) {
  for (int64_t i = has_f16c ? from_float8(in, out, n) : 0; i < n; ++i) {
    narrow(in[i], out + i);
  }
}

#define MEMKERN_DEFINE_LOOPS(T)                                                \
  MEMKERN_CLONES void multiply(const T* in, float factor, T* out, int64_t n) { \
    multiply_loop(in, factor, out, 0, n);                                      \
  }                                                                            \
  MEMKERN_CLONES void add(const T* a, const T* b, T* out, int64_t n) { add_loop(a, b, out, 0, n); }

MEMKERN_DEFINE_LOOPS(float)
MEMKERN_DEFINE_LOOPS(double)
MEMKERN_DEFINE_LOOPS(BFloat16)

#undef MEMKERN_DEFINE_LOOPS

void multiply(const Half* in, float factor, Half* out, int64_t n) {
  multiply_loop(in, factor, out, has_f16c ? multiply8(in, factor, out, n) : 0, n);
}

void add(const Half* a, const Half* b, Half* out, int64_t n) {
  add_loop(a, b, out, has_f16c ? add8(a, b, out, n) : 0, n);
}

}  // namespace memkern
