// SPDX-License-Identifier: Apache-2.0
// Vectors of floats as wide as the instruction set that the including file is compiled for, in
// GCC's and Clang's vector extensions. Everything here has internal linkage.
#pragma once

#include <cstdint>
#if defined(__SSE2__)
#pragma GCC diagnostic push
#if !defined(__clang__)
// GCC takes its own way of leaving a register undefined for an oversight.
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif
#include <immintrin.h>
#pragma GCC diagnostic pop
#endif

#include "common/dtype.h"

#define DISCA_ALWAYS_INLINE inline __attribute__((always_inline))

namespace disca {
namespace attention {
namespace DISCA_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kVec = 16;
#elif defined(__AVX__)
constexpr int kVec = 8;
#else
constexpr int kVec = 4;
#endif

typedef float Vec __attribute__((vector_size(4 * kVec)));
typedef std::int32_t IntVec __attribute__((vector_size(4 * kVec)));

constexpr float kInfinity = __builtin_inff();
constexpr double kLog2E = 1.4426950408889634;
constexpr double kLn2 = 0.6931471805599453;

DISCA_ALWAYS_INLINE std::int64_t least(std::int64_t a, std::int64_t b) { return a < b ? a : b; }
DISCA_ALWAYS_INLINE std::int64_t most(std::int64_t a, std::int64_t b) { return a < b ? b : a; }
DISCA_ALWAYS_INLINE std::int64_t ceil_div(std::int64_t a, std::int64_t b) {
  return (a + b - 1) / b;
}
DISCA_ALWAYS_INLINE std::int64_t round_up(std::int64_t a, std::int64_t b) {
  return ceil_div(a, b) * b;
}

// x - 0 is x also for x = -0, so the compiler sees a plain broadcast.
DISCA_ALWAYS_INLINE Vec broadcast(float x) { return x - Vec{}; }

DISCA_ALWAYS_INLINE Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

DISCA_ALWAYS_INLINE void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }

// Of two numbers the larger; b if either is NaN.
DISCA_ALWAYS_INLINE Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return _mm512_max_ps(a, b);
#elif defined(__AVX__)
  return _mm256_max_ps(a, b);
#elif defined(__SSE2__)
  return _mm_max_ps(a, b);
#else
  return a > b ? a : b;
#endif
}

DISCA_ALWAYS_INLINE float horizontal_sum(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps(v);
#else
  float sum = 0;
  for (int i = 0; i < kVec; ++i) sum += v[i];
  return sum;
#endif
}

DISCA_ALWAYS_INLINE float horizontal_max(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps(v);
#else
  float largest = v[0];
  for (int i = 1; i < kVec; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
#endif
}

// The first n lanes of v, and `other` in the lanes beyond.
DISCA_ALWAYS_INLINE Vec first_lanes(Vec v, std::int64_t n, float other) {
  IntVec lane;
  for (int i = 0; i < kVec; ++i) lane[i] = i;
  const IntVec chosen = lane < (static_cast<std::int32_t>(n) - IntVec{});
  return chosen ? v : broadcast(other);
}

// 2^(x - base) within about one unit in the last place if that is below 2^128, 0 below 2^-126; NaN
// stays NaN. The base is an integer of at most kMaxBase, so that nothing is rounded before the
// power is taken.
constexpr float kMaxBase = 1 << 21;
DISCA_ALWAYS_INLINE Vec exp2(Vec x, float base) {
  const Vec lowest = broadcast(base - 126.0f);
  // Adding 1.5 * 2^23 rounds to an integer, which is then in the low bits; 127 is the exponent's
  // bias, so that a shift makes those bits the float 2^(n - base).
  const Vec shifter = broadcast(12582912.0f + 127.0f - base);
  const Vec clamped = maximum(lowest, x);
  const Vec shifted = clamped + shifter;
  const Vec f = clamped - (shifted - shifter);
  const Vec power = (Vec)((IntVec)shifted << 23);
  // The best polynomial of 2^f in relative error, which is 2e-9, on [-1/2, 1/2].
  Vec y = broadcast(0x1.41fbbcp-13f);
  y = y * f + broadcast(0x1.5f3e54p-10f);
  y = y * f + broadcast(0x1.3b2d4cp-7f);
  y = y * f + broadcast(0x1.c6aee8p-5f);
  y = y * f + broadcast(0x1.ebfbdcp-3f);
  y = y * f + broadcast(0x1.62e430p-1f);
  y = y * f + broadcast(1.0f);
  return x < lowest ? Vec{} : y * power;
}

// Two bfloat16 values that are multiplied and added in one instruction.
struct Pair {
  std::uint32_t bits;
};

#if defined(__AVX512BF16__)
constexpr bool kHasPairs = true;
DISCA_ALWAYS_INLINE void store_rounded(std::uint16_t* p, Vec v) {
  const __m256bh rounded = _mm512_cvtneps_pbh(v);
  __builtin_memcpy(p, &rounded, sizeof rounded);
}
DISCA_ALWAYS_INLINE IntVec rounded_bits(Vec v) {
  const __m256bh rounded = _mm512_cvtneps_pbh(v);
  return (IntVec)_mm512_cvtepu16_epi32((__m256i)rounded);
}
#else
constexpr bool kHasPairs = false;
#endif

}  // namespace
}  // namespace DISCA_ISA
}  // namespace attention
}  // namespace disca
