// SPDX-License-Identifier: Apache-2.0
// A tile of tokens of cache_read. A file that includes this defines DISCA_ISA, the namespace that
// the kernels go into, and is compiled for that instruction set.
//
// The weights are packed once for all tiles, tokens once for all outputs. A block of kOutputs
// outputs is summed over kDepth channels at a time, so that a panel of the weight stays in the
// first-level cache while the rows of the tile pass.

#include "cache_read/cache_read_cpu.h"
#include "common/activation_curves.h"
#include "common/gemm.h"
#include "common/simd.h"

namespace disca {
namespace cache_read {
namespace DISCA_ISA {

using namespace ::disca::DISCA_ISA;
using Silu = ::disca::activation::DISCA_ISA::Silu;

namespace {

constexpr std::int64_t kOutputs = 192;  // a multiple of kPanel for every instruction set
constexpr std::int64_t kDepth = 256;

DISCA_ALWAYS_INLINE std::int64_t half_floats(const Shape& s) {
  return round_up(s.n_outputs, kPanel) * s.n_channels;
}

std::int64_t packed_floats(const Shape& s) { return 2 * half_floats(s); }

DISCA_ALWAYS_INLINE std::int64_t tokens_floats(const Shape& s) {
  return kTileTokens * s.n_channels;
}

std::int64_t scratch_floats(const Params& p) {
  return 4 * tokens_floats(p.shape) + 2 * kTileTokens * kOutputs;
}

void pack_weight(const Weight& weight, const Shape& s, std::int64_t first, float* packed) {
  for (int half = 0; half < 2; ++half) {
    const std::int64_t item = s.dtype == Dtype::kFloat32 ? 4 : 2;
    const std::int64_t offset = (first * weight.stride + half * s.n_channels) * item;
    const Source rows = {static_cast<const char*>(weight.data) + offset, weight.stride,
                         s.n_outputs - first};
    pack_transposed(s.dtype, rows, kPanel, s.n_channels,
                    packed + half * half_floats(s) + first * s.n_channels);
  }
}

void pack(const Params& p, std::int64_t task) {
  pack_weight(p.weight, p.shape, task * kPanel, p.packed);
  if (p.weight_dot.data != nullptr) {
    pack_weight(p.weight_dot, p.shape, task * kPanel, p.packed_dot);
  }
}

// Where a task works.
struct Place {
  std::int64_t b, first, rows, groups;
};

void pack_tokens(const Tokens& x, const Shape& s, const Place& at, float* out) {
  const std::int64_t item = s.dtype == Dtype::kFloat32 ? 4 : 2;
  const std::int64_t offset = (at.b * x.stride_b + at.first * x.stride_n) * item;
  const Source rows = {static_cast<const char*>(x.data) + offset, x.stride_n, at.rows};
  pack_rows(s.dtype, rows, at.groups * kRows, s.n_channels, 1.0, out);
}

// sum [kTileTokens, kOutputs] += tokens half^T for the block of outputs that `weight` starts with.
void add_product(const float* tokens, const float* weight, const Shape& s, const Place& at,
                 std::int64_t n_outputs, float* sum, bool& started) {
  for (std::int64_t c = 0; c < s.n_channels; c += kDepth) {
    multiply<float, 1, kRows>(tokens + c * kRows, s.n_channels * kRows, at.groups,
                              weight + c * kPanel, s.n_channels * kPanel, n_outputs / kVec,
                              least(kDepth, s.n_channels - c), sum, kOutputs, started);
    started = true;
  }
}

// What a row of sums becomes: z with its bias, y and y_dot.
template <typename X>
void finish_row(const Params& p, std::int64_t row, std::int64_t first, const float* sum,
                const float* sum_dot) {
  const Shape& s = p.shape;
  const std::int64_t offset = row * s.n_outputs + first;
  const auto at = [&](void* data) {
    return data == nullptr ? nullptr : static_cast<X*>(data) + offset;
  };
  X *const y = at(p.y), *const z = at(p.z), *const y_dot = at(p.y_dot);
  const float* const bias = p.bias == nullptr ? nullptr : p.bias + first;
  const float* const bias_dot = p.bias_dot == nullptr ? nullptr : p.bias_dot + first;
  sweep<1>(least(kOutputs, s.n_outputs - first), DISCA_STEP {
    Vec b_z = load(sum + i, part);
    if (bias != nullptr) b_z += load(bias + i, part);
    const auto curve = Silu::of(b_z);
    if (z != nullptr) store(z + i, b_z, part);
    if (y != nullptr) store(y + i, curve.value, part);
    if (y_dot != nullptr) {
      Vec b_z_dot = sum_dot == nullptr ? Vec{} : load(sum_dot + i, part);
      if (bias_dot != nullptr) b_z_dot += load(bias_dot + i, part);
      store(y_dot + i, curve.slope * b_z_dot, part);
    }
  });
}

void tile(const Params& p, std::int64_t task, float* scratch) {
  const Shape& s = p.shape;
  const std::int64_t per_sample = ceil_div(s.n_tokens, kTileTokens);
  const std::int64_t first_token = task % per_sample * kTileTokens;
  const std::int64_t rows = least(kTileTokens, s.n_tokens - first_token);
  const Place at = {task / per_sample, first_token, rows, ceil_div(rows, kRows)};
  float* const sum = scratch + 4 * tokens_floats(s);
  float* const sum_dot = sum + kTileTokens * kOutputs;
  const auto tokens = [&](int half) { return scratch + half * tokens_floats(s); };
  const auto tokens_dot = [&](int half) { return scratch + (2 + half) * tokens_floats(s); };
  for (int half = 0; half < 2; ++half) {
    pack_tokens(p.tokens[half], s, at, tokens(half));
    if (p.tokens_dot[half].data != nullptr) {
      pack_tokens(p.tokens_dot[half], s, at, tokens_dot(half));
    }
  }
  for (std::int64_t first = 0; first < s.n_outputs; first += kOutputs) {
    const std::int64_t n = least(kOutputs, round_up(s.n_outputs, kPanel) - first);
    bool started = false, started_dot = false;
    for (int half = 0; half < 2; ++half) {
      const std::int64_t offset = half * half_floats(s) + first * s.n_channels;
      add_product(tokens(half), p.packed + offset, s, at, n, sum, started);
      if (p.tokens_dot[half].data != nullptr) {
        add_product(tokens_dot(half), p.packed + offset, s, at, n, sum_dot, started_dot);
      }
      if (p.weight_dot.data != nullptr) {
        add_product(tokens(half), p.packed_dot + offset, s, at, n, sum_dot, started_dot);
      }
    }
    with_type(s.dtype, [&](auto tag) {
      for (std::int64_t r = 0; r < rows; ++r) {
        finish_row<decltype(tag)>(p, at.b * s.n_tokens + first_token + r, first,
                                  sum + r * kOutputs,
                                  started_dot ? sum_dot + r * kOutputs : nullptr);
      }
    });
  }
}

}  // namespace

extern const Kernels kernels = {kPanel, packed_floats, scratch_floats, pack, tile};

}  // namespace DISCA_ISA
}  // namespace cache_read
}  // namespace disca
