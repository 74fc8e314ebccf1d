// The arguments of kernels: raw memory and sizes.
#pragma once

#include <cstdint>

#include "../rows.h"

namespace memkern {

// One tensor of rows, the bank that follows it, their scales, and the output.
template <typename T>
struct EditRows {
  Rows<T> rows;
  Rows<T> bank;
  const float* scale;  // [B * L]
  T* out;              // [B * L, D], contiguous
};

// The parameters that K and V share.
struct EditPlan {
  const int32_t* source;  // [B * L]
  int64_t count;          // B * L
  int64_t length;
  int64_t bank_length;
  int64_t width;
};

// The parameters of embed_tokens.
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
