#include "attention.h"

#include <cstring>
#include <limits>

#include "levels.h"
#include "numeric.h"
#include "panels.h"

// The compiler reduces generic vectors to the function's instruction set before it clones or inlines
// functions, so all code that uses them is compiled per set, from the same text.
namespace memkern {
namespace {

#if defined(__GNUC__)
#pragma GCC diagnostic ignored "-Wpsabi"  // passing vectors: everything is inlined
#define MEMKERN_VECTORS(width, tile)                               \
  typedef float Floats __attribute__((vector_size(4 * (width))));  \
  typedef uint32_t Bits __attribute__((vector_size(4 * (width)))); \
  constexpr int kWidth = width;                                    \
  constexpr int kTile = tile;
#else
#define MEMKERN_VECTORS(width, tile) \
  using Floats = float;              \
  using Bits = uint32_t;             \
  constexpr int kWidth = 1;          \
  constexpr int kTile = 3;
#endif

namespace any {
MEMKERN_VECTORS(4, 3)
#include "attention_rows.h"
}  // namespace any

#ifdef MEMKERN_LEVELS
#pragma GCC push_options
#pragma GCC target("arch=x86-64-v3")
namespace v3 {
MEMKERN_VECTORS(8, 3)
#include "attention_rows.h"
}  // namespace v3
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("arch=x86-64-v4")
namespace v4 {
MEMKERN_VECTORS(16, 5)
#include "attention_rows.h"
}  // namespace v4
#pragma GCC pop_options

#endif

struct Kernels {
  decltype(&any::attend) attend;
  decltype(&any::add_mass) add_mass;
  decltype(&any::softmax_heads) softmax_heads;
  decltype(&any::multiply_panels) multiply_panels;
};

Kernels choose() {
#ifdef MEMKERN_LEVELS
  if (!held_to("default") && !held_to("avx2") && __builtin_cpu_supports("x86-64-v4")) {
    return {v4::attend, v4::add_mass, v4::softmax_heads, v4::multiply_panels};
  }
  if (!held_to("default") && __builtin_cpu_supports("x86-64-v3")) {
    return {v3::attend, v3::add_mass, v3::softmax_heads, v3::multiply_panels};
  }
#endif
  return {any::attend, any::add_mass, any::softmax_heads, any::multiply_panels};
}

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace

void attend(const Head& head, const float* q, int64_t q_stride, int64_t rows, float* out, int64_t out_stride,
            float* scratch) {
  kernels().attend(head, q, q_stride, rows, out, out_stride, scratch);
}

void add_mass(const Head& head, const float* q, int64_t q_stride, int64_t rows, const float* weight,
              float* by_key, float* by_query, float* scratch) {
  kernels().add_mass(head, q, q_stride, rows, weight, by_key, by_query, scratch);
}

void softmax_heads(const float* logits, const float* bias, int64_t bias_stride, int64_t heads, int64_t keys,
                   float* weights, float* out) {
  kernels().softmax_heads(logits, bias, bias_stride, heads, keys, weights, out);
}

void multiply_panels(const float* left, int64_t rows, const Panels& right, float* out) {
  kernels().multiply_panels(left, rows, right, out);
}

}  // namespace memkern
