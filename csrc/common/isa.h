// SPDX-License-Identifier: Apache-2.0
// Which of the variants of a kernel runs: those that CMakeLists.txt compiles for each instruction
// set.
#pragma once

#include <cstdlib>
#include <string>

#include "common/checks.h"

// Declares the table of a kernel's functions, of type `Table`, in the namespace of each variant.
#define DISCA_DECLARE_VARIANTS(Table)               \
  namespace baseline { extern const Table kernels; } \
  namespace avx2 { extern const Table kernels; }     \
  namespace avx512 { extern const Table kernels; }

#if defined(DISCA_HAS_X86_LEVELS)
#define DISCA_CHOOSE_VARIANT() \
  ::disca::choose_variant(baseline::kernels, &avx2::kernels, &avx512::kernels)
#else
#define DISCA_CHOOSE_VARIANT() ::disca::choose_variant(baseline::kernels)
#endif

namespace disca {

// The widest that the processor runs, or the one that the environment variable DISCA_CPU_ISA names.
// avx512_bf16, which only attention has, means avx512 here.
template <typename Table>
const Table& choose_variant(const Table& baseline, const Table* avx2 = nullptr,
                            const Table* avx512 = nullptr) {
#if defined(DISCA_HAS_X86_LEVELS)
  if (!__builtin_cpu_supports("x86-64-v4")) avx512 = nullptr;
  if (!__builtin_cpu_supports("x86-64-v3")) avx2 = nullptr;
#endif
  const char* const variable = std::getenv("DISCA_CPU_ISA");
  const std::string wanted = variable == nullptr ? "" : variable;
  if (wanted.empty()) return avx512 != nullptr ? *avx512 : avx2 != nullptr ? *avx2 : baseline;
  if (wanted == "baseline") return baseline;
  if (wanted == "avx2" && avx2 != nullptr) return *avx2;
  if ((wanted == "avx512" || wanted == "avx512_bf16") && avx512 != nullptr) return *avx512;
  check(false, "DISCA_CPU_ISA must be one of ", avx512 != nullptr ? "avx512, " : "",
        avx2 != nullptr ? "avx2, " : "", "baseline here, got ", wanted);
  return baseline;
}

}  // namespace disca
