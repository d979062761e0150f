// SPDX-License-Identifier: Apache-2.0
// What adaln_modulate, gated_residual and gated_residual_adaln have in common: a gated update of a
// row, and a row normalised and modulated,
//
//     x_new = x + gate * y
//     h = (x_hat * weight + bias) * (1 + scale) + shift,   x_hat = norm(x_new)
//
// alone or one after the other, where h is that of x_new as it is rounded to its dtype. A norm
// subtracts the mean and divides by the standard deviation, or (rms) divides by the root of the
// mean square.
//
// The kernels are compiled once for each instruction set (modulated_norm_variant.h); this
// header, which they include, holds plain data only.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace disca {
namespace modulated_norm {

// Row (b, n) starts at data + b * stride_b + n * stride_n, in elements. One row per sample is
// stride_n = 0, one row for all is both 0; an absent operand is data = nullptr.
struct Operand {
  void* data = nullptr;
  std::int64_t stride_b = 0;
  std::int64_t stride_n = 0;
  Dtype dtype = Dtype::kFloat32;
};

// `dtype` is that of x, y, x_new, h, their tangents and gradients.
struct Problem {
  std::int64_t n_batch, n_tokens, n_channels;
  Dtype dtype;
  float eps;
  bool rms;
};

// Values and, where there is room for them, tangents. Without gate and y, x is x_new; without scale
// and shift there is no h. An absent tangent is zero. Outputs are contiguous [B, N, C]; one that is
// not wanted is nullptr.
struct Forward {
  Problem problem;
  Operand x, y, gate, shift, scale, weight, bias;
  Operand x_dot, y_dot, gate_dot, shift_dot, scale_dot, weight_dot, bias_dot;
  void *x_new, *h, *x_new_dot, *h_dot;
};

// dx_new and dh are the gradients of the outputs; either may be absent, and without dh the norm has
// no gradients. Those of modulations and affine vectors are contiguous, in the dtype of their
// operand; a modulation that tokens do not share has a row for each. One that is not wanted is
// nullptr. Without a gate, dx is the gradient of x_new.
struct Backward {
  Problem problem;
  Operand dx_new, dh, x_new, y, gate, scale, weight, bias;
  bool modulation_per_token, gate_per_token;
  void *dx, *dy, *dgate, *dshift, *dscale, *dweight, *dbias;
  bool norm_sums;  // whether dh and dh * x_hat are to be summed
};

// What backward sums over rows, each a row of floats. With a modulation for each token dh stands
// for dh * (1 + scale) in the first two.
enum Sum { kSumDh, kSumDhXHat, kSumDgate, kSums };

// Rows of floats that a task needs as scratch. They, and sums, have n_channels floats rounded up to
// kRowFloats, so that all of them are whole vectors.
constexpr std::int64_t kScratchRows = 9;
constexpr std::int64_t kRowFloats = 16;

struct Kernels {
  // Values and tangents of the rows first .. last - 1 of sample b.
  void (*forward)(const Forward& p, std::int64_t b, std::int64_t first, std::int64_t last,
                  float* scratch);
  // Gradients of these rows; adds to `sums`, which is nullptr if none is wanted.
  void (*backward)(const Backward& p, std::int64_t b, std::int64_t first, std::int64_t last,
                   float* sums, float* scratch);
  // sums += part
  void (*add)(const float* part, float* sums, std::int64_t n);
  // Stores gradients from the sums of a sample; adds to those of weight and bias unless nullptr.
  void (*finish_sample)(const Backward& p, std::int64_t b, const float* sums, float* affine);
  // Stores the gradients of weight and bias.
  void (*finish)(const Backward& p, const float* affine);
};

}  // namespace modulated_norm
}  // namespace disca
