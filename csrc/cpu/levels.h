// Which instruction sets a process is held to.
#pragma once

#include <cstdlib>
#include <string_view>

namespace memkern {

// ATEN_CPU_CAPABILITY=default or avx2 holds torch's own kernels to an older set than the processor's, and
// ours.
inline bool held_to(std::string_view older) {
  const char* name = std::getenv("ATEN_CPU_CAPABILITY");
  return name != nullptr && older == name;
}

}  // namespace memkern
