// SPDX-License-Identifier: Apache-2.0
// Python bindings of adaptive norm modulation on a CPU; the kernels are those of
// common/modulated_norm.h.

#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>

#include "adaln_modulate/adaln_modulate.h"
#include "common/checks.h"
#include "common/modulated_norm_host.h"

namespace py = pybind11;

namespace disca {
namespace adaln_modulate {
namespace {

using modulated_norm::Backward;
using modulated_norm::Forward;
using modulated_norm::parse_operand;
using modulated_norm::parse_problem;
using modulated_norm::parse_tokens;
using modulated_norm::Problem;
using modulated_norm::PyNorm;
using modulated_norm::PyShape;

// Of x, of shift and scale, of weight and bias.
using PyDtypes = std::array<std::string, 3>;

// x, shift, scale, weight, bias.
using PyOperands = std::array<std::optional<PyRows>, 5>;

Forward parse_forward(const PyShape& shape, const PyNorm& norm, const PyDtypes& dtypes,
                      const PyOperands& operands) {
  const auto& [tokens, modulation, affine] = dtypes;
  Forward p = {};
  p.problem = parse_problem(shape, norm, tokens);
  p.x = parse_operand("x", operands[0], true, tokens, p.problem);
  p.shift = parse_operand("shift", operands[1], true, modulation, p.problem);
  p.scale = parse_operand("scale", operands[2], true, modulation, p.problem);
  p.weight = parse_operand("weight", operands[3], false, affine, p.problem);
  p.bias = parse_operand("bias", operands[4], false, affine, p.problem);
  return p;
}

void fwd_cpu(const PyShape& shape, const PyNorm& norm, const PyDtypes& dtypes,
             const PyOperands& operands, std::uintptr_t y, int threads) {
  Forward p = parse_forward(shape, norm, dtypes, operands);
  p.h = parse_tokens("y", y, true, p.problem);
  run(p, threads);
}

// outputs: y, which may be 0, and y_dot.
void jvp_cpu(const PyShape& shape, const PyNorm& norm, const PyDtypes& dtypes,
             const PyOperands& primals, const PyOperands& tangents,
             const std::array<std::uintptr_t, 2>& outputs, int threads) {
  const auto& [tokens, modulation, affine] = dtypes;
  Forward p = parse_forward(shape, norm, dtypes, primals);
  p.x_dot = parse_operand("x_dot", tangents[0], false, tokens, p.problem);
  p.shift_dot = parse_operand("shift_dot", tangents[1], false, modulation, p.problem);
  p.scale_dot = parse_operand("scale_dot", tangents[2], false, modulation, p.problem);
  p.weight_dot = parse_operand("weight_dot", tangents[3], false, affine, p.problem);
  p.bias_dot = parse_operand("bias_dot", tangents[4], false, affine, p.problem);
  p.h = parse_tokens("y", outputs[0], false, p.problem);
  p.h_dot = parse_tokens("y_dot", outputs[1], true, p.problem);
  run(p, threads);
}

// saved: x, scale, weight, bias. gradients: of x, shift, scale, weight, bias; 0 is one that is not
// wanted.
void bwd_cpu(const PyShape& shape, const PyNorm& norm, bool per_token, const PyDtypes& dtypes,
             const PyRows& dy, const std::array<std::optional<PyRows>, 4>& saved,
             const std::array<std::uintptr_t, 5>& gradients, int threads) {
  const auto& [tokens, modulation, affine] = dtypes;
  Backward p = {};
  p.problem = parse_problem(shape, norm, tokens);
  p.dh = parse_operand("dy", dy, true, tokens, p.problem);
  p.x_new = parse_operand("x", saved[0], true, tokens, p.problem);
  p.scale = parse_operand("scale", saved[1], true, modulation, p.problem);
  p.weight = parse_operand("weight", saved[2], false, affine, p.problem);
  p.bias = parse_operand("bias", saved[3], false, affine, p.problem);
  p.modulation_per_token = per_token;
  p.dx = parse_tokens("dx", gradients[0], false, p.problem);
  p.dshift = parse_tokens("dshift", gradients[1], false, p.problem);
  p.dscale = parse_tokens("dscale", gradients[2], false, p.problem);
  p.dweight = parse_tokens("dweight", gradients[3], false, p.problem);
  p.dbias = parse_tokens("dbias", gradients[4], false, p.problem);
  run(p, threads);
}

}  // namespace
}  // namespace adaln_modulate

void register_adaln_modulate(py::module_& m) {
  namespace op = adaln_modulate;
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  // An operand is (address, stride_b, stride_n) or None; shape is (B, N, C), norm (eps, rms).
  m.def("adaln_modulate_fwd_cpu", &op::fwd_cpu, nogil, py::arg("shape"), py::arg("norm"),
        py::arg("dtypes"), py::arg("operands"), py::arg("y"), py::arg("threads"));
  m.def("adaln_modulate_jvp_cpu", &op::jvp_cpu, nogil, py::arg("shape"), py::arg("norm"),
        py::arg("dtypes"), py::arg("primals"), py::arg("tangents"), py::arg("outputs"),
        py::arg("threads"));
  m.def("adaln_modulate_bwd_cpu", &op::bwd_cpu, nogil, py::arg("shape"), py::arg("norm"),
        py::arg("per_token"), py::arg("dtypes"), py::arg("dy"), py::arg("saved"),
        py::arg("gradients"), py::arg("threads"));
#if defined(DISCA_WITH_CUDA)
  register_adaln_modulate_cuda(m);
#endif
}

}  // namespace disca
