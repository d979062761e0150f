// SPDX-License-Identifier: Apache-2.0
// What attention adds to the vectors of common/simd.h: products of pairs of bfloat16 values.
#pragma once

#include "common/gemm.h"
#include "common/simd.h"

namespace disca {
namespace attention {
namespace DISCA_ISA {

using namespace ::disca::DISCA_ISA;

namespace {

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
