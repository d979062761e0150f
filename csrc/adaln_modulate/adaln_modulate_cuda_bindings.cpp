// SPDX-License-Identifier: Apache-2.0
// Python bindings of the CUDA kernels of adaptive layer-norm modulation.

#include <pybind11/stl.h>

#include <optional>
#include <tuple>

#include "adaln_modulate/adaln_modulate.h"
#include "common/checks.h"

namespace py = pybind11;

#if defined(DISCA_WITH_CUDA)
namespace disca {
namespace adaln_modulate {
namespace {

using PyShape = std::tuple<std::int64_t, std::int64_t, std::int64_t, bool>;

Rows rows(const char* name, const std::optional<PyRows>& given, bool required, const Shape& s) {
  return parse_rows(name, given, required, s.n_batch * s.n_tokens);
}

void* output(const char* name, std::uintptr_t address, bool required, const Shape& s) {
  return parse_output(name, address, required, s.n_batch * s.n_tokens);
}

Shape shape(const PyShape& given, float eps) {
  const auto& [n_batch, n_tokens, n_channels, per_token] = given;
  check(n_batch >= 0 && n_tokens >= 0 && n_channels > 0,
        "shape must be [B >= 0, N >= 0, C > 0], got [", n_batch, ", ", n_tokens, ", ", n_channels,
        "]");
  return {n_batch, n_tokens, n_channels, per_token, eps};
}

ForwardParams forward_params(const PyShape& sizes, float eps, const PyRows& x, const PyRows& shift,
                             const PyRows& scale, std::uintptr_t y) {
  const Shape s = shape(sizes, eps);
  return {s, rows("x", x, true, s), rows("shift", shift, true, s), rows("scale", scale, true, s),
          output("y", y, true, s)};
}

BackwardParams backward_params(const PyShape& sizes, float eps, const PyRows& dy, const PyRows& x,
                               const PyRows& scale, std::uintptr_t dx, std::uintptr_t dshift,
                               std::uintptr_t dscale) {
  const Shape s = shape(sizes, eps);
  check((dshift == 0) == (dscale == 0), "dshift and dscale come together, got addresses ", dshift,
        " and ", dscale);
  return {s,
          rows("dy", dy, true, s),
          rows("x", x, true, s),
          rows("scale", scale, true, s),
          output("dx", dx, false, s),
          output("dshift", dshift, false, s),
          output("dscale", dscale, false, s),
          0,
          0};
}

using PyTangents = std::tuple<std::optional<PyRows>, std::optional<PyRows>, std::optional<PyRows>>;

using PyPrimals = std::tuple<PyRows, PyRows, PyRows>;

JvpParams jvp_params(const PyShape& sizes, float eps, const PyPrimals& primals,
                     const PyTangents& tangents, std::uintptr_t y, std::uintptr_t y_dot) {
  const Shape s = shape(sizes, eps);
  const auto& [x, shift, scale] = primals;
  const auto& [x_dot, shift_dot, scale_dot] = tangents;
  return {s,
          rows("x", x, true, s),
          rows("shift", shift, true, s),
          rows("scale", scale, true, s),
          rows("x_dot", x_dot, false, s),
          rows("shift_dot", shift_dot, false, s),
          rows("scale_dot", scale_dot, false, s),
          output("y", y, false, s),
          output("y_dot", y_dot, true, s)};
}

Dtypes names(const std::pair<std::string, std::string>& dtypes) {
  return {dtypes.first, dtypes.second};
}

}  // namespace
}  // namespace adaln_modulate

void register_adaln_modulate_cuda(py::module_& m) {
  namespace op = adaln_modulate;
  using PyDtypes = std::pair<std::string, std::string>;
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  // An operand is (address, stride_b, stride_n); shape is (B, N, C, per_token); dtypes are those of
  // x and of the modulations; an output that is not wanted has address 0.
  m.def(
      "adaln_modulate_fwd_cuda",
      [](const op::PyShape& shape, float eps, const PyDtypes& dtypes, const PyRows& x,
         const PyRows& shift, const PyRows& scale, std::uintptr_t y,
         std::uintptr_t stream) {
        op::fwd_cuda(op::forward_params(shape, eps, x, shift, scale, y), op::names(dtypes), stream);
      },
      nogil, py::arg("shape"), py::arg("eps"), py::arg("dtypes"), py::arg("x"), py::arg("shift"),
      py::arg("scale"), py::arg("y"), py::arg("stream"));
  m.def(
      "adaln_modulate_bwd_cuda",
      [](const op::PyShape& shape, float eps, const PyDtypes& dtypes, const PyRows& dy,
         const PyRows& x, const PyRows& scale, std::uintptr_t dx, std::uintptr_t dshift,
         std::uintptr_t dscale, std::int64_t rows_per_split, std::uintptr_t stream) {
        op::BackwardParams p =
            op::backward_params(shape, eps, dy, x, scale, dx, dshift, dscale);
        check(rows_per_split > 0, "rows_per_split must be positive, got ", rows_per_split);
        p.rows_per_split = rows_per_split;
        p.n_splits = (p.shape.n_tokens + rows_per_split - 1) / rows_per_split;
        op::bwd_cuda(p, op::names(dtypes), stream);
      },
      nogil, py::arg("shape"), py::arg("eps"), py::arg("dtypes"), py::arg("dy"), py::arg("x"),
      py::arg("scale"), py::arg("dx"), py::arg("dshift"), py::arg("dscale"),
      py::arg("rows_per_split"), py::arg("stream"));
  m.def(
      "adaln_modulate_jvp_cuda",
      [](const op::PyShape& shape, float eps, const PyDtypes& dtypes,
         const op::PyPrimals& primals, const op::PyTangents& tangents, std::uintptr_t y,
         std::uintptr_t y_dot, std::uintptr_t stream) {
        op::jvp_cuda(op::jvp_params(shape, eps, primals, tangents, y, y_dot), op::names(dtypes),
                     stream);
      },
      nogil, py::arg("shape"), py::arg("eps"), py::arg("dtypes"), py::arg("primals"),
      py::arg("tangents"), py::arg("y"), py::arg("y_dot"), py::arg("stream"));
}

}  // namespace disca
#endif
