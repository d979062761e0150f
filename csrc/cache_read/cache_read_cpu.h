// SPDX-License-Identifier: Apache-2.0
// y = SiLU([current, cache] weight^T + bias) on a CPU: what the bindings (cache_read_cpu.cpp) ask of
// the kernels (cache_read_cpu_tile.h), which are compiled once for each instruction set.
//
// The kernels' translation units may use nothing inline from a shared header that is not inlined
// for certain: the linker keeps one copy of such a function, and a copy compiled for a newer
// processor would then run on an older one. So this header holds plain data only.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace disca {
namespace cache_read {

struct Shape {
  std::int64_t n_batch, n_tokens, n_channels, n_outputs;
  Dtype dtype;
};

// Row (b, n) of [B, N, C] starts at data + b * stride_b + n * stride_n, in elements. An absent
// operand is data = nullptr.
struct Tokens {
  const void* data = nullptr;
  std::int64_t stride_b = 0;
  std::int64_t stride_n = 0;
};

// Row o of [O, 2C], likewise.
struct Weight {
  const void* data = nullptr;
  std::int64_t stride = 0;
};

// Pairs are of current and cache, or of the halves of a weight that meet them. Results [B, N, O]
// are contiguous, nullptr if they are not wanted; so is a bias, [O], that is absent.
struct Params {
  Shape shape;
  Tokens tokens[2], tokens_dot[2];
  Weight weight, weight_dot;
  const float *bias, *bias_dot;
  void *y, *z, *y_dot;
  float *packed, *packed_dot;  // the weights as the tiles read them, see packed_floats
};

// Tokens of one sample that a task handles: a multiple of the rows of every instruction set's
// smallest block. It is a constant, not a share of the threads, so that what a task computes does
// not depend on their number.
constexpr std::int64_t kTileTokens = 48;

struct Kernels {
  // Outputs that a task of `pack` handles.
  std::int64_t panel;
  // Floats that a packed weight takes.
  std::int64_t (*packed_floats)(const Shape& shape);
  // Floats of scratch that a task of `tile` needs.
  std::int64_t (*scratch_floats)(const Params& p);
  // Task i packs outputs i * panel and on.
  void (*pack)(const Params& p, std::int64_t task);
  // Task b * ceil(N / kTileTokens) + i handles tokens i * kTileTokens and on of sample b.
  void (*tile)(const Params& p, std::int64_t task, float* scratch);
};

}  // namespace cache_read
}  // namespace disca
