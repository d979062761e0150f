// SPDX-License-Identifier: Apache-2.0
// Activations and their slopes, a row at a time.
#pragma once

#include "common/activation.h"
#include "common/activation_curves.h"
#include "common/simd.h"

namespace disca {
namespace activation {
namespace DISCA_ISA {
namespace {

template <typename X>
DISCA_ALWAYS_INLINE const X* row(const Operand& x, std::int64_t b, std::int64_t n) {
  return x.data == nullptr ? nullptr
                           : static_cast<const X*>(x.data) + b * x.stride_b + n * x.stride_n;
}

template <typename X>
DISCA_ALWAYS_INLINE X* row(void* data, std::int64_t i, std::int64_t stride) {
  return data == nullptr ? nullptr : static_cast<X*>(data) + i * stride;
}

// The sum of a row and a bias; what is absent is zero.
template <typename X, typename Part>
DISCA_ALWAYS_INLINE Vec sum(const X* x, const float* bias, std::int64_t i, Part part) {
  Vec z = x == nullptr ? Vec{} : load(x + i, part);
  return bias == nullptr ? z : z + load(bias + i, part);
}

template <typename X, class Function, bool kGated>
void forward_rows(const Forward& p, std::int64_t first, std::int64_t last) {
  for (std::int64_t r = first; r < last; ++r) {
    const std::int64_t b = r / p.problem.n_tokens, n = r % p.problem.n_tokens;
    const X *gate = row<X>(p.gate.x, b, n), *gate_dot = row<X>(p.gate.x_dot, b, n);
    const X *up = row<X>(p.up.x, b, n), *up_dot = row<X>(p.up.x_dot, b, n);
    X *y = row<X>(p.y, r, p.stride), *y_dot = row<X>(p.y_dot, r, p.stride);
    sweep<1>(p.problem.n_columns, DISCA_STEP {
      const Curve f = Function::of(sum(gate, p.gate.bias, i, part));
      const Vec factor = kGated ? sum(up, p.up.bias, i, part) : Vec{};
      if (y != nullptr) store(y + i, kGated ? f.value * factor : f.value, part);
      if (y_dot == nullptr) return;
      Vec dot = f.slope * sum(gate_dot, p.gate.bias_dot, i, part);
      if (kGated) dot = dot * factor + f.value * sum(up_dot, p.up.bias_dot, i, part);
      store(y_dot + i, dot, part);
    });
  }
}

template <typename X, class Function, bool kGated>
void backward_rows(const Backward& p, std::int64_t first, std::int64_t last, float* sums) {
  for (std::int64_t r = first; r < last; ++r) {
    const std::int64_t b = r / p.problem.n_tokens, n = r % p.problem.n_tokens;
    const X *dy = row<X>(p.dy, b, n), *gate = row<X>(p.gate.x, b, n), *up = row<X>(p.up.x, b, n);
    X *dgate = row<X>(p.dgate, r, p.stride), *dup = row<X>(p.dup, r, p.stride);
    float* up_sums = sums == nullptr ? nullptr : sums + p.problem.n_columns;
    sweep<1>(p.problem.n_columns, DISCA_STEP {
      const Curve f = Function::of(sum(gate, p.gate.bias, i, part));
      const Vec d = load(dy + i, part);
      Vec of_gate = d * f.slope;
      if (kGated) of_gate *= sum(up, p.up.bias, i, part);
      if (dgate != nullptr) store(dgate + i, of_gate, part);
      if (sums != nullptr) store(sums + i, load(sums + i, part) + of_gate, part);
      if (!kGated) return;
      const Vec of_up = d * f.value;
      if (dup != nullptr) store(dup + i, of_up, part);
      if (sums != nullptr) store(up_sums + i, load(up_sums + i, part) + of_up, part);
    });
  }
}

void forward(const Forward& p, std::int64_t first, std::int64_t last) {
  with_type(p.problem.dtype, [&](auto x) {
    using X = decltype(x);
    p.up.x.data == nullptr ? forward_rows<X, Gelu, false>(p, first, last)
                           : forward_rows<X, Silu, true>(p, first, last);
  });
}

void backward(const Backward& p, std::int64_t first, std::int64_t last, float* sums) {
  with_type(p.problem.dtype, [&](auto x) {
    using X = decltype(x);
    p.up.x.data == nullptr ? backward_rows<X, Gelu, false>(p, first, last, sums)
                           : backward_rows<X, Silu, true>(p, first, last, sums);
  });
}

}  // namespace

extern const Kernels kernels = {forward, backward};

}  // namespace DISCA_ISA
}  // namespace activation
}  // namespace disca
