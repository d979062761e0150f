// SPDX-License-Identifier: Apache-2.0
// Small matrix products C (+)= A B from packed operands, and the packing.
//
// An element is a float, or a pair of bfloat16 that lie next to each other along the dimension that
// is summed over; a "step" is one element of that dimension. A is read in groups of kRows rows, one
// broadcast element at a time; B in panels of kPanel columns, one vector at a time:
//
//   packed A        [group][step][kRows]
//   packed B        [panel][step][kPanel], the last panel kVec wide if the vectors are odd
#pragma once

#include "common/dtype.h"
#include "common/simd.h"

namespace disca {
namespace DISCA_ISA {
namespace {

// Two bfloat16 values that are multiplied and added in one instruction.
struct Pair {
  std::uint32_t bits;
};

#if defined(__AVX512F__)
constexpr int kRows = 12;  // 24 of the 32 registers accumulate
#else
constexpr int kRows = 6;  // 12 of 16
#endif
constexpr int kPanel = 2 * kVec;

template <class E>
struct Element;

template <>
struct Element<float> {
  static constexpr int kPerStep = 1;
  using Lanes = Vec;
  static DISCA_ALWAYS_INLINE Vec all(const float* p) { return broadcast(*p); }
  static DISCA_ALWAYS_INLINE Vec row(const float* p) { return load(p); }
  static DISCA_ALWAYS_INLINE Vec multiply_add(Vec sum, Vec a, Vec b) { return a * b + sum; }
};

#if defined(__AVX512BF16__)
template <>
struct Element<Pair> {
  static constexpr int kPerStep = 2;
  using Lanes = IntVec;
  static DISCA_ALWAYS_INLINE IntVec all(const Pair* p) {
    std::int32_t bits;
    __builtin_memcpy(&bits, p, sizeof bits);
    return bits - IntVec{};
  }
  static DISCA_ALWAYS_INLINE IntVec row(const Pair* p) {
    IntVec v;
    __builtin_memcpy(&v, p, sizeof v);
    return v;
  }
  static DISCA_ALWAYS_INLINE Vec multiply_add(Vec sum, IntVec a, IntVec b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
};
#endif

// One block of kRows x (kVectors * kVec) of C. Element (row, step) of A is a[row * kRow + step *
// kStep]; both strides are constants, so that one register addresses all rows.
template <class E, int kVectors, int kRow, int kStep>
void micro_kernel(const E* a, const E* b, std::int64_t steps, float* c, std::int64_t stride_c,
                  bool accumulate) {
  Vec sum[kRows][kVectors] = {};
  for (std::int64_t step = 0; step < steps; ++step) {
    typename Element<E>::Lanes b_row[kVectors];
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) b_row[j] = Element<E>::row(b + j * kVec);
#pragma GCC unroll 12
    for (int i = 0; i < kRows; ++i) {
      const auto a_all = Element<E>::all(a + i * kRow);
#pragma GCC unroll 2
      for (int j = 0; j < kVectors; ++j) {
        sum[i][j] = Element<E>::multiply_add(sum[i][j], a_all, b_row[j]);
      }
    }
    a += kStep;
    b += kVectors * kVec;
  }
#pragma GCC unroll 12
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int j = 0; j < kVectors; ++j) {
      // Added at the end, not started from: rounding grows with the longer of the two sums then.
      float* to = c + i * stride_c + j * kVec;
      store(to, accumulate ? load(to) + sum[i][j] : sum[i][j]);
    }
  }
}

// Steps that are summed in one go. Longer sums are summed in parts, whose rounding errors are less.
constexpr std::int64_t kMaxSteps = 96;

// C of [groups * kRows, vectors * kVec] (+)= A B over `steps`; panels of B are panel_stride apart.
template <class E, int kRow, int kStep>
void multiply(const E* a, std::int64_t group_stride, std::int64_t groups, const E* b,
              std::int64_t panel_stride, std::int64_t vectors, std::int64_t steps, float* c,
              std::int64_t stride_c, bool accumulate) {
  const std::int64_t part = ceil_div(steps, ceil_div(steps, kMaxSteps));
  for (std::int64_t vector = 0; vector < vectors; vector += 2) {
    for (std::int64_t group = 0; group < groups; ++group) {
      float* c_block = c + group * kRows * stride_c + vector * kVec;
      for (std::int64_t step = 0; step < steps; step += part) {
        const E* a_part = a + group * group_stride + step * kStep;
        const std::int64_t n = least(part, steps - step);
        const bool add = accumulate || step > 0;
        if (vector + 1 < vectors) {
          micro_kernel<E, 2, kRow, kStep>(a_part, b + step * kPanel, n, c_block, stride_c, add);
        } else {
          micro_kernel<E, 1, kRow, kStep>(a_part, b + step * kVec, n, c_block, stride_c, add);
        }
      }
    }
    b += panel_stride;
  }
}

// Rows of an operand in memory.
struct Source {
  const void* data;
  std::int64_t stride;
  std::int64_t rows;  // those from here on count as zero, whatever lies there
};

DISCA_ALWAYS_INLINE std::uint16_t bits_of(const BFloat16& x) { return x.bits; }

// Packs columns 0 .. head_dim of rows 0 .. n_rows (a multiple of kRows) as A, times `factor`; of
// pairs, the sign of the factor alone is applied, which is exact.
template <class E>
struct Packer;

template <>
struct Packer<float> {
  template <class X>
  static void rows(const Source& x, std::int64_t n_rows, std::int64_t dim, double factor,
                   float* out) {
    for (std::int64_t r = 0; r < n_rows; ++r) {
      float* to = out + r / kRows * dim * kRows + r % kRows;
      const X* from = static_cast<const X*>(x.data) + r * x.stride;
      for (std::int64_t d = 0; d < dim; ++d) {
        to[d * kRows] = r < x.rows ? static_cast<float>(to_float(from[d]) * factor) : 0.0f;
      }
    }
  }

  // B = X^T: a panel holds kPanel rows of X, its steps are their columns.
  template <class X>
  static void transposed(const Source& x, std::int64_t n_rows, std::int64_t dim, float* out) {
    for (std::int64_t r = 0; r < n_rows; ++r) {
      float* to = out + r / kPanel * dim * kPanel + r % kPanel;
      const X* from = static_cast<const X*>(x.data) + r * x.stride;
      for (std::int64_t d = 0; d < dim; ++d) {
        to[d * kPanel] = r < x.rows ? to_float(from[d]) : 0.0f;
      }
    }
  }

  // B = X: a panel holds kPanel columns of X, its steps are rows, of which it has room for
  // `capacity`; columns are padded to vectors.
  template <class X>
  static void natural(const Source& x, std::int64_t n_rows, std::int64_t capacity,
                      std::int64_t dim, float* packed) {
    const std::int64_t width = round_up(dim, kVec);
    for (std::int64_t first = 0; first < width; first += kPanel) {
      float* out = packed + first * capacity;
      const std::int64_t columns = least(kPanel, width - first);
      const std::int64_t present = least(columns, dim - first);
      for (std::int64_t r = 0; r < n_rows; ++r) {
        const X* from = static_cast<const X*>(x.data) + r * x.stride + first;
        const std::int64_t valid = r < x.rows ? present : 0;
        for (std::int64_t d = 0; d < valid; ++d) out[d] = to_float(from[d]);
        for (std::int64_t d = valid; d < columns; ++d) out[d] = 0.0f;
        out += columns;
      }
    }
  }
};

template <>
struct Packer<Pair> {
  static DISCA_ALWAYS_INLINE std::uint16_t bits_at(const Source& x, std::int64_t row,
                                                  std::int64_t column, std::int64_t dim) {
    if (row >= x.rows || column >= dim) return 0;
    return (static_cast<const BFloat16*>(x.data) + row * x.stride)[column].bits;
  }

  static DISCA_ALWAYS_INLINE Pair pair(std::uint16_t low, std::uint16_t high) {
    return {low | static_cast<std::uint32_t>(high) << 16};
  }

  template <class X>
  static void rows(const Source& x, std::int64_t n_rows, std::int64_t dim, double factor,
                   Pair* out) {
    const std::int64_t steps = ceil_div(dim, 2);
    const std::uint32_t sign = factor < 0 ? 0x80008000u : 0u;
    for (std::int64_t r = 0; r < n_rows; ++r) {
      Pair* to = out + r / kRows * steps * kRows + r % kRows;
      for (std::int64_t s = 0; s < steps; ++s) {
        const Pair both = pair(bits_at(x, r, 2 * s, dim), bits_at(x, r, 2 * s + 1, dim));
        to[s * kRows] = {both.bits ^ sign};
      }
    }
  }

  template <class X>
  static void transposed(const Source& x, std::int64_t n_rows, std::int64_t dim, Pair* out) {
    const std::int64_t steps = ceil_div(dim, 2);
    for (std::int64_t r = 0; r < n_rows; ++r) {
      Pair* to = out + r / kPanel * steps * kPanel + r % kPanel;
      for (std::int64_t s = 0; s < steps; ++s) {
        to[s * kPanel] = pair(bits_at(x, r, 2 * s, dim), bits_at(x, r, 2 * s + 1, dim));
      }
    }
  }

  template <class X>
  static void natural(const Source& x, std::int64_t n_rows, std::int64_t capacity,
                      std::int64_t dim, Pair* packed) {
    const std::int64_t width = round_up(dim, kVec);
    for (std::int64_t first = 0; first < width; first += kPanel) {
      Pair* out = packed + first * (capacity / 2);
      const std::int64_t columns = least(kPanel, width - first);
      for (std::int64_t r = 0; r < n_rows; r += 2) {
        for (std::int64_t d = first; d < first + columns; ++d) {
          *out++ = pair(bits_at(x, r, d, dim), bits_at(x, r + 1, d, dim));
        }
      }
    }
  }
};

template <class E>
void pack_rows(Dtype dtype, const Source& x, std::int64_t n_rows, std::int64_t dim, double factor,
               E* out) {
  with_type(dtype, [&](auto tag) {
    Packer<E>::template rows<decltype(tag)>(x, n_rows, dim, factor, out);
  });
}

template <class E>
void pack_transposed(Dtype dtype, const Source& x, std::int64_t n_rows, std::int64_t dim, E* out) {
  with_type(dtype, [&](auto tag) {
    Packer<E>::template transposed<decltype(tag)>(x, n_rows, dim, out);
  });
}

template <class E>
void pack_natural(Dtype dtype, const Source& x, std::int64_t n_rows, std::int64_t capacity,
                  std::int64_t dim, E* out) {
  with_type(dtype, [&](auto tag) {
    Packer<E>::template natural<decltype(tag)>(x, n_rows, capacity, dim, out);
  });
}

}  // namespace
}  // namespace DISCA_ISA
}  // namespace disca
