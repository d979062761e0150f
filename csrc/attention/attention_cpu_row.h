// SPDX-License-Identifier: Apache-2.0
// The softmax and its tangent for one row of a tile of scores.
#pragma once

#include "attention/attention_cpu_tile.h"

namespace disca {
namespace attention {
namespace DISCA_ISA {
namespace {

// The running sums of one row of queries. The weights are p = 2^(s - base); d = s_dot - c.
struct Row {
  float base = -kInfinity;  // see Base; scores are in base 2
  float alpha = 1;          // by which the last block scaled the sums
  float c = 0;              // the centre of s_dot
  float l = 0, l_rounded = 0;    // sum of p, and of the rounded p that are multiplied
  float m1 = 0, m1_rounded = 0;  // sum of p * d, and of the rounded products
  float n0 = 0;                  // sum of p^2
  bool has_centre = false;

  void clear_sums() { l = l_rounded = m1 = m1_rounded = n0 = 0; }
};

DISCA_ALWAYS_INLINE float largest_score(const float* s, std::int64_t n, float factor) {
  Vec top = broadcast(-kInfinity);
  for (std::int64_t i = 0; i < n; i += kVec) {
    Vec x = load(s + i);
    if (i + kVec > n) x = first_lanes(x, n - i, -kInfinity);
    top = maximum(top, x);
  }
  return horizontal_max(top) * factor;
}

// The mean of the first n s_dot, weighted by p; 0 if there is no weight.
template <class E>
inline float mean_tangent(const Base& base, const float* s, const float* s_dot, std::int64_t n,
                          const Factors<E>& factors) {
  Vec sum = {}, weighted = {};
  for (std::int64_t i = 0; i < n; i += kVec) {
    Vec weight = base.weight(load(s + i), factors.score), x = load(s_dot + i);
    if (i + kVec > n) {
      weight = first_lanes(weight, n - i, 0.0f);
      x = first_lanes(x, n - i, 0.0f);
    }
    sum += weight;
    weighted += weight * x;
  }
  const float total = horizontal_sum(sum);
  return total == 0 ? 0.0f : horizontal_sum(weighted) / total * factors.tangent;
}

// The sum of a row of n operands as they are multiplied; that of floats is known without.
DISCA_ALWAYS_INLINE float sum_operands(const float*, std::int64_t) { return 0; }
#if defined(__AVX512BF16__)
DISCA_ALWAYS_INLINE float sum_operands(const Pair* row, std::int64_t n) {
  const IntVec ones = 0x3f803f80 - IntVec{};
  Vec sum = {};
  for (std::int64_t i = 0; i < n; i += 2 * kVec) {
    sum = Element<Pair>::multiply_add(sum, Element<Pair>::row(row + i / 2), ones);
  }
  return horizontal_sum(sum);
}
#endif

// Makes room for larger scores: the sums are scaled to the base above the largest.
DISCA_ALWAYS_INLINE void rebase(Row& row, float largest) {
  if (!(largest > row.base)) return;
  const float base = Base::above(largest);
  const float alpha = exp2(broadcast(row.base - base), 0)[0];
  row.l *= alpha;
  row.l_rounded *= alpha;
  row.m1 *= alpha;
  row.m1_rounded *= alpha;
  row.n0 *= alpha * alpha;
  row.alpha = alpha;
  row.base = base;
}

// Replaces the scores of a row by p, and s_dot by p * d, both as operands of a product, and adds to
// the sums. Columns from n on count as not there and are cleared up to n_padded. kOnline: the base
// follows the scores; else it came from the log-sum-exp. A row without a centre takes the mean of
// these keys.
template <class E, bool kOnline, bool kTangent>
inline void weigh_row(Row& row, float* s, float* s_dot, E* p, E* h, std::int64_t n,
                      std::int64_t n_padded, const Factors<E>& factors) {
  row.alpha = 1;
  clear_operand(p, round_up(n, kVec), n_padded);
  if (kTangent) clear_operand(h, round_up(n, kVec), n_padded);
  if (n == 0) return;
  if (kOnline) rebase(row, largest_score(s, n, factors.score));
  const Base base(row.base);
  if (kTangent && !row.has_centre) {
    row.c = mean_tangent(base, s, s_dot, n, factors);
    row.has_centre = true;
  }
  Vec sum = {}, squares = {}, m1 = {};
  for (std::int64_t i = 0; i < n; i += kVec) {
    Vec weight = base.weight(load(s + i), factors.score);
    if (i + kVec > n) weight = first_lanes(weight, n - i, 0.0f);
    sum += weight;
    store_operand(p, i, weight);
    if (kTangent) {
      Vec d = load(s_dot + i) * factors.tangent - row.c;
      if (i + kVec > n) d = first_lanes(d, n - i, 0.0f);
      const Vec product = weight * d;
      squares += weight * weight;
      m1 += product;
      store_operand(h, i, product);
    }
  }
  row.l += horizontal_sum(sum);
  if (kTangent) {
    row.m1 += horizontal_sum(m1);
    row.n0 += horizontal_sum(squares);
  }
  if (Element<E>::kPerStep > 1) {
    if (kOnline) row.l_rounded += sum_operands(p, n_padded);
    if (kTangent) row.m1_rounded += sum_operands(h, n_padded);
  } else {
    row.l_rounded = row.l;
    row.m1_rounded = row.m1;
  }
}

}  // namespace
}  // namespace DISCA_ISA
}  // namespace attention
}  // namespace disca
