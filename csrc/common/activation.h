// SPDX-License-Identifier: Apache-2.0
// What gelu_tanh and swiglu have in common: a function of one column at a time,
//
//     y = f(x + bias)        or        y = f(gate + gate_bias) * (up + up_bias)
//
// with f the tanh form of GELU in the first and SiLU in the second.
//
// The kernels are compiled once for each instruction set (activation_rows.h); this header, which
// they include, holds plain data only.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace disca {
namespace activation {

// Row (b, n) starts at data + b * stride_b + n * stride_n, in elements; an absent operand is
// data = nullptr.
struct Operand {
  void* data = nullptr;
  std::int64_t stride_b = 0;
  std::int64_t stride_n = 0;
};

// `dtype` is that of everything but biases, which are float32.
struct Problem {
  std::int64_t n_batch, n_tokens, n_columns;
  Dtype dtype;
};

// The argument of f, or the factor beside it, with a bias and tangents; any but x may be absent.
struct Input {
  Operand x, x_dot;
  const float *bias = nullptr, *bias_dot = nullptr;
};

// Without up it is GELU. Rows of outputs are `stride` elements apart; one that is not wanted is
// nullptr.
struct Forward {
  Problem problem;
  Input gate, up;
  void *y, *y_dot;
  std::int64_t stride;
};

// A gradient that is not wanted is nullptr. Rows of dgate and dup are `stride` elements apart.
struct Backward {
  Problem problem;
  Operand dy;
  Input gate, up;
  void *dgate, *dup;
  std::int64_t stride;
};

struct Kernels {
  // Values and tangents of the rows first .. last - 1 of all B * N.
  void (*forward)(const Forward& p, std::int64_t first, std::int64_t last);
  // Gradients of these rows; adds them up in `sums`, [M] of gate and then of up, unless nullptr.
  void (*backward)(const Backward& p, std::int64_t first, std::int64_t last, float* sums);
};

}  // namespace activation
}  // namespace disca
