// SPDX-License-Identifier: Apache-2.0
// Runs the CPU kernels of cache_read: their Python bindings, scratch and threads.

#include "cache_read/cache_read_cpu.h"

#include <pybind11/stl.h>

#include <array>
#include <optional>
#include <string>
#include <utility>

#include "cache_read/cache_read.h"
#include "common/checks.h"
#include "common/isa.h"
#include "common/rows.h"

namespace py = pybind11;

namespace disca {
namespace cache_read {

DISCA_DECLARE_VARIANTS(Kernels)

namespace {

using PyShape = std::array<std::int64_t, 4>;
using PyTokens = std::pair<std::optional<PyRows>, std::optional<PyRows>>;
using PyWeight = std::pair<std::uintptr_t, std::int64_t>;
using PyBiases = std::pair<std::uintptr_t, std::uintptr_t>;

Shape parse_shape(const PyShape& given, const std::string& dtype) {
  const auto [n_batch, n_tokens, n_channels, n_outputs] = given;
  check(n_batch >= 0 && n_tokens >= 0 && n_channels > 0 && n_outputs > 0,
        "shape must be [B >= 0, N >= 0, C > 0, O > 0], got [", n_batch, ", ", n_tokens, ", ",
        n_channels, ", ", n_outputs, "]");
  return {n_batch, n_tokens, n_channels, n_outputs, parse_dtype(dtype)};
}

Tokens parse_tokens(const char* name, const std::optional<PyRows>& given, bool required,
                    const Shape& s) {
  const Rows rows = parse_rows(name, given, required, s.n_batch * s.n_tokens);
  return {rows.data, rows.stride_b, rows.stride_n};
}

Weight parse_weight(const char* name, const PyWeight& given, bool required) {
  check(given.first != 0 || !required, name, " has address 0");
  return {reinterpret_cast<const void*>(given.first), given.second};
}

void run(Params p, int threads) {
  const Shape& s = p.shape;
  const std::int64_t tasks = s.n_batch * ((s.n_tokens + kTileTokens - 1) / kTileTokens);
  if (tasks == 0) return;
  const Kernels& kernels = DISCA_CHOOSE_VARIANT();
  const std::int64_t floats = kernels.packed_floats(s);
  const Scratch packed(floats), packed_dot(p.weight_dot.data == nullptr ? 0 : floats);
  p.packed = packed.get();
  p.packed_dot = packed_dot.get();
  const std::int64_t panels = (s.n_outputs + kernels.panel - 1) / kernels.panel;
  parallel_for(panels, team(floats, panels, threads), 0,
               [&](std::int64_t task, float*) { kernels.pack(p, task); });
  parallel_for(tasks, team(s.n_batch * s.n_tokens * s.n_channels, tasks, threads),
               kernels.scratch_floats(p),
               [&](std::int64_t task, float* scratch) { kernels.tile(p, task, scratch); });
}

// Addresses of y, z and y_dot, 0 for one that is not wanted.
void value_and_tangent(const PyShape& shape, const std::string& dtype, const PyTokens& tokens,
                       const PyTokens& tokens_dot, const std::pair<PyWeight, PyWeight>& weights,
                       const PyBiases& biases, const std::array<std::uintptr_t, 3>& outputs,
                       int threads) {
  const Shape s = parse_shape(shape, dtype);
  const std::int64_t n_rows = s.n_batch * s.n_tokens;
  Params p{};
  p.shape = s;
  p.tokens[0] = parse_tokens("current", tokens.first, true, s);
  p.tokens[1] = parse_tokens("cache", tokens.second, true, s);
  p.tokens_dot[0] = parse_tokens("current_dot", tokens_dot.first, false, s);
  p.tokens_dot[1] = parse_tokens("cache_dot", tokens_dot.second, false, s);
  p.weight = parse_weight("weight", weights.first, true);
  p.weight_dot = parse_weight("weight_dot", weights.second, false);
  p.bias = reinterpret_cast<const float*>(biases.first);
  p.bias_dot = reinterpret_cast<const float*>(biases.second);
  p.y = parse_output("y", outputs[0], outputs[2] == 0, n_rows);
  p.z = parse_output("z", outputs[1], false, n_rows);
  p.y_dot = parse_output("y_dot", outputs[2], false, n_rows);
  run(p, threads);
}

}  // namespace
}  // namespace cache_read

void register_cache_read(py::module_& m) {
  // A weight is (address, stride of its rows); pairs are of current and cache, or of a primal and
  // its tangent; biases are addresses of float32; see _C.pyi.
  m.def("cache_read_cpu", &cache_read::value_and_tangent,
        py::call_guard<py::gil_scoped_release>(), py::arg("shape"), py::arg("dtype"),
        py::arg("tokens"), py::arg("tokens_dot"), py::arg("weights"), py::arg("biases"),
        py::arg("outputs"), py::arg("threads"));
}

}  // namespace disca
