// SPDX-License-Identifier: Apache-2.0
// Python bindings of the CPU kernels of attention.

#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <tuple>

#include "attention/attention.h"
#include "common/checks.h"

namespace py = pybind11;

namespace disca {
namespace attention {
namespace {

using PyOperand = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t>;
using PyTriple = std::tuple<PyOperand, PyOperand, PyOperand>;
using PyTangents =
    std::tuple<std::optional<PyOperand>, std::optional<PyOperand>, std::optional<PyOperand>>;

// B, H, H of the keys, Nq, Nk, D; block; scale; dtype; address of the lengths or 0.
using PyProblem =
    std::tuple<std::array<std::int64_t, 6>, std::int64_t, double, std::string, std::uintptr_t>;

Problem problem(const PyProblem& given) {
  const auto& [sizes, block, scale, name, kv_lengths] = given;
  const auto [B, H, H_kv, n_queries, n_keys, D] = sizes;
  check(B >= 0 && H >= 0 && n_queries >= 0 && n_keys >= 0, "sizes must not be negative, got B ", B,
        ", H ", H, ", Nq ", n_queries, ", Nk ", n_keys);
  check(D >= 1 && D <= kMaxHeadDim, "the head dimension must be 1 .. ", kMaxHeadDim, ", got ", D);
  check(H_kv > 0 ? H % H_kv == 0 : H == 0, "the ", H,
        " query heads must be a multiple of the key heads, got ", H_kv);
  check(block >= 0, "block must not be negative, got ", block);
  return {B,     H,     H_kv,  n_queries,
          n_keys, D,    block, scale,
          parse_dtype(name), reinterpret_cast<const std::int64_t*>(kv_lengths)};
}

// Strides are trusted; an address that is missing where there is something to read is not.
Operand operand(const char* name, const PyOperand& given, std::int64_t elements) {
  const auto& [address, stride_b, stride_h, stride_n] = given;
  check(address != 0 || elements == 0, name, " has address 0 for ", elements, " elements");
  return {reinterpret_cast<const void*>(address), stride_b, stride_h, stride_n};
}

Operand operand(const char* name, const std::optional<PyOperand>& given, std::int64_t elements) {
  return given.has_value() ? operand(name, *given, elements) : Operand{};
}

template <typename T>
T* output(const char* name, std::uintptr_t address, std::int64_t elements) {
  check(address != 0 || elements == 0, name, " has address 0 for ", elements, " elements");
  return reinterpret_cast<T*>(address);
}

std::int64_t query_rows(const Problem& p) { return p.n_batch * p.n_heads * p.n_queries; }
std::int64_t queries(const Problem& p) { return query_rows(p) * p.head_dim; }
std::int64_t keys(const Problem& p) {
  return p.n_batch * p.n_kv_heads * p.n_keys * p.head_dim;
}

ForwardParams forward_params(const PyProblem& given, const PyTriple& primals) {
  ForwardParams p{};
  p.problem = problem(given);
  p.q = operand("q", std::get<0>(primals), queries(p.problem));
  p.k = operand("k", std::get<1>(primals), keys(p.problem));
  p.v = operand("v", std::get<2>(primals), keys(p.problem));
  return p;
}

void add_tangents(ForwardParams& p, const PyTangents& tangents) {
  p.q_dot = operand("q_dot", std::get<0>(tangents), queries(p.problem));
  p.k_dot = operand("k_dot", std::get<1>(tangents), keys(p.problem));
  p.v_dot = operand("v_dot", std::get<2>(tangents), keys(p.problem));
}

// Addresses of o, lse and rest, which is 0 if it is not wanted.
void fwd(const PyProblem& given, const PyTriple& primals,
         const std::array<std::uintptr_t, 3>& outputs, const std::string& isa, int threads) {
  ForwardParams p = forward_params(given, primals);
  p.o = output<void>("o", outputs[0], queries(p.problem));
  p.lse = output<float>("lse", outputs[1], query_rows(p.problem));
  p.rest = reinterpret_cast<void*>(outputs[2]);
  forward_cpu(p, isa, threads);
}

// Addresses of o, lse, o_dot and lse_dot.
void jvp(const PyProblem& given, const PyTriple& primals, const PyTangents& tangents,
         const std::array<std::uintptr_t, 4>& outputs, const std::string& isa, int threads) {
  ForwardParams p = forward_params(given, primals);
  add_tangents(p, tangents);
  p.o = output<void>("o", outputs[0], queries(p.problem));
  p.lse = output<float>("lse", outputs[1], query_rows(p.problem));
  p.o_dot = output<void>("o_dot", outputs[2], queries(p.problem));
  p.lse_dot = output<float>("lse_dot", outputs[3], query_rows(p.problem));
  forward_cpu(p, isa, threads);
}

// What is known: o, rest or None, and the address of lse. Addresses of o_dot and lse_dot.
void tangent(const PyProblem& given, const PyTriple& primals, const PyTangents& tangents,
             const std::tuple<PyOperand, std::optional<PyOperand>, std::uintptr_t>& known,
             const std::array<std::uintptr_t, 2>& outputs, const std::string& isa, int threads) {
  ForwardParams p = forward_params(given, primals);
  add_tangents(p, tangents);
  const auto& [o, rest, lse] = known;
  p.known_o = operand("o", o, queries(p.problem));
  p.known_rest = operand("rest", rest, queries(p.problem));
  p.known_lse = output<float>("lse", lse, query_rows(p.problem));
  p.o_dot = output<void>("o_dot", outputs[0], queries(p.problem));
  p.lse_dot = output<float>("lse_dot", outputs[1], query_rows(p.problem));
  forward_cpu(p, isa, threads);
}

// What is known: o, and the addresses of lse and of dlse, which is 0 for zero. Addresses of dq, dk
// and dv.
void bwd(const PyProblem& given, const PyOperand& d_o, const PyTriple& primals,
         const std::tuple<PyOperand, std::uintptr_t, std::uintptr_t>& known,
         const std::array<std::uintptr_t, 3>& outputs, const std::string& isa, int threads) {
  BackwardParams p{};
  p.problem = problem(given);
  const std::int64_t n_q = queries(p.problem), n_k = keys(p.problem);
  const auto& [o, lse, dlse] = known;
  p.d_o = operand("do", d_o, n_q);
  p.q = operand("q", std::get<0>(primals), n_q);
  p.k = operand("k", std::get<1>(primals), n_k);
  p.v = operand("v", std::get<2>(primals), n_k);
  p.o = operand("o", o, n_q);
  p.lse = output<float>("lse", lse, query_rows(p.problem));
  p.dlse = reinterpret_cast<const float*>(dlse);
  p.dq = output<void>("dq", outputs[0], n_q);
  p.dk = output<void>("dk", outputs[1], n_k);
  p.dv = output<void>("dv", outputs[2], n_k);
  backward_cpu(p, isa, threads);
}

}  // namespace
}  // namespace attention

void register_attention(py::module_& m) {
  namespace op = attention;
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  // An operand is (address, stride_b, stride_h, stride_n), an output an address; see _C.pyi.
  m.def("attention_cpu_isas", &op::cpu_isas, "Instruction sets usable here, the widest first.");
  m.def("attention_fwd_cpu", &op::fwd, nogil, py::arg("problem"), py::arg("primals"),
        py::arg("outputs"), py::arg("isa"), py::arg("threads"));
  m.def("attention_jvp_cpu", &op::jvp, nogil, py::arg("problem"), py::arg("primals"),
        py::arg("tangents"), py::arg("outputs"), py::arg("isa"), py::arg("threads"));
  m.def("attention_tangent_cpu", &op::tangent, nogil, py::arg("problem"), py::arg("primals"),
        py::arg("tangents"), py::arg("known"), py::arg("outputs"), py::arg("isa"),
        py::arg("threads"));
  m.def("attention_bwd_cpu", &op::bwd, nogil, py::arg("problem"), py::arg("d_o"),
        py::arg("primals"), py::arg("known"), py::arg("outputs"), py::arg("isa"),
        py::arg("threads"));
}

}  // namespace disca
