// attention.h for one instruction set. The includer defines Floats and Bits, vectors of kWidth floats and
// uint32_t, and kTile, the number of vectors times 4 rows that its registers hold besides the factors.
// Without an include guard.

constexpr int kRows = 4;

// exp(x) for x <= 0, to 1 unit in the last place; 0 below e^-87, -inf included. NaN stays.
MEMKERN_INLINE Floats exp_nonpositive(Floats x) {
  constexpr float kLog2e = 1.44269504f;
  constexpr float kLn2High = 0.693145752f;
  constexpr float kLn2Low = 1.42860677e-6f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const Floats clamped = x < -87.0f ? -87.0f : x;
  const Floats shifted = clamped * kLog2e + kRound;
  const Floats whole = shifted - kRound;
  const Floats rest = (clamped - whole * kLn2High) - whole * kLn2Low;
  // The polynomial of this degree with the least relative error for |rest| <= ln(2) / 2; Taylor's error is
  // three times as large.
  Floats series = rest * 1.375138856e-3f + 8.368924481e-3f;
  series = series * rest + 4.166953425e-2f;
  series = series * rest + 1.666651839e-1f;
  series = series * rest + 4.999998859e-1f;
  series = series * rest + 1.0f;
  series = series * rest + 1.0f;
  Bits bits;
  std::memcpy(&bits, &shifted, sizeof(bits));
  const Bits power = (bits << 23) + 0x3f800000u;
  Floats scale;
  std::memcpy(&scale, &power, sizeof(scale));
  return x < -87.0f ? 0.0f : series * scale;
}

MEMKERN_INLINE Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}

MEMKERN_INLINE void store(const Floats& values, float* to) { std::memcpy(to, &values, sizeof(values)); }

MEMKERN_INLINE float highest(const Floats& values) {
  float lanes[kWidth];
  store(values, lanes);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      lanes[i] = lanes[i] > lanes[i + half] ? lanes[i] : lanes[i + half];
    }
  }
  return lanes[0];
}

MEMKERN_INLINE float sum_of(const Floats& values) {
  float lanes[kWidth];
  store(values, lanes);
  for (int half = kWidth / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) {
      lanes[i] += lanes[i + half];
    }
  }
  return lanes[0];
}

// out [R, V vectors] = left [R, inner] right [inner, V vectors], the sums in registers.
template <int R, int V>
MEMKERN_INLINE void product_tile(const float* left, int64_t left_stride, const float* right,
                                 int64_t right_stride, int64_t inner, float* out, int64_t out_stride) {
  Floats sums[R][V] = {};
  for (int64_t i = 0; i < inner; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const Floats column = load(right + i * right_stride + int64_t{v} * kWidth);
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        sums[r][v] += column * left[r * left_stride + i];
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      store(sums[r][v], out + r * out_stride + int64_t{v} * kWidth);
    }
  }
}

// out [R, columns] = left [R, inner] right [inner, columns]; columns are padded.
template <int R>
MEMKERN_INLINE void product(const float* left, int64_t left_stride, const float* right, int64_t inner,
                            int64_t columns, float* out, int64_t out_stride) {
  for (int64_t begin = 0; begin < columns; begin += int64_t{kTile} * kWidth) {
    const int64_t vectors = (columns - begin) / kWidth;
    const float* part = right + begin;
    if (vectors >= kTile) {
      product_tile<R, kTile>(left, left_stride, part, columns, inner, out + begin, out_stride);
    } else if (vectors == 4) {
      product_tile<R, 4>(left, left_stride, part, columns, inner, out + begin, out_stride);
    } else if (vectors == 3) {
      product_tile<R, 3>(left, left_stride, part, columns, inner, out + begin, out_stride);
    } else if (vectors == 2) {
      product_tile<R, 2>(left, left_stride, part, columns, inner, out + begin, out_stride);
    } else {
      product_tile<R, 1>(left, left_stride, part, columns, inner, out + begin, out_stride);
    }
  }
}

// weights = exp(logits + bias - their maximum), which may be in place; the inverse of their sum. `count` is
// padded.
MEMKERN_INLINE float softmax(const float* logits, const float* bias, int64_t count, float* weights) {
  constexpr float kExcluded = -std::numeric_limits<float>::infinity();
  Floats top = kExcluded - Floats{};
  for (int64_t i = 0; i < count; i += kWidth) {
    const Floats added = load(bias + i);
    const Floats value = added == kExcluded ? added : load(logits + i) + added;
    store(value, weights + i);
    top = top > value ? top : value;
  }
  const float found = highest(top);
  const float shift = found == kExcluded ? 0.0f : found;
  Floats total = {};
  for (int64_t i = 0; i < count; i += kWidth) {
    const Floats weight = exp_nonpositive(load(weights + i) - shift);
    store(weight, weights + i);
    total += weight;
  }
  const float sum = sum_of(total);
  return sum == 0.0f ? 0.0f : 1.0f / sum;
}

template <int R>
MEMKERN_INLINE void attend_rows(const Head& head, const float* q, int64_t q_stride, float* out,
                                int64_t out_stride, float* scratch) {
  const int64_t keys = padded(head.keys);
  const int64_t width = padded(head.width);
  float* values = scratch + R * keys;
  product<R>(q, q_stride, head.k, head.width, keys, scratch, keys);
  float inverse[R];
  for (int r = 0; r < R; ++r) {
    inverse[r] = softmax(scratch + r * keys, head.bias, keys, scratch + r * keys);
  }
  product<R>(scratch, keys, head.v, head.keys, width, values, width);
  for (int r = 0; r < R; ++r) {
    for (int64_t i = 0; i < head.width; ++i) {
      out[r * out_stride + i] = values[r * width + i] * inverse[r];
    }
  }
}

void attend(const Head& head, const float* q, int64_t q_stride, int64_t rows, float* out, int64_t out_stride,
            float* scratch) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    attend_rows<kRows>(head, q + row * q_stride, q_stride, out + row * out_stride, out_stride, scratch);
  }
  for (; row < rows; ++row) {
    attend_rows<1>(head, q + row * q_stride, q_stride, out + row * out_stride, out_stride, scratch);
  }
}

template <int R>
MEMKERN_INLINE void mass_rows(const Head& head, const float* q, int64_t q_stride, const float* weight,
                              float* by_key, float* by_query, float* scratch) {
  const int64_t keys = padded(head.keys);
  product<R>(q, q_stride, head.k, head.width, keys, scratch, keys);
  for (int r = 0; r < R; ++r) {
    float* row = scratch + r * keys;
    const float inverse = softmax(row, head.bias, keys, row);
    Floats chosen = {};
    for (int64_t i = 0; i < keys; i += kWidth) {
      const Floats p = load(row + i) * inverse;
      store(load(by_key + i) + p, by_key + i);
      chosen += p * load(weight + i);
    }
    by_query[r] = sum_of(chosen);
  }
}

void add_mass(const Head& head, const float* q, int64_t q_stride, int64_t rows, const float* weight,
              float* by_key, float* by_query, float* scratch) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    mass_rows<kRows>(head, q + row * q_stride, q_stride, weight, by_key, by_query + row, scratch);
  }
  for (; row < rows; ++row) {
    mass_rows<1>(head, q + row * q_stride, q_stride, weight, by_key, by_query + row, scratch);
  }
}

void softmax_heads(const float* logits, const float* bias, int64_t bias_stride, int64_t heads, int64_t keys,
                   float* weights, float* out) {
  const int64_t count = padded(keys);
  for (int64_t head = 0; head < heads; ++head) {
    const float inverse = softmax(logits + head * keys, bias + head * bias_stride, count, weights);
    // In order of the heads: values written beyond one head are overwritten by the next.
    for (int64_t i = 0; i < count; i += kWidth) {
      store(load(weights + i) * inverse, out + head * keys + i);
    }
  }
}

template <int R>
MEMKERN_INLINE void panel_rows(const float* left, const Panels& right, float* out) {
  for (int64_t begin = 0; begin < right.columns; begin += kPanel) {
    const float* panel = static_cast<const float*>(right.data) + begin * right.inner;
    product<R>(left, right.inner, panel, right.inner, kPanel, out + begin, right.stride());
  }
}

void multiply_panels(const float* left, int64_t rows, const Panels& right, float* out) {
  int64_t row = 0;
  for (; row + kRows <= rows; row += kRows) {
    panel_rows<kRows>(left + row * right.inner, right, out + row * right.stride());
  }
  for (; row < rows; ++row) {
    panel_rows<1>(left + row * right.inner, right, out + row * right.stride());
  }
}
