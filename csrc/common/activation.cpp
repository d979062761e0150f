// SPDX-License-Identifier: Apache-2.0
// Runs the kernels of activation.h: picks an instruction set, owns threads and partial sums.

#include <algorithm>
#include <cstddef>
#include <vector>

#include "common/activation_host.h"
#include "common/isa.h"

namespace disca {
namespace activation {

DISCA_DECLARE_VARIANTS(Kernels)

namespace {

// Rows of one task, and parts whose sums are added in the end. They are constants, not shares of
// the threads, so that the order of summation does not depend on their number.
constexpr std::int64_t kRows = 16, kMaxParts = 128;

std::int64_t rows_of(const Problem& s) { return s.n_batch * s.n_tokens; }

std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

std::int64_t size_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : 2; }

const float* floats(std::uintptr_t address) { return reinterpret_cast<const float*>(address); }

}  // namespace

Problem parse_problem(const PyShape& shape, const std::string& dtype) {
  const auto& [n_batch, n_tokens, n_columns] = shape;
  check(n_batch >= 0 && n_tokens >= 0 && n_columns > 0, "shape must be [B, N, M > 0], got [",
        n_batch, ", ", n_tokens, ", ", n_columns, "]");
  return {n_batch, n_tokens, n_columns, parse_dtype(dtype)};
}

Operand parse_operand(const char* name, const std::optional<PyRows>& given, bool required,
                      const Problem& problem) {
  const Rows rows = parse_rows(name, given, required, rows_of(problem));
  return {rows.data, rows.stride_b, rows.stride_n};
}

Input parse_input(const PyRows& x, const std::optional<PyRows>& x_dot, const PyPair& biases,
                  const Problem& problem) {
  return {parse_operand("x", x, true, problem), parse_operand("x_dot", x_dot, false, problem),
          floats(biases.first), floats(biases.second)};
}

void* shifted(void* data, std::int64_t columns, Dtype dtype) {
  return data == nullptr ? nullptr : static_cast<char*>(data) + columns * size_of(dtype);
}

Input shifted(const Input& input, std::int64_t columns, Dtype dtype) {
  Input other = input;
  other.x.data = shifted(input.x.data, columns, dtype);
  other.x_dot.data = shifted(input.x_dot.data, columns, dtype);
  if (input.bias != nullptr) other.bias = input.bias + columns;
  if (input.bias_dot != nullptr) other.bias_dot = input.bias_dot + columns;
  return other;
}

void run(const Forward& p, int threads) {
  const std::int64_t rows = rows_of(p.problem), tasks = ceil_div(rows, kRows);
  const Kernels& kernels = DISCA_CHOOSE_VARIANT();
  parallel_for(tasks, team(rows * p.problem.n_columns, tasks, threads), 0,
               [&](std::int64_t task, float*) {
    kernels.forward(p, task * kRows, std::min((task + 1) * kRows, rows));
  });
}

void run(const Backward& p, float* dgate_bias, float* dup_bias, int threads) {
  const bool summed = dgate_bias != nullptr || dup_bias != nullptr;
  const std::int64_t rows = rows_of(p.problem), columns = p.problem.n_columns;
  const std::int64_t each = std::max(kRows, ceil_div(rows, kMaxParts));
  const std::int64_t tasks = ceil_div(rows, each);
  const std::int64_t width = (p.up.x.data == nullptr ? 1 : 2) * columns;
  std::vector<float> sums(summed ? static_cast<std::size_t>(tasks * width) : 0);
  const Kernels& kernels = DISCA_CHOOSE_VARIANT();
  parallel_for(tasks, team(rows * columns, tasks, threads), 0, [&](std::int64_t task, float*) {
    kernels.backward(p, task * each, std::min((task + 1) * each, rows),
                     summed ? sums.data() + task * width : nullptr);
  });
  const float* part = sums.data();
  for (float* out : {dgate_bias, dup_bias}) {
    if (out != nullptr) {
      std::vector<double> total(static_cast<std::size_t>(columns));
      for (std::int64_t task = 0; task < tasks; ++task) {
        const float* of_task = part + task * width;
        for (std::int64_t c = 0; c < columns; ++c) total[static_cast<std::size_t>(c)] += of_task[c];
      }
      std::copy(total.begin(), total.end(), out);
    }
    part += columns;
  }
}

}  // namespace activation
}  // namespace disca
