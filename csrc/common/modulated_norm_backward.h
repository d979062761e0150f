// SPDX-License-Identifier: Apache-2.0
// Gradients of modulated_norm.h.
#pragma once

#include "common/modulated_norm_row.h"

namespace disca {
namespace modulated_norm {
namespace DISCA_ISA {
namespace {

// dh * (1 + scale) * weight is the gradient of x_hat.
template <typename X>
inline void gains(const Backward& p, std::int64_t b, std::int64_t n, const ScratchRows& rows) {
  const auto scale = companion<X>(p.scale, b, n), weight = companion<X>(p.weight, b, n);
  float *a = rows[kA], *gain = rows[kGain];
  sweep<1>(p.problem.n_channels, DISCA_STEP {
    const Vec g = 1.0f + scale.at(i, part);
    store(gain + i, g);
    store(a + i, g * weight.at(i, part, 1));
  });
}

// Where the gradients of one row go; nullptr: not wanted.
template <typename X>
struct BackwardRow {
  const X *dx_new, *dh, *x_new, *y;
  X *dx, *dy;
  float *sum_dh, *sum_dh_x_hat, *sum_dgate;  // of modulations that all tokens share
  GradientRow<X> dgate;                      // of a gate that each token has of its own
};

template <typename X, bool kNorm, bool kGated>
DISCA_ALWAYS_INLINE void backward_row(const Problem& p, const BackwardRow<X>& r, const Norm& norm,
                                      const Projection& projection, const ScratchRows& rows) {
  const float *a = rows[kA], *gate = rows[kGate];
  sweep<2>(p.n_channels, DISCA_STEP {
    Vec dx = {};
    if (kGated && r.dx_new != nullptr) dx = load(r.dx_new + i, part);
    if (kNorm) {
      const Vec x_hat = norm.x_hat(load(r.x_new + i, part)), dh = load(r.dh + i, part);
      dx += projection.of(settled(dh * load(a + i)), x_hat, norm);
      if (r.sum_dh != nullptr) {
        store(r.sum_dh + i, load(r.sum_dh + i) + dh);
        store(r.sum_dh_x_hat + i, load(r.sum_dh_x_hat + i) + dh * x_hat);
      }
    }
    if (r.dx != nullptr) store(r.dx + i, dx, part);
    if (!kGated) return;
    if (r.dy != nullptr) store(r.dy + i, dx * load(gate + i), part);
    if (r.sum_dgate != nullptr) {
      store(r.sum_dgate + i, load(r.sum_dgate + i) + dx * load(r.y + i, part));
    }
    if (r.dgate.row != nullptr) r.dgate.put(i, dx * load(r.y + i, part), part);
  });
}

// Gradients of modulations that each token has of its own, and sums of what they scale.
template <typename X>
inline void token_gradients(const Backward& p, std::int64_t b, std::int64_t n, const Norm& norm,
                            float* sums, const ScratchRows& rows) {
  const std::int64_t C = p.problem.n_channels, i_row = b * p.problem.n_tokens + n;
  const X *x = row_of<X>(p.x_new, b, n), *gradient = row_of<X>(p.dh, b, n);
  const auto weight = companion<X>(p.weight, 0, 0), bias = companion<X>(p.bias, 0, 0);
  const auto dshift = gradient_row<X>(p.dshift, p.scale, i_row, C);
  const auto dscale = gradient_row<X>(p.dscale, p.scale, i_row, C);
  const float* gain = rows[kGain];
  const std::int64_t stride = round_up(C, kRowFloats);
  sweep<1>(C, DISCA_STEP {
    const Vec x_hat = norm.x_hat(load(x + i, part)), dh = load(gradient + i, part);
    if (dshift.row != nullptr) dshift.put(i, dh, part);
    if (dscale.row != nullptr) {
      dscale.put(i, dh * (x_hat * weight.at(i, part, 1) + bias.at(i, part)), part);
    }
    if (sums != nullptr) {
      float *sum = sums + kSumDh * stride + i, *product = sums + kSumDhXHat * stride + i;
      store(sum, load(sum) + dh * load(gain + i));
      store(product, load(product) + dh * load(gain + i) * x_hat);
    }
  });
}

template <typename X, bool kNorm, bool kGated>
void backward_rows(const Backward& p, std::int64_t b, std::int64_t first, std::int64_t last,
                   float* sums, float* scratch) {
  const Problem& problem = p.problem;
  const std::int64_t C = problem.n_channels, stride = round_up(C, kRowFloats);
  const ScratchRows rows(scratch, C);
  const bool tokens = p.modulation_per_token;
  const bool norm_sums = kNorm && p.norm_sums;
  for (std::int64_t n = first; n < last; ++n) {
    const std::int64_t i = b * problem.n_tokens + n;
    if (kNorm && (n == first || tokens)) gains<X>(p, b, n, rows);
    if (kGated && (n == first || p.gate_per_token)) widen<X>(p.gate, b, n, C, rows[kGate]);
    BackwardRow<X> r = {row_of<X>(p.dx_new, b, n), row_of<X>(p.dh, b, n),
                        row_of<X>(p.x_new, b, n),  row_of<X>(p.y, b, n),
                        row_of<X>(p.dx, i, C),     row_of<X>(p.dy, i, C),
                        nullptr,                   nullptr,
                        nullptr,                   {nullptr, false}};
    if (norm_sums && !tokens) {
      r.sum_dh = sums + kSumDh * stride;
      r.sum_dh_x_hat = sums + kSumDhXHat * stride;
    }
    if (kGated && p.dgate != nullptr) {
      if (p.gate_per_token) r.dgate = gradient_row<X>(p.dgate, p.gate, i, C);
      if (!p.gate_per_token) r.sum_dgate = sums + kSumDgate * stride;
    }
    Norm norm = {};
    Projection projection = {};
    if (kNorm) {
      const float* a = rows[kA];
      norm = normalise(r.x_new, problem.rms ? 0.0f : mean_of(r.x_new, C), problem, projection,
                       DISCA_AT { return load(r.dh + i, part) * load(a + i); });
    }
    backward_row<X, kNorm, kGated>(problem, r, norm, projection, rows);
    if (kNorm && tokens) token_gradients<X>(p, b, n, norm, norm_sums ? sums : nullptr, rows);
  }
}

void backward(const Backward& p, std::int64_t b, std::int64_t first, std::int64_t last,
              float* sums, float* scratch) {
  with_type(p.problem.dtype, [&](auto tag) {
    using X = decltype(tag);
    const bool gated = p.gate.data != nullptr;
    if (p.dh.data == nullptr) {
      return backward_rows<X, false, true>(p, b, first, last, sums, scratch);
    }
    gated ? backward_rows<X, true, true>(p, b, first, last, sums, scratch)
          : backward_rows<X, true, false>(p, b, first, last, sums, scratch);
  });
}

void add(const float* more, float* sums, std::int64_t n) {
  sweep<1>(n, DISCA_STEP { store(sums + i, load(sums + i) + load(more + i)); });
}

template <typename X>
inline void finish_sample_as(const Backward& p, std::int64_t b, const float* sums, float* affine) {
  const std::int64_t C = p.problem.n_channels, stride = round_up(C, kRowFloats);
  const float *sum = sums + kSumDh * stride, *product = sums + kSumDhXHat * stride;
  const float* sum_dgate = sums + kSumDgate * stride;
  const bool shared = !p.modulation_per_token;
  const auto scale = companion<X>(p.scale, b, 0);
  const auto weight = companion<X>(p.weight, b, 0), bias = companion<X>(p.bias, b, 0);
  const auto dshift = gradient_row<X>(shared ? p.dshift : nullptr, p.scale, b, C);
  const auto dscale = gradient_row<X>(shared ? p.dscale : nullptr, p.scale, b, C);
  const auto dgate = gradient_row<X>(p.gate_per_token ? nullptr : p.dgate, p.gate, b, C);
  sweep<1>(C, DISCA_STEP {
    const Vec dh = load(sum + i), dh_x_hat = load(product + i);
    if (dshift.row != nullptr) dshift.put(i, dh, part);
    if (dscale.row != nullptr) {
      dscale.put(i, dh_x_hat * weight.at(i, part, 1) + dh * bias.at(i, part), part);
    }
    if (dgate.row != nullptr) dgate.put(i, load(sum_dgate + i), part);
    if (affine == nullptr) return;
    const Vec gain = shared ? 1.0f + scale.at(i, part) : broadcast(1.0f);
    store(affine + i, load(affine + i) + gain * dh_x_hat);
    store(affine + stride + i, load(affine + stride + i) + gain * dh);
  });
}

void finish_sample(const Backward& p, std::int64_t b, const float* sums, float* affine) {
  with_type(p.problem.dtype,
            [&](auto tag) { finish_sample_as<decltype(tag)>(p, b, sums, affine); });
}

void finish(const Backward& p, const float* affine) {
  with_type(p.problem.dtype, [&](auto tag) {
    using X = decltype(tag);
    const std::int64_t C = p.problem.n_channels, stride = round_up(C, kRowFloats);
    const auto dweight = gradient_row<X>(p.dweight, p.weight, 0, C);
    const auto dbias = gradient_row<X>(p.dbias, p.bias, 0, C);
    sweep<1>(C, DISCA_STEP {
      if (dweight.row != nullptr) dweight.put(i, load(affine + i), part);
      if (dbias.row != nullptr) dbias.put(i, load(affine + stride + i), part);
    });
  });
}

}  // namespace
}  // namespace DISCA_ISA
}  // namespace modulated_norm
}  // namespace disca
