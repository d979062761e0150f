// SPDX-License-Identifier: Apache-2.0
// CPU kernels of SwiGLU, and their Python bindings.

#include "swiglu/swiglu.h"

#include <pybind11/stl.h>

#include <optional>
#include <string>
#include <utility>

#include "common/activation_host.h"

namespace py = pybind11;

namespace disca {
namespace swiglu {
namespace {

using activation::Input;
using activation::Problem;
using activation::PyPair;
using activation::PyShape;

// Gate and up of a packed input.
std::pair<Input, Input> halves(const Input& packed, bool gate_first, const Problem& s) {
  const Input second = activation::shifted(packed, s.n_columns, s.dtype);
  return gate_first ? std::pair{packed, second} : std::pair{second, packed};
}

void forward(const PyShape& shape, const std::string& dtype, bool gate_first, const PyRows& x,
             const std::optional<PyRows>& x_dot, const PyPair& biases, const PyPair& outputs,
             int threads) {
  const Problem s = activation::parse_problem(shape, dtype);
  const std::int64_t rows = s.n_batch * s.n_tokens;
  if (rows == 0) return;
  const auto [gate, up] = halves(activation::parse_input(x, x_dot, biases, s), gate_first, s);
  activation::run({s, gate, up, parse_output("y", outputs.first, outputs.second == 0, rows),
                   parse_output("y_dot", outputs.second, false, rows), s.n_columns},
                  threads);
}

void backward(const PyShape& shape, const std::string& dtype, bool gate_first, const PyRows& dy,
              const PyRows& x, std::uintptr_t bias, std::uintptr_t dx, std::uintptr_t dbias,
              int threads) {
  const Problem s = activation::parse_problem(shape, dtype);
  const auto [gate, up] =
      halves(activation::parse_input(x, std::nullopt, {bias, 0}, s), gate_first, s);
  void* first = reinterpret_cast<void*>(dx);
  void* second = activation::shifted(first, s.n_columns, s.dtype);
  float* first_bias = reinterpret_cast<float*>(dbias);
  float* second_bias = first_bias == nullptr ? nullptr : first_bias + s.n_columns;
  if (!gate_first) {
    std::swap(first, second);
    std::swap(first_bias, second_bias);
  }
  activation::run({s, activation::parse_operand("dy", dy, true, s), gate, up, first, second,
                   2 * s.n_columns},
                  first_bias, second_bias, threads);
}

}  // namespace
}  // namespace swiglu

void register_swiglu(py::module_& m) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  // shape is that of y; biases and their gradients are addresses of float32 [2M], 0 for none.
  m.def("swiglu_fwd_cpu", &swiglu::forward, nogil, py::arg("shape"), py::arg("dtype"),
        py::arg("gate_first"), py::arg("x"), py::arg("x_dot"), py::arg("biases"),
        py::arg("outputs"), py::arg("threads"));
  m.def("swiglu_bwd_cpu", &swiglu::backward, nogil, py::arg("shape"), py::arg("dtype"),
        py::arg("gate_first"), py::arg("dy"), py::arg("x"), py::arg("bias"), py::arg("dx"),
        py::arg("dbias"), py::arg("threads"));
}

}  // namespace disca
