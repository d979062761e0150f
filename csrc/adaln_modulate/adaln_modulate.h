// SPDX-License-Identifier: Apache-2.0
// Adaptive layer-norm modulation: y = x_hat * (1 + scale) + shift, where x_hat is a row of x with
// its mean removed, divided by its standard deviation. Tokens are [B, N, C]; a modulation has one
// row per sample [B, C] or per token [B, N, C]. The last dimension of every operand is contiguous.
// What is declared here is the CUDA part; common/modulated_norm.h has the CPU's.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <string>

#include "common/rows.h"

namespace disca {

namespace adaln_modulate {

struct Shape {
  std::int64_t n_batch, n_tokens, n_channels;
  bool per_token;  // of the modulations
  float eps;
};

// Outputs are contiguous [B, N, C].
struct ForwardParams {
  Shape shape;
  Rows x, shift, scale;
  void* y;
};

// A gradient that is not wanted is nullptr; dshift and dscale come together. Per token they have
// the dtype of scale, per sample they are float32 partial sums [B, n_splits, C] of rows_per_split
// rows each.
struct BackwardParams {
  Shape shape;
  Rows dy, x, scale;
  void *dx, *dshift, *dscale;
  std::int64_t n_splits, rows_per_split;
};

// A tangent that is absent is zero. Without y only y_dot is written.
struct JvpParams {
  Shape shape;
  Rows x, shift, scale, x_dot, shift_dot, scale_dot;
  void *y, *y_dot;
};

// x, gradients with respect to it and values have one dtype; modulations and theirs have another
// or the same.
struct Dtypes {
  std::string x, modulation;
};

// `stream` is a cudaStream_t; the current device must be the one that holds the operands.
void fwd_cuda(const ForwardParams& p, const Dtypes& dtypes, std::uintptr_t stream);
void bwd_cuda(const BackwardParams& p, const Dtypes& dtypes, std::uintptr_t stream);
void jvp_cuda(const JvpParams& p, const Dtypes& dtypes, std::uintptr_t stream);

}  // namespace adaln_modulate

void register_adaln_modulate(pybind11::module_& m);
void register_adaln_modulate_cuda(pybind11::module_& m);

}  // namespace disca
