// What kernels are called with: raw memory and sizes.
#pragma once

#include <cstdint>

#include "../rows.h"

namespace memkern {

// One tensor of rows, the bank that follows it, and what becomes of them.
template <typename T>
struct EditRows {
  Rows<T> rows;
  Rows<T> bank;
  const float* scale;  // [B * L]
  T* out;              // [B * L, D], contiguous
};

// What K and V share.
struct EditPlan {
  const int32_t* source;  // [B * L]
  int64_t count;          // B * L
  int64_t length;
  int64_t bank_length;
  int64_t width;
};

// What embed_tokens reads and writes.
template <typename T>
struct EmbedTokens {
  const int64_t* ids;    // [B * L]
  const uint8_t* roles;  // [B * L]
  const T* tokens;       // [V, D]
  const T* positions;    // [P, D]
  T* out;                // [B * L, D], contiguous
  int64_t token_stride;
  int64_t position_stride;
  int64_t count;  // B * L
  int64_t length;
  int64_t vocabulary;
  int64_t width;
  int64_t pad_id;
  uint8_t pad_role;
};

}  // namespace memkern
