// SPDX-License-Identifier: Apache-2.0
// CPU kernels of adaptive layer-norm modulation, and the Python bindings of both devices.
//
// A row is widened to float32 once, into a scratch row that stays in the first-level cache; the
// loops over it are vector code in each of the clones that the processor may pick.

#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "adaln_modulate/adaln_modulate.h"
#include "common/checks.h"
#include "common/cpu.h"
#include "common/dtype.h"
#include "common/rows.h"

namespace py = pybind11;

namespace disca {
namespace adaln_modulate {
namespace {

// Rows whose gradients one task sums. It is a constant, not a share of the threads, so that the
// order of summation, and with it every bit of the result, does not depend on their number.
constexpr std::int64_t kRowsPerSplit = 64;

// Writes the normalised row and returns 1 / standard deviation.
template <typename X>
inline __attribute__((always_inline)) float normalise(const X* x, float* x_hat, std::int64_t C,
                                                      float eps) {
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (std::int64_t c = 0; c < C; ++c) {
    x_hat[c] = to_float(x[c]);
    sum += x_hat[c];
  }
  const float mean = sum / static_cast<float>(C);
  float squares = 0, rest = 0;  // rest: what rounding left of the mean
#pragma omp simd reduction(+ : squares, rest)
  for (std::int64_t c = 0; c < C; ++c) {
    x_hat[c] -= mean;
    squares += x_hat[c] * x_hat[c];
    rest += x_hat[c];
  }
  rest /= static_cast<float>(C);
  const float variance = std::max(squares / static_cast<float>(C) - rest * rest, 0.0f);
  const float rstd = 1.0f / std::sqrt(variance + eps);
#pragma omp simd
  for (std::int64_t c = 0; c < C; ++c) x_hat[c] = (x_hat[c] - rest) * rstd;
  return rstd;
}

template <typename X, typename M>
DISCA_CPU_CLONES void fwd_row(const X* x, const M* shift, const M* scale, X* y, float* x_hat,
                              std::int64_t C, float eps) {
  normalise(x, x_hat, C, eps);
#pragma omp simd
  for (std::int64_t c = 0; c < C; ++c) {
    y[c] = from_float<X>(x_hat[c] * (1.0f + to_float(scale[c])) + to_float(shift[c]));
  }
}

// Adds dy and dy * x_hat to the sums that are there; x_hat and g are scratch rows.
template <typename X, typename M>
DISCA_CPU_CLONES void bwd_row(const X* dy, const X* x, const M* scale, X* dx, float* sum_dy,
                              float* sum_dy_x_hat, float* x_hat, float* g, std::int64_t C,
                              float eps) {
  const float rstd = normalise(x, x_hat, C, eps);
  if (sum_dy != nullptr) {
#pragma omp simd
    for (std::int64_t c = 0; c < C; ++c) {
      sum_dy[c] += to_float(dy[c]);
      sum_dy_x_hat[c] += to_float(dy[c]) * x_hat[c];
    }
  }
  if (dx == nullptr) return;
  float sum_g = 0, sum_g_x_hat = 0;
#pragma omp simd reduction(+ : sum_g, sum_g_x_hat)
  for (std::int64_t c = 0; c < C; ++c) {
    g[c] = to_float(dy[c]) * (1.0f + to_float(scale[c]));
    sum_g += g[c];
    sum_g_x_hat += g[c] * x_hat[c];
  }
  const float mean = sum_g / static_cast<float>(C);
  const float correlation = sum_g_x_hat / static_cast<float>(C);
#pragma omp simd
  for (std::int64_t c = 0; c < C; ++c) {
    dx[c] = from_float<X>(rstd * (g[c] - mean - x_hat[c] * correlation));
  }
}

// Stores one row of sums; clears it for the next.
template <typename M>
DISCA_CPU_CLONES void store_row(float* sums, M* out, std::int64_t C) {
#pragma omp simd
  for (std::int64_t c = 0; c < C; ++c) {
    out[c] = from_float<M>(sums[c]);
    sums[c] = 0;
  }
}

DISCA_CPU_CLONES void add_row(const float* part, float* sums, std::int64_t C) {
#pragma omp simd
  for (std::int64_t c = 0; c < C; ++c) sums[c] += part[c];
}

template <typename X, typename M>
struct JvpRow {
  const X *x, *x_dot;
  const M *shift, *scale, *shift_dot, *scale_dot;
  X *y, *y_dot;
};

// x_hat and tangent are scratch rows.
template <typename X, typename M>
DISCA_CPU_CLONES void jvp_row(const JvpRow<X, M>& row, float* x_hat, float* tangent,
                              std::int64_t C, float eps) {
  const M *shift = row.shift, *scale = row.scale;
  const float rstd = normalise(row.x, x_hat, C, eps);
  if (row.y != nullptr) {
    X* y = row.y;
#pragma omp simd
    for (std::int64_t c = 0; c < C; ++c) {
      y[c] = from_float<X>(x_hat[c] * (1.0f + to_float(scale[c])) + to_float(shift[c]));
    }
  }
  std::fill(tangent, tangent + C, 0.0f);
  if (const X* x_dot = row.x_dot) {
    float sum = 0, sum_x_hat = 0;
#pragma omp simd reduction(+ : sum, sum_x_hat)
    for (std::int64_t c = 0; c < C; ++c) {
      sum += to_float(x_dot[c]);
      sum_x_hat += to_float(x_dot[c]) * x_hat[c];
    }
    const float mean = sum / static_cast<float>(C);
    const float correlation = sum_x_hat / static_cast<float>(C);
#pragma omp simd
    for (std::int64_t c = 0; c < C; ++c) {
      const float x_hat_dot = rstd * (to_float(x_dot[c]) - mean - x_hat[c] * correlation);
      tangent[c] = x_hat_dot * (1.0f + to_float(scale[c]));
    }
  }
  if (const M* scale_dot = row.scale_dot) {
#pragma omp simd
    for (std::int64_t c = 0; c < C; ++c) tangent[c] += x_hat[c] * to_float(scale_dot[c]);
  }
  if (const M* shift_dot = row.shift_dot) {
#pragma omp simd
    for (std::int64_t c = 0; c < C; ++c) tangent[c] += to_float(shift_dot[c]);
  }
  store_row(tangent, row.y_dot, C);
}

std::int64_t elements(const Shape& s) { return s.n_batch * s.n_tokens * s.n_channels; }

template <typename X, typename M>
void fwd(const ForwardParams& p, int threads) {
  const std::int64_t N = p.shape.n_tokens, C = p.shape.n_channels;
  const float eps = p.shape.eps;
  const std::int64_t n_rows = p.shape.n_batch * N;
  const int n_threads = team(elements(p.shape), n_rows, threads);
  parallel_for(n_rows, n_threads, C, [&](std::int64_t i, float* scratch) {
    const std::int64_t b = i / N, n = i % N;
    fwd_row(p.x.at<const X>(b, n), p.shift.at<const M>(b, n), p.scale.at<const M>(b, n),
            static_cast<X*>(p.y) + i * C, scratch, C, eps);
  });
}

template <typename X, typename M>
void jvp(const JvpParams& p, int threads) {
  const std::int64_t N = p.shape.n_tokens, C = p.shape.n_channels;
  const float eps = p.shape.eps;
  const std::int64_t n_rows = p.shape.n_batch * N;
  const int n_threads = team(elements(p.shape), n_rows, threads);
  parallel_for(n_rows, n_threads, 2 * C, [&](std::int64_t i, float* scratch) {
    const std::int64_t b = i / N, n = i % N;
    const JvpRow<X, M> row = {p.x.at<const X>(b, n),
                              p.x_dot.at<const X>(b, n),
                              p.shift.at<const M>(b, n),
                              p.scale.at<const M>(b, n),
                              p.shift_dot.at<const M>(b, n),
                              p.scale_dot.at<const M>(b, n),
                              p.y == nullptr ? nullptr : static_cast<X*>(p.y) + i * C,
                              static_cast<X*>(p.y_dot) + i * C};
    jvp_row(row, scratch, scratch + C, C, eps);
  });
}

template <typename X, typename M>
void bwd_per_token(const BackwardParams& p, int threads) {
  const std::int64_t N = p.shape.n_tokens, C = p.shape.n_channels;
  const float eps = p.shape.eps;
  const std::int64_t n_rows = p.shape.n_batch * N;
  const int n_threads = team(elements(p.shape), n_rows, threads);
  parallel_for(n_rows, n_threads, 4 * C, [&](std::int64_t i, float* scratch) {
    const std::int64_t b = i / N, n = i % N;
    float* sums = p.dshift == nullptr ? nullptr : scratch + 2 * C;
    X* dx = p.dx == nullptr ? nullptr : static_cast<X*>(p.dx) + i * C;
    bwd_row(p.dy.at<const X>(b, n), p.x.at<const X>(b, n), p.scale.at<const M>(b, n), dx, sums,
            sums == nullptr ? nullptr : sums + C, scratch, scratch + C, C, eps);
    if (sums == nullptr) return;
    store_row(sums, static_cast<M*>(p.dshift) + i * C, C);
    store_row(sums + C, static_cast<M*>(p.dscale) + i * C, C);
  });
}

template <typename X, typename M>
void bwd_per_sample(const BackwardParams& p, int threads) {
  const std::int64_t N = p.shape.n_tokens, C = p.shape.n_channels;
  const float eps = p.shape.eps;
  const std::int64_t B = p.shape.n_batch, splits = (N + kRowsPerSplit - 1) / kRowsPerSplit;
  // [B, splits, 2, C]
  std::vector<float> partial(
      p.dshift == nullptr ? 0 : static_cast<std::size_t>(B * splits * 2 * C));
  const int n_threads = team(elements(p.shape), B * splits, threads);
  parallel_for(B * splits, n_threads, 2 * C,
               [&](std::int64_t task, float* scratch) {
    const std::int64_t b = task / splits, first = task % splits * kRowsPerSplit;
    float* sums = partial.empty() ? nullptr : partial.data() + task * 2 * C;
    for (std::int64_t n = first; n < std::min(first + kRowsPerSplit, N); ++n) {
      X* dx = p.dx == nullptr ? nullptr : static_cast<X*>(p.dx) + (b * N + n) * C;
      bwd_row(p.dy.at<const X>(b, n), p.x.at<const X>(b, n), p.scale.at<const M>(b, 0), dx, sums,
              sums == nullptr ? nullptr : sums + C, scratch, scratch + C, C, eps);
    }
  });
  if (p.dshift == nullptr) return;
  parallel_for(B, team(elements(p.shape), B, threads), 2 * C, [&](std::int64_t b, float* scratch) {
    for (std::int64_t split = 0; split < splits; ++split) {
      add_row(partial.data() + (b * splits + split) * 2 * C, scratch, 2 * C);
    }
    store_row(scratch, static_cast<M*>(p.dshift) + b * C, C);
    store_row(scratch + C, static_cast<M*>(p.dscale) + b * C, C);
  });
}

}  // namespace

void fwd_cpu(const ForwardParams& p, const Dtypes& dtypes, int threads) {
  dispatch_pair(dtypes.x, "modulation", dtypes.modulation,
                [&](auto x, auto m) { fwd<decltype(x), decltype(m)>(p, threads); });
}

void bwd_cpu(const BackwardParams& p, const Dtypes& dtypes, int threads) {
  dispatch_pair(dtypes.x, "modulation", dtypes.modulation, [&](auto x, auto m) {
    using X = decltype(x);
    using M = decltype(m);
    p.shape.per_token ? bwd_per_token<X, M>(p, threads) : bwd_per_sample<X, M>(p, threads);
  });
}

void jvp_cpu(const JvpParams& p, const Dtypes& dtypes, int threads) {
  dispatch_pair(dtypes.x, "modulation", dtypes.modulation,
                [&](auto x, auto m) { jvp<decltype(x), decltype(m)>(p, threads); });
}

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

void register_adaln_modulate(py::module_& m) {
  namespace op = adaln_modulate;
  using PyDtypes = std::pair<std::string, std::string>;
  const auto nogil = py::call_guard<py::gil_scoped_release>();
  // An operand is (address, stride_b, stride_n); shape is (B, N, C, per_token); dtypes are those of
  // x and of the modulations; an output that is not wanted has address 0.
  m.def(
      "adaln_modulate_fwd_cpu",
      [](const op::PyShape& shape, float eps, const PyDtypes& dtypes, const PyRows& x,
         const PyRows& shift, const PyRows& scale, std::uintptr_t y, int threads) {
        op::fwd_cpu(op::forward_params(shape, eps, x, shift, scale, y), op::names(dtypes), threads);
      },
      nogil, py::arg("shape"), py::arg("eps"), py::arg("dtypes"), py::arg("x"), py::arg("shift"),
      py::arg("scale"), py::arg("y"), py::arg("threads"));
  m.def(
      "adaln_modulate_bwd_cpu",
      [](const op::PyShape& shape, float eps, const PyDtypes& dtypes, const PyRows& dy,
         const PyRows& x, const PyRows& scale, std::uintptr_t dx, std::uintptr_t dshift,
         std::uintptr_t dscale, int threads) {
        op::bwd_cpu(op::backward_params(shape, eps, dy, x, scale, dx, dshift, dscale),
                    op::names(dtypes), threads);
      },
      nogil, py::arg("shape"), py::arg("eps"), py::arg("dtypes"), py::arg("dy"), py::arg("x"),
      py::arg("scale"), py::arg("dx"), py::arg("dshift"), py::arg("dscale"), py::arg("threads"));
  m.def(
      "adaln_modulate_jvp_cpu",
      [](const op::PyShape& shape, float eps, const PyDtypes& dtypes,
         const op::PyPrimals& primals, const op::PyTangents& tangents, std::uintptr_t y,
         std::uintptr_t y_dot, int threads) {
        op::jvp_cpu(op::jvp_params(shape, eps, primals, tangents, y, y_dot), op::names(dtypes),
                    threads);
      },
      nogil, py::arg("shape"), py::arg("eps"), py::arg("dtypes"), py::arg("primals"),
      py::arg("tangents"), py::arg("y"), py::arg("y_dot"), py::arg("threads"));
#if defined(DISCA_WITH_CUDA)
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
#endif
}

}  // namespace disca
