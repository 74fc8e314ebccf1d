// Vector loops over float32, float64, float16 and bfloat16. They are plain loops that the compiler
// vectorizes; on x86-64 Linux each is compiled for several instruction sets and chosen at load time,
// so that one wheel serves every machine.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>
#include <cstring>

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define MEMKERN_LEVELS
#define MEMKERN_CLONES __attribute__((target_clones("default", "avx2", "arch=x86-64-v4")))
// Without 512-bit stores, and without the compiler turning the loop into a call of memcpy or memset.
#define MEMKERN_COPY_LOOP \
  __attribute__((target_clones("default", "avx2"), optimize("no-tree-loop-distribute-patterns")))
#else
#define MEMKERN_CLONES
#define MEMKERN_COPY_LOOP
#endif

// Functions that a clone calls must be inlined in it: separately they would be compiled for the oldest
// machine.
#if defined(__GNUC__)
#define MEMKERN_INLINE inline __attribute__((always_inline))
#else
#define MEMKERN_INLINE inline
#endif

namespace memkern {

using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

// memcpy and memset for memory that was just allocated. There, page faults take most of the time, and
// they cost more with the C library's 512-bit stores: long copies by these loops take a sixth less time.
void copy(const void* in, void* out, int64_t bytes);
void zero(void* out, int64_t bytes);

// Rows as float and back, rounded to nearest even.
inline void to_float(const float* in, float* out, int64_t n) { std::memcpy(out, in, n * sizeof(float)); }
void to_float(const Half* in, float* out, int64_t n);
void to_float(const BFloat16* in, float* out, int64_t n);
inline void from_float(const float* in, float* out, int64_t n) { std::memcpy(out, in, n * sizeof(float)); }
void from_float(const float* in, Half* out, int64_t n);
void from_float(const float* in, BFloat16* out, int64_t n);

void multiply(const float* in, float factor, float* out, int64_t n);
void multiply(const double* in, float factor, double* out, int64_t n);
void multiply(const Half* in, float factor, Half* out, int64_t n);
void multiply(const BFloat16* in, float factor, BFloat16* out, int64_t n);

void add(const float* a, const float* b, float* out, int64_t n);
void add(const double* a, const double* b, double* out, int64_t n);
void add(const Half* a, const Half* b, Half* out, int64_t n);
void add(const BFloat16* a, const BFloat16* b, BFloat16* out, int64_t n);

}  // namespace memkern
