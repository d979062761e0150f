// SPDX-License-Identifier: Apache-2.0
// Python bindings of the gated residual on a CPU; the kernels are those of
// common/modulated_norm.h.

#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>

#include "common/modulated_norm_host.h"
#include "gated_residual/gated_residual.h"

namespace py = pybind11;

namespace disca {
namespace gated_residual {
namespace {

using modulated_norm::Backward;
using modulated_norm::Forward;
using modulated_norm::parse_operand;
using modulated_norm::parse_problem;
using modulated_norm::parse_tokens;
using modulated_norm::PyNorm;
using modulated_norm::PyShape;

// Of x and y, of gate.
using PyDtypes = std::array<std::string, 2>;

// x, y, gate.
using PyOperands = std::array<std::optional<PyRows>, 3>;

constexpr PyNorm kNoNorm = {0.0f, true};

Forward parse_forward(const PyShape& shape, const PyDtypes& dtypes, const PyOperands& operands) {
  const auto& [tokens, modulation] = dtypes;
  Forward p = {};
  p.problem = parse_problem(shape, kNoNorm, tokens);
  p.x = parse_operand("x", operands[0], true, tokens, p.problem);
  p.y = parse_operand("y", operands[1], true, tokens, p.problem);
  p.gate = parse_operand("gate", operands[2], true, modulation, p.problem);
  return p;
}

void fwd_cpu(const PyShape& shape, const PyDtypes& dtypes, const PyOperands& operands,
             std::uintptr_t out, int threads) {
  Forward p = parse_forward(shape, dtypes, operands);
  p.x_new = parse_tokens("out", out, true, p.problem);
  run(p, threads);
}

// outputs: the value, which may be 0, and the tangent.
void jvp_cpu(const PyShape& shape, const PyDtypes& dtypes, const PyOperands& primals,
             const PyOperands& tangents, const std::array<std::uintptr_t, 2>& outputs,
             int threads) {
  const auto& [tokens, modulation] = dtypes;
  Forward p = parse_forward(shape, dtypes, primals);
  p.x_dot = parse_operand("x_dot", tangents[0], false, tokens, p.problem);
  p.y_dot = parse_operand("y_dot", tangents[1], false, tokens, p.problem);
  p.gate_dot = parse_operand("gate_dot", tangents[2], false, modulation, p.problem);
  p.x_new = parse_tokens("out", outputs[0], false, p.problem);
  p.x_new_dot = parse_tokens("out_dot", outputs[1], true, p.problem);
  run(p, threads);
}

// saved: y, gate. gradients: of y and gate; 0 is one that is not wanted.
void bwd_cpu(const PyShape& shape, bool per_token, const PyDtypes& dtypes, const PyRows& dout,
             const std::array<std::optional<PyRows>, 2>& saved,
             const std::array<std::uintptr_t, 2>& gradients, int threads) {
  const auto& [tokens, modulation] = dtypes;
  Backward p = {};
  p.problem = parse_problem(shape, kNoNorm, tokens);
  p.dx_new = parse_operand("dout", dout, true, tokens, p.problem);
  p.y = parse_operand("y", saved[0], true, tokens, p.problem);
  p.gate = parse_operand("gate", saved[1], true, modulation, p.problem);
  p.gate_per_token = per_token;
  p.dy = parse_tokens("dy", gradients[0], false, p.problem);
  p.dgate = parse_tokens("dgate", gradients[1], false, p.problem);
  run(p, threads);
}

}  // namespace
}  // namespace gated_residual

void register_gated_residual(py::module_& m) {
  namespace op = gated_residual;
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  // An operand is (address, stride_b, stride_n) or None; shape is (B, N, C).
  m.def("gated_residual_fwd_cpu", &op::fwd_cpu, nogil, py::arg("shape"), py::arg("dtypes"),
        py::arg("operands"), py::arg("out"), py::arg("threads"));
  m.def("gated_residual_jvp_cpu", &op::jvp_cpu, nogil, py::arg("shape"), py::arg("dtypes"),
        py::arg("primals"), py::arg("tangents"), py::arg("outputs"), py::arg("threads"));
  m.def("gated_residual_bwd_cpu", &op::bwd_cpu, nogil, py::arg("shape"), py::arg("per_token"),
        py::arg("dtypes"), py::arg("dout"), py::arg("saved"), py::arg("gradients"),
        py::arg("threads"));
}

}  // namespace disca
