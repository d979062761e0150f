// SPDX-License-Identifier: Apache-2.0
// Activations and their slopes.
//
// A sigmoid is taken of -|w|, so that no power overflows, and its derivative as a product, so that
// nothing cancels: both are accurate in both tails. Beyond a limit, where the sigmoid is 0 or 1, z
// is replaced by the limit, so that no product is 0 * inf. NaN stays NaN: a comparison with it is
// false.
#pragma once

#include "common/simd.h"

namespace disca {
namespace activation {
namespace DISCA_ISA {

using namespace ::disca::DISCA_ISA;

namespace {

struct Curve {
  Vec value, slope;
};

// The sigmoid of w / log2(e), and its derivative by w / log2(e).
DISCA_ALWAYS_INLINE Curve sigmoid(Vec w) {
  const Vec negative = (Vec)((UintVec)w | 0x80000000u);
  const Vec power = exp2(negative, 0.0f);
  const Vec large = 1.0f / (1.0f + power);
  const Vec small = power * large;
  return {w < 0.0f ? small : large, small * large};
}

DISCA_ALWAYS_INLINE Vec at_least(Vec z, float limit) {
  return z < limit ? broadcast(limit) : z;
}

DISCA_ALWAYS_INLINE Vec at_most(Vec z, float limit) { return z > limit ? broadcast(limit) : z; }

// z / 2 (1 + tanh(sqrt(2 / pi) (z + 0.044715 z^3)))
struct Gelu {
  DISCA_ALWAYS_INLINE static Curve of(Vec z) {
    constexpr double kTwice = 1.5957691216057308, kCubic = 0.044715;  // 2 sqrt(2 / pi)
    constexpr float kLimit = 24.0f;
    const Vec low = at_least(z, -kLimit), inner = at_most(low, kLimit), square = inner * inner;
    const Curve s = sigmoid(inner * (static_cast<float>(kTwice * kLog2E) +
                                     static_cast<float>(kTwice * kLog2E * kCubic) * square));
    const Vec steepness =
        inner * (static_cast<float>(kTwice) + static_cast<float>(3 * kTwice * kCubic) * square);
    return {low * s.value, s.value + steepness * s.slope};
  }
};

// z * sigmoid(z)
struct Silu {
  DISCA_ALWAYS_INLINE static Curve of(Vec z) {
    constexpr float kLimit = 128.0f;
    const Vec low = at_least(z, -kLimit), inner = at_most(low, kLimit);
    const Curve s = sigmoid(inner * static_cast<float>(kLog2E));
    return {low * s.value, s.value + inner * s.slope};
  }
};

}  // namespace
}  // namespace DISCA_ISA
}  // namespace activation
}  // namespace disca
