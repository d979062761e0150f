// SPDX-License-Identifier: Apache-2.0
// Vectors of floats as wide as the instruction set that the including file is compiled for, in
// GCC's and Clang's vector extensions. Such a file is compiled once for each instruction set, with
// DISCA_ISA as the name of its namespace. Everything here has internal linkage: the linker keeps
// one copy of a shared inline function, which might be one for a newer processor.
#pragma once

#include <cstddef>
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

// v rounded to float: the compiler must not fuse the product that v is into a sum. So that what is
// equal stays equal where it is subtracted, as the one element of a row and their mean.
DISCA_ALWAYS_INLINE Vec settled(Vec v) {
#if defined(__AVX512F__)
  asm("" : "+v"(v));
#elif defined(__SSE2__)
  asm("" : "+x"(v));
#elif defined(__aarch64__)
  asm("" : "+w"(v));
#endif
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

typedef std::uint32_t UintVec __attribute__((vector_size(4 * kVec)));
typedef std::uint16_t HalfVec __attribute__((vector_size(2 * kVec)));

DISCA_ALWAYS_INLINE Vec load(const BFloat16* p) {
  HalfVec bits;
  __builtin_memcpy(&bits, p, sizeof bits);
  return (Vec)(__builtin_convertvector(bits, UintVec) << 16);
}

// In the upper half of each lane v as bfloat16, to nearest, ties to even; the lower half is not 0.
DISCA_ALWAYS_INLINE UintVec bfloat16_bits(Vec v) {
  const UintVec bits = (UintVec)v;
  const UintVec rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return v == v ? rounded : bits | 0x7fc00000u;
}

DISCA_ALWAYS_INLINE void store_upper(BFloat16* p, UintVec bits) {
  const HalfVec narrow = __builtin_convertvector(bits >> 16, HalfVec);
  __builtin_memcpy(p, &narrow, sizeof narrow);
}
DISCA_ALWAYS_INLINE void store(BFloat16* p, Vec v) { store_upper(p, bfloat16_bits(v)); }

#if defined(__AVX512F__)
DISCA_ALWAYS_INLINE Vec load(const Float16* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
DISCA_ALWAYS_INLINE void store(Float16* p, Vec v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p),
                      _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__F16C__)
DISCA_ALWAYS_INLINE Vec load(const Float16* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
DISCA_ALWAYS_INLINE void store(Float16* p, Vec v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
#else
DISCA_ALWAYS_INLINE Vec load(const Float16* p) {
  Vec v;
  for (int i = 0; i < kVec; ++i) v[i] = to_float(p[i]);
  return v;
}
DISCA_ALWAYS_INLINE void store(Float16* p, Vec v) {
  for (int i = 0; i < kVec; ++i) p[i] = from_float<Float16>(v[i]);
}
#endif

// body(X{}) with the type of the elements in memory.
template <class Body>
DISCA_ALWAYS_INLINE void with_type(Dtype dtype, const Body& body) {
  switch (dtype) {
    case Dtype::kFloat32: return body(float{});
    case Dtype::kBFloat16: return body(BFloat16{});
    case Dtype::kFloat16: return body(Float16{});
  }
}

// What a step of a loop over a row covers: a whole vector, or what is left of the row.
struct Whole {};
struct Rest {
  std::int64_t n;
};

// Lanes beyond the rest of a row are 0.
template <typename T>
DISCA_ALWAYS_INLINE Vec load(const T* p, Whole) {
  return load(p);
}
template <typename T>
DISCA_ALWAYS_INLINE Vec load(const T* p, Rest rest) {
  T lanes[kVec] = {};
  __builtin_memcpy(lanes, p, static_cast<std::size_t>(rest.n) * sizeof(T));
  return load(lanes);
}

template <typename T>
DISCA_ALWAYS_INLINE void store(T* p, Vec v, Whole) {
  store(p, v);
}
template <typename T>
DISCA_ALWAYS_INLINE void store(T* p, Vec v, Rest rest) {
  T lanes[kVec];
  store(lanes, v);
  __builtin_memcpy(p, lanes, static_cast<std::size_t>(rest.n) * sizeof(T));
}

// Stores v; returns it as it was stored.
template <typename Part>
DISCA_ALWAYS_INLINE Vec store_and_round(float* p, Vec v, Part part) {
  store(p, v, part);
  return v;
}
DISCA_ALWAYS_INLINE Vec store_and_round(BFloat16* p, Vec v, Whole) {
  const UintVec bits = bfloat16_bits(v);
  store_upper(p, bits);
  return (Vec)(bits & 0xffff0000u);
}
DISCA_ALWAYS_INLINE Vec store_and_round(BFloat16* p, Vec v, Rest rest) {
  store(p, v, rest);
  return (Vec)(bfloat16_bits(v) & 0xffff0000u);
}
template <typename Part>
DISCA_ALWAYS_INLINE Vec store_and_round(Float16* p, Vec v, Part part) {
  store(p, v, part);
  return load(p, part);
}

DISCA_ALWAYS_INLINE Vec present(Vec v, Whole) { return v; }
DISCA_ALWAYS_INLINE Vec present(Vec v, Rest rest) { return first_lanes(v, rest.n, 0.0f); }

// step(i, part, slot) over a row of n elements, kSlots vectors at a time, each with a sum of its
// own: an addition waits for the one before it, and several sums do not wait for each other.
template <int kSlots, typename Step>
DISCA_ALWAYS_INLINE void sweep(std::int64_t n, const Step& step) {
  std::int64_t i = 0;
  for (; i + kSlots * kVec <= n; i += kSlots * kVec) {
    step(i, Whole{}, 0);
    if (kSlots > 1) step(i + kVec, Whole{}, 1);
    if (kSlots > 2) step(i + 2 * kVec, Whole{}, 2);
    if (kSlots > 3) step(i + 3 * kVec, Whole{}, 3);
  }
  for (; i + kVec <= n; i += kVec) step(i, Whole{}, 0);
  if (i < n) step(i, Rest{n - i}, 0);
}
#define DISCA_STEP                                                                  \
  [&](std::int64_t i, [[maybe_unused]] auto part, [[maybe_unused]] int slot) \
      __attribute__((always_inline))

}  // namespace
}  // namespace DISCA_ISA
}  // namespace disca
