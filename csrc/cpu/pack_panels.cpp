#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cstring>

#include "../tensors.h"
#include "panels.h"

namespace memkern {
namespace {

// Columns [first, last) of a [O, C] as a panel of units, `units` per column.
template <typename From, typename To>
void pack_panel(const From* a, int64_t first, int64_t last, int64_t units, To* panel) {
  for (int64_t i = 0; i < units; ++i) {
    for (int64_t column = first; column < last; ++column) {
      panel[i * kPanel + column - first] = static_cast<To>(a[column * units + i]);
    }
    std::fill(panel + i * kPanel + last - first, panel + (i + 1) * kPanel, To{});
  }
}

template <typename From, typename To>
void pack_all(const From* a, int64_t columns, int64_t units, To* out) {
  torch::stable::parallel_for(0, count_panels(columns), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      pack_panel(a, i * kPanel, std::min(columns, (i + 1) * kPanel), units, out + i * kPanel * units);
    }
  });
}

// Schema: memkern/ops/cpu.py
Tensor pack_panels(Tensor a) {
  STD_TORCH_CHECK(a.dim() == 2 && a.is_cpu() && a.is_contiguous(),
                  "a: expected a contiguous CPU tensor [O, C]");
  const int64_t columns = a.size(0);
  const int64_t inner = a.size(1);
  const int64_t size = count_panels(columns) * kPanel * inner;
  if (a.scalar_type() == ScalarType::BFloat16 && inner % 2 == 0 && multiplies_bfloat16()) {
    Tensor out = torch::stable::new_empty(a, {size});
    // A pair is moved as one value.
    pack_all(static_cast<const uint32_t*>(a.const_data_ptr()), columns, inner / 2,
             static_cast<uint32_t*>(out.mutable_data_ptr()));
    return out;
  }
  Tensor out = torch::stable::new_empty(a, {size}, ScalarType::Float);
  THO_DISPATCH_V2(a.scalar_type(), "pack_panels", AT_WRAP([&] {
                    pack_all(a.const_data_ptr<scalar_t>(), columns, inner, out.mutable_data_ptr<float>());
                  }),
                  ScalarType::Float, ScalarType::Half, ScalarType::BFloat16);
  return out;
}

}  // namespace
}  // namespace memkern

STABLE_TORCH_LIBRARY_IMPL(memkern_cpu, CPU, m) { m.impl("pack_panels", TORCH_BOX(&memkern::pack_panels)); }
