// SPDX-License-Identifier: Apache-2.0
// Runs the CPU kernels of query-key normalisation with rotary embedding: picks an instruction set,
// owns scratch and threads, adds the weights' gradients. The Python bindings are here too.

#include "qk_norm_rope/qk_norm_rope_cpu.h"

#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "common/checks.h"
#include "common/isa.h"
#include "common/rows.h"
#include "qk_norm_rope/qk_norm_rope.h"

namespace py = pybind11;

namespace disca {
namespace qk_norm_rope {

DISCA_DECLARE_VARIANTS(Kernels)

namespace {

std::int64_t tasks_of(const Shape& s) {
  return s.n_batch * ((s.n_tokens + kTokens - 1) / kTokens);
}

template <typename Params>
void run(const Params& p, void (*kernel)(const Params&, std::int64_t, float*), int threads) {
  const Shape& s = p.shape;
  const std::int64_t tasks = tasks_of(s);
  const std::int64_t elements = 3 * s.n_batch * s.n_tokens * s.n_heads * s.head_dim;
  parallel_for(tasks, team(elements, tasks, threads), kScratchRows * s.head_dim,
               [&](std::int64_t task, float* scratch) { kernel(p, task, scratch); });
}

// (B, N, H, D, rope_tokens, interleaved)
using PyShape =
    std::tuple<std::int64_t, std::int64_t, std::int64_t, std::int64_t, std::int64_t, bool>;
using PyPair = std::pair<std::uintptr_t, std::uintptr_t>;
// (address, stride_b, stride_h, stride_n)
using PyHeads = std::tuple<std::uintptr_t, std::int64_t, std::int64_t, std::int64_t>;
using PyTriple = std::array<std::optional<PyHeads>, 3>;

Shape shape_of(const PyShape& given, float eps, const std::string& dtype) {
  const auto& [n_batch, n_tokens, n_heads, head_dim, rope_tokens, interleaved] = given;
  check(n_batch >= 0 && n_tokens >= 0 && n_heads > 0 && head_dim > 0 && head_dim % 2 == 0,
        "shape must be [B >= 0, N >= 0, H > 0, even D > 0], got [", n_batch, ", ", n_tokens, ", ",
        n_heads, ", ", head_dim, "]");
  check(0 <= rope_tokens && rope_tokens <= n_tokens, "rope_tokens must be 0 to ", n_tokens,
        ", got ", rope_tokens);
  return {n_batch, n_tokens, n_heads, head_dim, rope_tokens, interleaved, eps, parse_dtype(dtype)};
}

Packed packed(const char* name, const std::optional<PyRows>& given, bool required, const Shape& s) {
  const Rows rows = parse_rows(name, given, required, s.n_batch * s.n_tokens);
  return {rows.data, rows.stride_b, rows.stride_n};
}

Heads heads(const char* name, const std::optional<PyHeads>& given, const Shape& s) {
  if (!given.has_value()) return {};
  const auto& [address, stride_b, stride_h, stride_n] = *given;
  check(address != 0 || s.n_batch * s.n_tokens == 0, name, " has address 0 for ",
        s.n_batch * s.n_tokens, " rows");
  return {reinterpret_cast<void*>(address), stride_b, stride_h, stride_n};
}

const float* floats(std::uintptr_t address) { return reinterpret_cast<const float*>(address); }

// `ones` stands for a weight that is absent.
Constants constants(const PyPair& weights, const PyPair& tables, const Shape& s,
                    const std::vector<float>& ones) {
  const auto [cos, sin] = tables;
  check(s.rope_tokens == 0 || (cos != 0 && sin != 0), "tables have addresses ", cos, " and ", sin,
        " for ", s.rope_tokens, " tokens that are turned");
  const auto weight = [&](std::uintptr_t given) {
    return given == 0 ? ones.data() : floats(given);
  };
  return {{weight(weights.first), weight(weights.second)}, floats(cos), floats(sin)};
}

void forward_cpu(const PyShape& sizes, float eps, const std::string& dtype, const PyRows& x,
                 const std::optional<PyRows>& x_dot, const PyPair& weights,
                 const PyPair& weight_dots, const PyPair& tables, const PyTriple& y,
                 const PyTriple& y_dot, int threads) {
  const Shape s = shape_of(sizes, eps, dtype);
  const std::vector<float> ones(static_cast<std::size_t>(s.head_dim), 1.0f);
  ForwardParams p = {s,
                     packed("qkv", x, true, s),
                     packed("qkv_dot", x_dot, false, s),
                     constants(weights, tables, s, ones),
                     {floats(weight_dots.first), floats(weight_dots.second)},
                     {},
                     {}};
  for (std::size_t i = 0; i < 3; ++i) {
    p.y[i] = heads("a value", y[i], s);
    p.y_dot[i] = heads("a tangent", y_dot[i], s);
  }
  run(p, DISCA_CHOOSE_VARIANT().forward, threads);
}

void backward_cpu(const PyShape& sizes, float eps, const std::string& dtype, const PyTriple& dy,
                  const PyRows& x, const PyPair& weights, const PyPair& tables,
                  const std::optional<PyRows>& dx, const PyPair& dweights, int threads) {
  const Shape s = shape_of(sizes, eps, dtype);
  const std::vector<float> ones(static_cast<std::size_t>(s.head_dim), 1.0f);
  const std::int64_t row = 2 * s.head_dim, tasks = tasks_of(s);
  const bool summed = dweights.first != 0 || dweights.second != 0;
  std::vector<float> sums(summed ? static_cast<std::size_t>(tasks * row) : 0);
  BackwardParams p = {s,
                      packed("qkv", x, true, s),
                      constants(weights, tables, s, ones),
                      {},
                      packed("dqkv", dx, false, s),
                      summed ? sums.data() : nullptr};
  for (std::size_t i = 0; i < 3; ++i) p.dy[i] = heads("a cotangent", dy[i], s);
  run(p, DISCA_CHOOSE_VARIANT().backward, threads);
  if (!summed) return;
  for (std::int64_t i = 0; i < row; ++i) {
    double total = 0;
    for (std::int64_t task = 0; task < tasks; ++task) {
      total += sums[static_cast<std::size_t>(task * row + i)];
    }
    const bool of_queries = i < s.head_dim;
    const std::uintptr_t out = of_queries ? dweights.first : dweights.second;
    if (out == 0) continue;
    reinterpret_cast<float*>(out)[of_queries ? i : i - s.head_dim] = static_cast<float>(total);
  }
}

}  // namespace
}  // namespace qk_norm_rope

void register_qk_norm_rope(py::module_& m) {
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  // Pairs are of queries and keys, or cosines and sines: addresses of float32, 0 for none.
  m.def("qk_norm_rope_fwd_cpu", &qk_norm_rope::forward_cpu, nogil, py::arg("shape"), py::arg("eps"),
        py::arg("dtype"), py::arg("qkv"), py::arg("qkv_dot"), py::arg("weights"),
        py::arg("weight_dots"), py::arg("tables"), py::arg("values"), py::arg("tangents"),
        py::arg("threads"));
  m.def("qk_norm_rope_bwd_cpu", &qk_norm_rope::backward_cpu, nogil, py::arg("shape"),
        py::arg("eps"), py::arg("dtype"), py::arg("cotangents"), py::arg("qkv"), py::arg("weights"),
        py::arg("tables"), py::arg("dqkv"), py::arg("dweights"), py::arg("threads"));
}

}  // namespace disca
