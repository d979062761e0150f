// SPDX-License-Identifier: Apache-2.0
// Python bindings of the gated residual with modulation on a CPU; the kernels are those of
// common/modulated_norm.h.

#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>

#include "common/modulated_norm_host.h"
#include "gated_residual_adaln/gated_residual_adaln.h"

namespace py = pybind11;

namespace disca {
namespace gated_residual_adaln {
namespace {

using modulated_norm::Backward;
using modulated_norm::Forward;
using modulated_norm::parse_operand;
using modulated_norm::parse_problem;
using modulated_norm::parse_tokens;
using modulated_norm::PyNorm;
using modulated_norm::PyShape;

// Of x and y, of gate, of shift and scale, of weight and bias.
using PyDtypes = std::array<std::string, 4>;

// x, y, gate, shift, scale, weight, bias.
using PyOperands = std::array<std::optional<PyRows>, 7>;

Forward parse_forward(const PyShape& shape, const PyNorm& norm, const PyDtypes& dtypes,
                      const PyOperands& operands) {
  const auto& [tokens, gate, modulation, affine] = dtypes;
  Forward p = {};
  p.problem = parse_problem(shape, norm, tokens);
  p.x = parse_operand("x", operands[0], true, tokens, p.problem);
  p.y = parse_operand("y", operands[1], true, tokens, p.problem);
  p.gate = parse_operand("gate", operands[2], true, gate, p.problem);
  p.shift = parse_operand("shift", operands[3], true, modulation, p.problem);
  p.scale = parse_operand("scale", operands[4], true, modulation, p.problem);
  p.weight = parse_operand("weight", operands[5], false, affine, p.problem);
  p.bias = parse_operand("bias", operands[6], false, affine, p.problem);
  return p;
}

// outputs: x_new, h.
void fwd_cpu(const PyShape& shape, const PyNorm& norm, const PyDtypes& dtypes,
             const PyOperands& operands, const std::array<std::uintptr_t, 2>& outputs,
             int threads) {
  Forward p = parse_forward(shape, norm, dtypes, operands);
  p.x_new = parse_tokens("x_new", outputs[0], true, p.problem);
  p.h = parse_tokens("h", outputs[1], true, p.problem);
  run(p, threads);
}

// outputs: x_new and h, which may be 0, and their tangents.
void jvp_cpu(const PyShape& shape, const PyNorm& norm, const PyDtypes& dtypes,
             const PyOperands& primals, const PyOperands& tangents,
             const std::array<std::uintptr_t, 4>& outputs, int threads) {
  const auto& [tokens, gate, modulation, affine] = dtypes;
  Forward p = parse_forward(shape, norm, dtypes, primals);
  p.x_dot = parse_operand("x_dot", tangents[0], false, tokens, p.problem);
  p.y_dot = parse_operand("y_dot", tangents[1], false, tokens, p.problem);
  p.gate_dot = parse_operand("gate_dot", tangents[2], false, gate, p.problem);
  p.shift_dot = parse_operand("shift_dot", tangents[3], false, modulation, p.problem);
  p.scale_dot = parse_operand("scale_dot", tangents[4], false, modulation, p.problem);
  p.weight_dot = parse_operand("weight_dot", tangents[5], false, affine, p.problem);
  p.bias_dot = parse_operand("bias_dot", tangents[6], false, affine, p.problem);
  p.x_new = parse_tokens("x_new", outputs[0], false, p.problem);
  p.h = parse_tokens("h", outputs[1], false, p.problem);
  p.x_new_dot = parse_tokens("x_new_dot", outputs[2], true, p.problem);
  p.h_dot = parse_tokens("h_dot", outputs[3], true, p.problem);
  run(p, threads);
}

// per_token: gate, scale. cotangents: of x_new and h, one of which may be None. saved: x_new, y,
// gate, scale, weight, bias. gradients: of x, y, gate, shift, scale, weight, bias; 0 is one that is
// not wanted, and without a cotangent of h the last four cannot be.
void bwd_cpu(const PyShape& shape, const PyNorm& norm, const std::array<bool, 2>& per_token,
             const PyDtypes& dtypes, const std::array<std::optional<PyRows>, 2>& cotangents,
             const std::array<std::optional<PyRows>, 6>& saved,
             const std::array<std::uintptr_t, 7>& gradients, int threads) {
  const auto& [tokens, gate, modulation, affine] = dtypes;
  const bool has_dh = cotangents[1].has_value();
  check(has_dh || cotangents[0].has_value(), "dx_new or dh must be given, got None for both");
  Backward p = {};
  p.problem = parse_problem(shape, norm, tokens);
  p.dx_new = parse_operand("dx_new", cotangents[0], false, tokens, p.problem);
  p.dh = parse_operand("dh", cotangents[1], false, tokens, p.problem);
  p.x_new = parse_operand("x_new", saved[0], has_dh, tokens, p.problem);
  p.y = parse_operand("y", saved[1], true, tokens, p.problem);
  p.gate = parse_operand("gate", saved[2], true, gate, p.problem);
  p.scale = parse_operand("scale", saved[3], has_dh, modulation, p.problem);
  p.weight = parse_operand("weight", saved[4], false, affine, p.problem);
  p.bias = parse_operand("bias", saved[5], false, affine, p.problem);
  p.gate_per_token = per_token[0];
  p.modulation_per_token = per_token[1];
  p.dx = parse_tokens("dx", gradients[0], false, p.problem);
  p.dy = parse_tokens("dy", gradients[1], false, p.problem);
  p.dgate = parse_tokens("dgate", gradients[2], false, p.problem);
  p.dshift = parse_tokens("dshift", gradients[3], false, p.problem);
  p.dscale = parse_tokens("dscale", gradients[4], false, p.problem);
  p.dweight = parse_tokens("dweight", gradients[5], false, p.problem);
  p.dbias = parse_tokens("dbias", gradients[6], false, p.problem);
  const bool of_norm = p.dshift != nullptr || p.dscale != nullptr || p.dweight != nullptr ||
                       p.dbias != nullptr;
  check(has_dh || !of_norm, "gradients of the modulation need dh, got None");
  run(p, threads);
}

}  // namespace
}  // namespace gated_residual_adaln

void register_gated_residual_adaln(py::module_& m) {
  namespace op = gated_residual_adaln;
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  // An operand is (address, stride_b, stride_n) or None; shape is (B, N, C), norm (eps, rms).
  m.def("gated_residual_adaln_fwd_cpu", &op::fwd_cpu, nogil, py::arg("shape"), py::arg("norm"),
        py::arg("dtypes"), py::arg("operands"), py::arg("outputs"), py::arg("threads"));
  m.def("gated_residual_adaln_jvp_cpu", &op::jvp_cpu, nogil, py::arg("shape"), py::arg("norm"),
        py::arg("dtypes"), py::arg("primals"), py::arg("tangents"), py::arg("outputs"),
        py::arg("threads"));
  m.def("gated_residual_adaln_bwd_cpu", &op::bwd_cpu, nogil, py::arg("shape"), py::arg("norm"),
        py::arg("per_token"), py::arg("dtypes"), py::arg("cotangents"), py::arg("saved"),
        py::arg("gradients"), py::arg("threads"));
}

}  // namespace disca
