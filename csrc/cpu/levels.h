// The limit on the instruction sets of a process.
#pragma once

#include <cstdlib>
#include <string_view>

namespace memkern {

// ATEN_CPU_CAPABILITY=default or avx2 limits torch's kernels, and ours, to an older set than the processor's.
inline bool held_to(std::string_view older) {
  const char* name = std::getenv("ATEN_CPU_CAPABILITY");
  return name != nullptr && older == name;
}

}  // namespace memkern
