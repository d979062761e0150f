// SPDX-License-Identifier: Apache-2.0
// A tile of queries against a block of keys: which keys are seen, the scores and their tangents.
#pragma once

#include "attention/attention_cpu.h"
#include "attention/attention_cpu_simd.h"

namespace disca {
namespace attention {
namespace DISCA_ISA {
namespace {

// Queries and keys of one tile of scores; multiples of kRows and kPanel for every instruction set.
constexpr int kTileQueries = 96;
constexpr int kTileKeys = 192;

DISCA_ALWAYS_INLINE std::int64_t valid_keys(const Problem& p, std::int64_t b) {
  if (p.kv_lengths == nullptr) return p.n_keys;
  return least(most(p.kv_lengths[b], 0), p.n_keys);
}

// Query i sees the keys below this.
DISCA_ALWAYS_INLINE std::int64_t key_limit(const Problem& p, std::int64_t i, std::int64_t n_valid) {
  if (p.block == 0) return n_valid;
  const std::int64_t position = i + p.n_keys - p.n_queries;
  if (position < 0) return 0;  // the blocks before the first are empty
  return least((position / p.block + 1) * p.block, n_valid);
}

// How the operands of one call are packed, in elements E.
template <class E>
struct Layout {
  explicit Layout(const Problem& p)
      : dim(p.head_dim),
        depth(ceil_div(p.head_dim, Element<E>::kPerStep)),
        width(round_up(p.head_dim, kVec)),
        group(p.n_heads / p.n_kv_heads),
        tile_rows(round_up(least(p.n_queries, kTileQueries), kRows)),
        n_tiles(ceil_div(p.n_queries, kTileQueries)),
        n_blocks(ceil_div(p.n_keys, kTileKeys)),
        transposed_block(depth * kTileKeys),
        natural_block(kKeySteps * width) {}

  static constexpr std::int64_t kKeySteps = kTileKeys / Element<E>::kPerStep;
  std::int64_t dim, depth, width, group, tile_rows, n_tiles, n_blocks;
  std::int64_t transposed_block, natural_block;  // of kTileKeys keys
};

inline Source block_of(const Operand& x, Dtype dtype, std::int64_t b, std::int64_t h,
                       std::int64_t first, std::int64_t n_rows) {
  const std::int64_t offset = b * x.stride_b + h * x.stride_h + first * x.stride_n;
  const std::int64_t size = dtype == Dtype::kFloat32 ? 4 : 2;
  return {static_cast<const char*>(x.data) + offset * size, x.stride_n, n_rows};
}

// A factor of the scores in base 2 is folded into the queries if they are packed as floats (each
// product rounds on its own, so the errors average out), else applied to the products. Its sign is
// always folded, so that what is left does not turn the largest score into the smallest.
template <class E>
struct Factors {
  explicit Factors(double scale)
      : query(scale * kLog2E),
        score(Element<E>::kPerStep == 1 ? 1.0f : static_cast<float>(absolute(scale) * kLog2E)),
        tangent(static_cast<float>(Element<E>::kPerStep == 1 ? kLn2 : absolute(scale))) {}

  static double absolute(double x) { return x < 0 ? -x : x; }
  double query;   // of the packed queries and their tangents
  float score;    // of a product with them, to make a score in base 2
  float tangent;  // of a product with them, to make a score's tangent in base e
};

// What a row's scores are lowered by before 2^s is taken: the integer above the largest of them or
// above their log-sum-exp. A power of two then brings sums from one base to the next, without
// rounding. Scores too large for that are lowered by their largest as it is, at one rounding.
struct Base {
  explicit Base(float value)
      : offset(value > -kMaxBase && value < kMaxBase ? 0.0f : value == -kInfinity ? 0.0f : value),
        whole(value > -kMaxBase && value < kMaxBase ? value : 0.0f) {}

  static float above(float score) {
    return score > -kMaxBase && score < kMaxBase ? __builtin_ceilf(score) : score;
  }

  DISCA_ALWAYS_INLINE Vec weight(Vec score, float factor) const {
    return exp2(score * factor - offset, whole);
  }
  float offset, whole;  // one of them is 0
};

// Where a row of probabilities, ready to be multiplied, goes: over the scores or beside them.
DISCA_ALWAYS_INLINE void store_operand(float* row, std::int64_t i, Vec v) { store(row + i, v); }
#if defined(__AVX512BF16__)
DISCA_ALWAYS_INLINE void store_operand(Pair* row, std::int64_t i, Vec v) {
  store_rounded(reinterpret_cast<std::uint16_t*>(row) + i, v);
}
#endif

template <class E>
DISCA_ALWAYS_INLINE void clear_operand(E* row, std::int64_t first, std::int64_t end) {
  for (std::int64_t i = first; i < end; i += kVec) store_operand(row, i, Vec{});
}

DISCA_ALWAYS_INLINE double log2_of(double x) { return __builtin_log2(x); }

// The share of the row (b, h, i) in an output of [B, H, Nq, columns].
DISCA_ALWAYS_INLINE std::int64_t row_index(const Problem& p, std::int64_t b, std::int64_t h,
                                           std::int64_t i) {
  return (b * p.n_heads + h) * p.n_queries + i;
}

// Rounds a row to the dtype of the operands; `rest`, unless nullptr, gets what that lost.
inline void store_row(const float* x, std::int64_t n, Dtype dtype, std::int64_t offset, void* out,
                      void* rest) {
  with_type(dtype, [&](auto tag) {
    using X = decltype(tag);
    X* to = static_cast<X*>(out) + offset;
    for (std::int64_t i = 0; i < n; ++i) to[i] = from_float<X>(x[i]);
    if (rest == nullptr) return;
    X* lost = static_cast<X*>(rest) + offset;
    for (std::int64_t i = 0; i < n; ++i) lost[i] = from_float<X>(x[i] - to_float(to[i]));
  });
}

// Adds a row of [D] in memory to `sum`, or copies it there.
inline void load_row(const Source& x, Dtype dtype, std::int64_t n, float* sum, bool accumulate) {
  with_type(dtype, [&](auto tag) {
    const auto* from = static_cast<const decltype(tag)*>(x.data);
    for (std::int64_t i = 0; i < n; ++i) sum[i] = to_float(from[i]) + (accumulate ? sum[i] : 0.0f);
  });
}

}  // namespace
}  // namespace DISCA_ISA
}  // namespace attention
}  // namespace disca
