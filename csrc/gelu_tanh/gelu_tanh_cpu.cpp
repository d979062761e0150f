// SPDX-License-Identifier: Apache-2.0
// CPU kernels of GELU with bias and prefix, and their Python bindings.

#include "gelu_tanh/gelu_tanh.h"

#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <string>
#include <tuple>
#include <utility>

#include "common/activation_host.h"
#include "common/checks.h"

namespace py = pybind11;

namespace disca {
namespace gelu_tanh {
namespace {

using activation::Problem;
using activation::PyPair;
using activation::PyShape;

// Heads and their width.
using PyHeads = std::pair<std::int64_t, std::int64_t>;
// (address, stride_b, stride_h, stride_n)
using PyPrefix = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t>;

// Copies [B, H, N, D] to the front of rows of `out`, `stride` elements apart; zeros if absent.
void copy_heads(const std::optional<PyPrefix>& prefix, const PyHeads& sizes, char* out,
                std::int64_t stride, const Problem& s, int threads) {
  const std::int64_t heads = sizes.first, rows = s.n_batch * s.n_tokens;
  const std::int64_t item = s.dtype == Dtype::kFloat32 ? 4 : 2, bytes = sizes.second * item;
  if (out == nullptr || heads * bytes * rows == 0) return;
  const auto [address, stride_b, stride_h, stride_n] =
      prefix.value_or(PyPrefix{0, 0, 0, 0});
  check(address != 0 || !prefix.has_value(), "prefix has address 0 for ", rows, " rows");
  const char* from = reinterpret_cast<const char*>(address);
  parallel_for(rows, team(rows * heads * sizes.second, rows, threads), 0,
               [&, stride_b = stride_b, stride_h = stride_h, stride_n = stride_n](std::int64_t r,
                                                                                  float*) {
    char* to = out + r * stride * item;
    if (from == nullptr) {
      std::memset(to, 0, static_cast<std::size_t>(heads * bytes));
      return;
    }
    const char* row = from + (r / s.n_tokens * stride_b + r % s.n_tokens * stride_n) * item;
    for (std::int64_t h = 0; h < heads; ++h) {
      std::memcpy(to + h * bytes, row + h * stride_h * item, static_cast<std::size_t>(bytes));
    }
  });
}

void forward(const PyShape& shape, const std::string& dtype, const PyRows& x,
             const std::optional<PyRows>& x_dot, const PyPair& biases, const PyHeads& heads,
             const std::pair<std::optional<PyPrefix>, std::optional<PyPrefix>>& prefixes,
             const PyPair& outputs, int threads) {
  const Problem s = activation::parse_problem(shape, dtype);
  const std::int64_t rows = s.n_batch * s.n_tokens, width = heads.first * heads.second;
  check(heads.first >= 0 && heads.second >= 0, "heads must be [H >= 0, D >= 0], got [", heads.first,
        ", ", heads.second, "]");
  void* y = parse_output("y", outputs.first, outputs.second == 0, rows);
  void* y_dot = parse_output("y_dot", outputs.second, false, rows);
  const std::int64_t stride = width + s.n_columns;
  activation::run({s,
                   activation::parse_input(x, x_dot, biases, s),
                   {},
                   activation::shifted(y, width, s.dtype),
                   activation::shifted(y_dot, width, s.dtype),
                   stride},
                  threads);
  copy_heads(prefixes.first, heads, static_cast<char*>(y), stride, s, threads);
  copy_heads(prefixes.second, heads, static_cast<char*>(y_dot), stride, s, threads);
}

void backward(const PyShape& shape, const std::string& dtype, const PyRows& dy, const PyRows& x,
              std::uintptr_t bias, std::uintptr_t dx, std::uintptr_t dbias, int threads) {
  const Problem s = activation::parse_problem(shape, dtype);
  activation::run({s,
                   activation::parse_operand("dy", dy, true, s),
                   activation::parse_input(x, std::nullopt, {bias, 0}, s),
                   {},
                   reinterpret_cast<void*>(dx),
                   nullptr,
                   s.n_columns},
                  reinterpret_cast<float*>(dbias), nullptr, threads);
}

}  // namespace
}  // namespace gelu_tanh

void register_gelu_tanh(py::module_& m) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  // Pairs are of a primal and its tangent; biases and their gradients are addresses of float32.
  m.def("gelu_tanh_fwd_cpu", &gelu_tanh::forward, nogil, py::arg("shape"), py::arg("dtype"),
        py::arg("x"), py::arg("x_dot"), py::arg("biases"), py::arg("heads"), py::arg("prefixes"),
        py::arg("outputs"), py::arg("threads"));
  m.def("gelu_tanh_bwd_cpu", &gelu_tanh::backward, nogil, py::arg("shape"), py::arg("dtype"),
        py::arg("dy"), py::arg("x"), py::arg("bias"), py::arg("dx"), py::arg("dbias"),
        py::arg("threads"));
}

}  // namespace disca
