// SPDX-License-Identifier: Apache-2.0
// How the bindings of adaln_modulate and gated_residual_adaln call the kernels of modulated_norm.h.
#pragma once

#include <optional>
#include <string>
#include <tuple>

#include "common/modulated_norm.h"
#include "common/rows.h"

namespace disca {
namespace modulated_norm {

// B, N, C.
using PyShape = std::tuple<std::int64_t, std::int64_t, std::int64_t>;

// eps, and whether the norm is that of the root of the mean square.
using PyNorm = std::tuple<float, bool>;

Problem parse_problem(const PyShape& shape, const PyNorm& norm, const std::string& dtype);

// An operand of `dtype`, which is that of the tokens or float32.
Operand parse_operand(const char* name, const std::optional<PyRows>& given, bool required,
                      const std::string& dtype, const Problem& problem);

// An output with a row for each token.
void* parse_tokens(const char* name, std::uintptr_t address, bool required,
                   const Problem& problem);

void run(const Forward& p, int threads);

// The same bits on any number of threads.
void run(Backward p, int threads);

}  // namespace modulated_norm
}  // namespace disca
