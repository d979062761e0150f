// SPDX-License-Identifier: Apache-2.0
// Query-key normalisation with rotary embedding on a CPU: what the bindings (qk_norm_rope_cpu.cpp)
// ask of the kernels (qk_norm_rope_cpu_rows.h), which are compiled once for each instruction set.
//
// The kernels' translation units may use nothing inline from a shared header that is not inlined
// for certain: the linker keeps one copy of such a function, and a copy compiled for a newer
// processor would then run on an older one. So this header holds plain data only.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace disca {
namespace qk_norm_rope {

// A head's row x of queries or keys becomes R(x / sqrt(mean(x * x) + eps) * weight), where R turns
// channel pairs (a, b) of the first rope_tokens tokens: (a cos - b sin, a sin + b cos). Pairs are
// neighbours if interleaved, else D / 2 apart. Values are copied.
struct Shape {
  std::int64_t n_batch, n_tokens, n_heads, head_dim, rope_tokens;
  bool interleaved;
  float eps;
  Dtype dtype;
};

// Row (b, n) of [B, N, 3 * H * D] starts at data + b * stride_b + n * stride_n, in elements; it
// holds queries, keys and values, each [H, D]. An absent operand is data = nullptr.
struct Packed {
  void* data = nullptr;
  std::int64_t stride_b = 0;
  std::int64_t stride_n = 0;
};

// Row (b, h, n) of [B, H, N, D], likewise.
struct Heads {
  void* data = nullptr;
  std::int64_t stride_b = 0;
  std::int64_t stride_h = 0;
  std::int64_t stride_n = 0;
};

// Of queries and of keys: [D]. Tables are contiguous [rope_tokens, D / 2], nullptr if there is no
// rotation.
struct Constants {
  const float* weights[2];
  const float* cos;
  const float* sin;
};

// Value (y), tangent (y_dot), or both: what is not wanted is absent, and so is a tangent that is
// zero (x_dot, weight_dots).
struct ForwardParams {
  Shape shape;
  Packed x, x_dot;
  Constants constants;
  const float* weight_dots[2];
  Heads y[3], y_dot[3];
};

// A cotangent that is absent is zero. dx may be absent. A task adds its share of the weights'
// gradients to sums [tasks, 2, D], which are zero before; nullptr if they are not wanted.
struct BackwardParams {
  Shape shape;
  Packed x;
  Constants constants;
  Heads dy[3];
  Packed dx;
  float* sums;
};

// Tokens of one sample that a task handles. It is a constant, not a share of the threads, so that
// the order of summation, and with it every bit of the result, does not depend on their number.
constexpr std::int64_t kTokens = 16;

// Rows of D floats that a task needs as scratch.
constexpr std::int64_t kScratchRows = 2 * kTokens + 2;

// Task b * ceil(N / kTokens) + i handles tokens i * kTokens and on of sample b.
struct Kernels {
  void (*forward)(const ForwardParams& p, std::int64_t task, float* scratch);
  void (*backward)(const BackwardParams& p, std::int64_t task, float* scratch);
};

}  // namespace qk_norm_rope
}  // namespace disca
