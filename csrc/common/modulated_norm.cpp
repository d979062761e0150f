// SPDX-License-Identifier: Apache-2.0
// Shares the rows of modulated_norm.h out among threads, and sums gradients over them.

#include <algorithm>

#include "common/isa.h"
#include "common/modulated_norm_host.h"

namespace disca {
namespace modulated_norm {

DISCA_DECLARE_VARIANTS(Kernels)

namespace {

// Rows of one task. It is a constant, not a share of the threads, so that the order in which
// gradients are summed, and with it every bit of them, does not depend on their number.
constexpr std::int64_t kTaskRows = 64;

std::int64_t tasks_per_sample(const Problem& p) { return (p.n_tokens + kTaskRows - 1) / kTaskRows; }

// body(task, b, first, last, scratch) for each kTaskRows rows first .. last - 1 of a sample.
template <typename Body>
void for_each_task(const Problem& p, int threads, const Body& body) {
  const std::int64_t per_sample = tasks_per_sample(p), tasks = p.n_batch * per_sample;
  const int n_threads = team(p.n_batch * p.n_tokens * p.n_channels, tasks, threads);
  const std::int64_t floats = kScratchRows * (p.n_channels + kRowFloats);
  parallel_for(tasks, n_threads, floats, [&](std::int64_t task, float* scratch) {
    const std::int64_t b = task / per_sample, first = task % per_sample * kTaskRows;
    body(task, b, first, std::min(first + kTaskRows, p.n_tokens), scratch);
  });
}

}  // namespace

Problem parse_problem(const PyShape& shape, const PyNorm& norm, const std::string& dtype) {
  const auto& [B, N, C] = shape;
  const auto& [eps, rms] = norm;
  check(B >= 0 && N >= 0 && C > 0, "shape must be [B >= 0, N >= 0, C > 0], got [", B, ", ", N, ", ",
        C, "]");
  return {B, N, C, parse_dtype(dtype), eps, rms};
}

Operand parse_operand(const char* name, const std::optional<PyRows>& given, bool required,
                      const std::string& dtype, const Problem& problem) {
  const Rows rows = parse_rows(name, given, required, problem.n_batch * problem.n_tokens);
  const Dtype parsed = parse_dtype(dtype);
  check(parsed == problem.dtype || parsed == Dtype::kFloat32, name,
        " must be float32 or have the dtype of the tokens, ", name_of(problem.dtype), ", got ",
        dtype);
  return {rows.data, rows.stride_b, rows.stride_n, parsed};
}

void* parse_tokens(const char* name, std::uintptr_t address, bool required,
                   const Problem& problem) {
  return parse_output(name, address, required, problem.n_batch * problem.n_tokens);
}

void run(const Forward& p, int threads) {
  const Kernels& kernels = DISCA_CHOOSE_VARIANT();
  for_each_task(p.problem, threads,
                [&](std::int64_t, std::int64_t b, std::int64_t first, std::int64_t last,
                    float* scratch) { kernels.forward(p, b, first, last, scratch); });
}

void run(Backward p, int threads) {
  const Kernels& kernels = DISCA_CHOOSE_VARIANT();
  const Problem& problem = p.problem;
  const bool affine = p.dweight != nullptr || p.dbias != nullptr;
  const bool shared = !p.modulation_per_token && (p.dshift != nullptr || p.dscale != nullptr);
  p.norm_sums = affine || shared;
  const bool has_sums = p.norm_sums || (!p.gate_per_token && p.dgate != nullptr);
  const std::int64_t stride = Scratch::padded(problem.n_channels);
  const std::int64_t per_sample = tasks_per_sample(problem);
  // [B, tasks, kSums, C]
  const Scratch sums(has_sums ? problem.n_batch * per_sample * kSums * stride : 0);
  const auto sums_of = [&](std::int64_t task) { return sums.get() + task * kSums * stride; };
  for_each_task(problem, threads,
                [&](std::int64_t task, std::int64_t b, std::int64_t first, std::int64_t last,
                    float* scratch) {
                  kernels.backward(p, b, first, last, has_sums ? sums_of(task) : nullptr, scratch);
                });
  if (!has_sums) return;
  const Scratch zero(kSums * stride), affine_sums(affine ? 2 * stride : 0);
  for (std::int64_t b = 0; b < problem.n_batch; ++b) {
    // A sample without tokens has gradients too.
    float* total = per_sample == 0 ? zero.get() : sums_of(b * per_sample);
    // In pairs, so that the error of a sum grows with the logarithm of the tokens.
    for (std::int64_t step = 1; step < per_sample; step *= 2) {
      for (std::int64_t i = 0; i + step < per_sample; i += 2 * step) {
        const std::int64_t left = b * per_sample + i;
        kernels.add(sums_of(left + step), sums_of(left), kSums * stride);
      }
    }
    kernels.finish_sample(p, b, total, affine ? affine_sums.get() : nullptr);
  }
  if (affine) kernels.finish(p, affine_sums.get());
}

}  // namespace modulated_norm
}  // namespace disca
