// SPDX-License-Identifier: Apache-2.0
// What the kernels of modulated_norm.h do with one row.
//
// A row is read from memory once and then again from the first-level cache, where reading and
// widening it costs less than keeping a widened copy would.

#pragma once

#include "common/modulated_norm.h"
#include "common/simd.h"

namespace disca {
namespace modulated_norm {
namespace DISCA_ISA {
namespace {

using namespace ::disca::DISCA_ISA;

// A row in the dtype X of the tokens or in float32; nullptr: absent.
template <typename X>
struct Companion {
  const void* row;
  bool wide;

  template <typename Part>
  DISCA_ALWAYS_INLINE Vec at(std::int64_t i, Part part, float otherwise = 0) const {
    if (row == nullptr) return broadcast(otherwise);
    if (wide) return load(static_cast<const float*>(row) + i, part);
    return load(static_cast<const X*>(row) + i, part);
  }
};

template <typename X>
DISCA_ALWAYS_INLINE const X* row_of(const Operand& o, std::int64_t b, std::int64_t n) {
  if (o.data == nullptr) return nullptr;
  return static_cast<const X*>(o.data) + b * o.stride_b + n * o.stride_n;
}

template <typename X>
DISCA_ALWAYS_INLINE Companion<X> companion(const Operand& o, std::int64_t b, std::int64_t n) {
  const bool wide = o.dtype == Dtype::kFloat32;
  if (wide) return {row_of<float>(o, b, n), true};
  return {row_of<X>(o, b, n), false};
}

// Row i of a contiguous output of rows of C.
template <typename X>
DISCA_ALWAYS_INLINE X* row_of(void* out, std::int64_t i, std::int64_t C) {
  return out == nullptr ? nullptr : static_cast<X*>(out) + i * C;
}

// Stores a row of a gradient in the dtype of its operand.
template <typename X>
struct GradientRow {
  void* row;
  bool wide;

  template <typename Part>
  DISCA_ALWAYS_INLINE void put(std::int64_t i, Vec v, Part part) const {
    if (wide) return store(static_cast<float*>(row) + i, v, part);
    store(static_cast<X*>(row) + i, v, part);
  }
};

template <typename X>
DISCA_ALWAYS_INLINE GradientRow<X> gradient_row(void* out, const Operand& like, std::int64_t i,
                                                std::int64_t C) {
  const bool wide = like.dtype == Dtype::kFloat32;
  return {wide ? static_cast<void*>(row_of<float>(out, i, C)) : row_of<X>(out, i, C), wide};
}

template <typename X>
constexpr bool kIsFloat = false;
template <>
constexpr bool kIsFloat<float> = true;

DISCA_ALWAYS_INLINE bool same_for_all_tokens(const Operand& o) {
  return o.data == nullptr || o.stride_n == 0;
}

// Rows of scratch, whole vectors all of them.
struct ScratchRows {
  float* first;
  std::int64_t stride;
  ScratchRows(float* at, std::int64_t C) : first(at), stride(round_up(C, kRowFloats)) {}
  float* operator[](int i) const { return first + i * stride; }
};
enum Row { kA, kB, kADot, kBDot, kGate, kGateDot, kGain, kXNew, kXNewDot };

template <typename X>
inline void widen(const Operand& o, std::int64_t b, std::int64_t n, std::int64_t C, float* out) {
  const auto from = companion<X>(o, b, n);
  sweep<1>(C, DISCA_STEP { store(out + i, from.at(i, part)); });
}

template <int kSlots>
DISCA_ALWAYS_INLINE float total(const Vec (&sums)[kSlots]) {
  Vec sum = sums[0];
  for (int i = 1; i < kSlots; ++i) sum += sums[i];
  return horizontal_sum(sum);
}

// x_hat = (x - mean - rest) * rstd; rest is what rounding left of the mean.
struct Norm {
  float mean, rest, rstd;
  DISCA_ALWAYS_INLINE Vec x_hat(Vec x) const { return (x - mean - rest) * rstd; }
};

template <typename X>
DISCA_ALWAYS_INLINE float mean_of(const X* x, std::int64_t C) {
  Vec sums[4] = {};
  sweep<4>(C, DISCA_STEP { sums[slot] += load(x + i, part); });
  return total(sums) / static_cast<float>(C);
}

// From the sums of x - mean and of its square. What a whole row is scaled by is worth doubles.
DISCA_ALWAYS_INLINE Norm norm_of(float mean, float sum, float squares, const Problem& p) {
  const double C = static_cast<double>(p.n_channels);
  const double rest = p.rms ? 0.0 : sum / C;
  const double variance = squares / C - rest * rest;
  const double rstd = 1.0 / __builtin_sqrt((variance < 0 ? 0.0 : variance) + p.eps);
  return {mean, static_cast<float>(rest), static_cast<float>(rstd)};
}

template <typename X>
DISCA_ALWAYS_INLINE Norm normalise(const X* x, float mean, const Problem& p) {
  Vec sums[2] = {}, squares[2] = {};
  sweep<2>(p.n_channels, DISCA_STEP {
    const Vec d = present(load(x + i, part) - mean, part);
    sums[slot] += d;
    squares[slot] += d * d;
  });
  return norm_of(mean, total(sums), total(squares), p);
}

// The Jacobian of the norm maps a row v to rstd * (v - mean - x_hat * correlation), with the mean
// of v (0 for an RMS norm) and correlation = mean(v * x_hat).
struct Projection {
  float mean, correlation;
  DISCA_ALWAYS_INLINE Vec of(Vec v, Vec x_hat, const Norm& norm) const {
    return (v - mean - x_hat * correlation) * norm.rstd;
  }
};

// `at(i, part)` is the row v. The norm has the same bits as without it.
template <typename X, typename At>
DISCA_ALWAYS_INLINE Norm normalise(const X* x, float mean, const Problem& p, Projection& projection,
                                   const At& at) {
  Vec sums[2] = {}, squares[2] = {}, v_sums[2] = {}, products[2] = {};
  sweep<2>(p.n_channels, DISCA_STEP {
    const Vec d = present(load(x + i, part) - mean, part), v = settled(at(i, part));
    sums[slot] += d;
    squares[slot] += d * d;
    v_sums[slot] += v;
    products[slot] += d * v;
  });
  const Norm norm = norm_of(mean, total(sums), total(squares), p);
  const float C = static_cast<float>(p.n_channels), v_mean = total(v_sums) / C;
  projection.mean = p.rms ? 0.0f : v_mean;
  projection.correlation = (total(products) / C - norm.rest * v_mean) * norm.rstd;
  return norm;
}
#define DISCA_AT [&](std::int64_t i, auto part) __attribute__((always_inline))

}  // namespace
}  // namespace DISCA_ISA
}  // namespace modulated_norm
}  // namespace disca
