// SPDX-License-Identifier: Apache-2.0
// Values and tangents of modulated_norm.h.
#pragma once

#include "common/modulated_norm_row.h"

namespace disca {
namespace modulated_norm {
namespace DISCA_ISA {
namespace {

// h = x_hat * a + b, and the tangents of a and b.
template <typename X, bool kDot>
inline void coefficients(const Forward& p, std::int64_t b, std::int64_t n,
                         const ScratchRows& rows) {
  const auto scale = companion<X>(p.scale, b, n), shift = companion<X>(p.shift, b, n);
  const auto weight = companion<X>(p.weight, b, n), bias = companion<X>(p.bias, b, n);
  const auto scale_dot = companion<X>(p.scale_dot, b, n);
  const auto shift_dot = companion<X>(p.shift_dot, b, n);
  const auto weight_dot = companion<X>(p.weight_dot, b, n);
  const auto bias_dot = companion<X>(p.bias_dot, b, n);
  float *a = rows[kA], *c = rows[kB], *a_dot = rows[kADot], *c_dot = rows[kBDot];
  sweep<1>(p.problem.n_channels, DISCA_STEP {
    const Vec gain = 1.0f + scale.at(i, part);
    const Vec w = weight.at(i, part, 1), w_bias = bias.at(i, part);
    store(a + i, gain * w);
    store(c + i, gain * w_bias + shift.at(i, part));
    if (kDot) {
      const Vec gain_dot = scale_dot.at(i, part);
      store(a_dot + i, gain_dot * w + gain * weight_dot.at(i, part));
      store(c_dot + i, gain_dot * w_bias + gain * bias_dot.at(i, part) + shift_dot.at(i, part));
    }
  });
}

// Which tangents there are.
enum Dot { kNone, kOfModulation, kOfTokens };

// Stores x_new and its tangent as it is returned. For a norm (kNorm) the tangent is stored as
// floats too, and the mean of x_new is returned.
template <typename X, Dot kDot, bool kNorm>
inline float gated_row(const Forward& p, std::int64_t b, std::int64_t n, const ScratchRows& rows,
                       X* x_new, X* x_new_dot, float* wide_dot) {
  const std::int64_t C = p.problem.n_channels;
  const X *x = row_of<X>(p.x, b, n), *y = row_of<X>(p.y, b, n);
  const X *x_dot = row_of<X>(p.x_dot, b, n), *y_dot = row_of<X>(p.y_dot, b, n);
  const bool has_gate_dot = p.gate_dot.data != nullptr;
  const float *gate = rows[kGate], *gate_dot = rows[kGateDot];
  Vec sums[2] = {};
  sweep<2>(C, DISCA_STEP {
    const Vec g = load(gate + i), update = load(y + i, part);
    if (kNorm || x_new != nullptr) {
      const Vec value = store_and_round(x_new + i, load(x + i, part) + g * update, part);
      if (kNorm) sums[slot] += present(value, part);
    }
    if (kDot == kOfTokens) {
      Vec dot = {};
      if (x_dot != nullptr) dot = load(x_dot + i, part);
      if (y_dot != nullptr) dot += g * load(y_dot + i, part);
      if (has_gate_dot) dot += load(gate_dot + i) * update;
      if (kNorm && !kIsFloat<X>) store(wide_dot + i, dot);
      store(x_new_dot + i, dot, part);
    }
    if (kDot == kOfModulation) store(x_new_dot + i, Vec{}, part);
  });
  return total(sums) / static_cast<float>(C);
}

// V is the type of the tangents of x_new.
template <typename X, typename V, Dot kDot>
DISCA_ALWAYS_INLINE void forward_row(const Problem& p, const X* x, const V* x_dot, float mean,
                                     const ScratchRows& rows, X* h, X* h_dot) {
  const float *a = rows[kA], *b = rows[kB], *a_dot = rows[kADot], *b_dot = rows[kBDot];
  Projection projection = {};
  const Norm norm = kDot == kOfTokens
                        ? normalise(x, mean, p, projection,
                                    DISCA_AT { return load(x_dot + i, part); })
                        : normalise(x, mean, p);
  sweep<2>(p.n_channels, DISCA_STEP {
    const Vec x_hat = norm.x_hat(load(x + i, part)), gain = load(a + i);
    if (h != nullptr) store(h + i, x_hat * gain + load(b + i), part);
    if (kDot == kNone) return;
    Vec dot = x_hat * load(a_dot + i);
    if (kDot == kOfTokens) dot += projection.of(load(x_dot + i, part), x_hat, norm) * gain;
    store(h_dot + i, dot + load(b_dot + i), part);
  });
}

// What the rows of a task are put through.
enum Path { kNormOnly, kGateOnly, kGateAndNorm };

template <typename X, Path kPath, Dot kDot>
void forward_rows(const Forward& p, std::int64_t b, std::int64_t first, std::int64_t last,
                  float* scratch) {
  const Problem& problem = p.problem;
  const std::int64_t C = problem.n_channels;
  const ScratchRows rows(scratch, C);
  const bool fixed = same_for_all_tokens(p.shift) && same_for_all_tokens(p.scale) &&
                     same_for_all_tokens(p.shift_dot) && same_for_all_tokens(p.scale_dot);
  const bool fixed_gate = same_for_all_tokens(p.gate) && same_for_all_tokens(p.gate_dot);
  for (std::int64_t n = first; n < last; ++n) {
    const std::int64_t i = b * problem.n_tokens + n;
    if (kPath != kGateOnly && (n == first || !fixed)) {
      coefficients<X, kDot != kNone>(p, b, n, rows);
    }
    if (kPath != kNormOnly && (n == first || !fixed_gate)) {
      widen<X>(p.gate, b, n, C, rows[kGate]);
      widen<X>(p.gate_dot, b, n, C, rows[kGateDot]);
    }
    X *x_new = row_of<X>(p.x_new, i, C), *x_new_dot = row_of<X>(p.x_new_dot, i, C);
    X *h = row_of<X>(p.h, i, C), *h_dot = row_of<X>(p.h_dot, i, C);
    if (kPath == kGateOnly) {
      gated_row<X, kDot, false>(p, b, n, rows, x_new, x_new_dot, nullptr);
    } else if (kPath == kNormOnly) {
      const X* x = row_of<X>(p.x, b, n);
      const float mean = problem.rms ? 0.0f : mean_of(x, C);
      forward_row<X, X, kDot>(problem, x, row_of<X>(p.x_dot, b, n), mean, rows, h, h_dot);
    } else {
      if (x_new == nullptr) x_new = reinterpret_cast<X*>(rows[kXNew]);
      // In float32 the tangent as it is returned is the one to go on with.
      float* const wide_dot =
          kIsFloat<X> ? reinterpret_cast<float*>(x_new_dot) : rows[kXNewDot];
      const float mean = gated_row<X, kDot, true>(p, b, n, rows, x_new, x_new_dot, wide_dot);
      forward_row<X, float, kDot>(problem, x_new, wide_dot, problem.rms ? 0.0f : mean, rows, h,
                                  h_dot);
    }
  }
}

template <typename X, Path kPath>
DISCA_ALWAYS_INLINE void forward_as(const Forward& p, std::int64_t b, std::int64_t first,
                                    std::int64_t last, float* scratch) {
  const bool moving = p.x_dot.data != nullptr || p.y_dot.data != nullptr ||
                      p.gate_dot.data != nullptr;
  const void* const dot = kPath == kGateOnly ? p.x_new_dot : p.h_dot;
  if (dot == nullptr) return forward_rows<X, kPath, kNone>(p, b, first, last, scratch);
  if (!moving) return forward_rows<X, kPath, kOfModulation>(p, b, first, last, scratch);
  forward_rows<X, kPath, kOfTokens>(p, b, first, last, scratch);
}

void forward(const Forward& p, std::int64_t b, std::int64_t first, std::int64_t last,
             float* scratch) {
  with_type(p.problem.dtype, [&](auto tag) {
    using X = decltype(tag);
    if (p.gate.data == nullptr) return forward_as<X, kNormOnly>(p, b, first, last, scratch);
    if (p.scale.data == nullptr) return forward_as<X, kGateOnly>(p, b, first, last, scratch);
    forward_as<X, kGateAndNorm>(p, b, first, last, scratch);
  });
}

}  // namespace
}  // namespace DISCA_ISA
}  // namespace modulated_norm
}  // namespace disca
