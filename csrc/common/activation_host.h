// SPDX-License-Identifier: Apache-2.0
// How the bindings of gelu_tanh and swiglu call the kernels of activation.h.
#pragma once

#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "common/activation.h"
#include "common/rows.h"

namespace disca {
namespace activation {

// B, N, M: of the results.
using PyShape = std::tuple<std::int64_t, std::int64_t, std::int64_t>;
// Two addresses, 0 for what is absent.
using PyPair = std::pair<std::uintptr_t, std::uintptr_t>;

Problem parse_problem(const PyShape& shape, const std::string& dtype);

// An operand, its tangent and the addresses of their biases.
Input parse_input(const PyRows& x, const std::optional<PyRows>& x_dot, const PyPair& biases,
                  const Problem& problem);

Operand parse_operand(const char* name, const std::optional<PyRows>& given, bool required,
                      const Problem& problem);

// The same input `columns` further, in elements of `dtype`.
Input shifted(const Input& input, std::int64_t columns, Dtype dtype);

void* shifted(void* data, std::int64_t columns, Dtype dtype);

void run(const Forward& p, int threads);

// Gradients of the biases of gate and up are [M] of float32, or nullptr. The same bits on any
// number of threads.
void run(const Backward& p, float* dgate_bias, float* dup_bias, int threads);

}  // namespace activation
}  // namespace disca
