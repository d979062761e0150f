// SPDX-License-Identifier: Apache-2.0
// Value and tangent of attention on devices of compute capability 9.0.
#pragma once

#include <array>
#include <cstdint>
#include <string>

namespace disca {
namespace attention_hopper {

// A tensor [B, heads, N, 128] with a contiguous last dimension; sizes and strides, in elements, of
// the others. Absent: data = nullptr.
struct Tensor {
  const void* data = nullptr;
  std::array<std::int64_t, 3> sizes{}, strides{};
};

// Outputs are contiguous: o and o_dot [B, H, Nq, 128], lse and lse_dot [B, H, Nq] in float32.
struct JvpParams {
  std::string dtype;               // "bfloat16" or "float16"
  std::array<Tensor, 6> operands;  // q, k, v, q_dot, k_dot, v_dot
  const std::int64_t* lengths;      // [B] or nullptr
  float scale;
  void *o, *o_dot;
  float *lse, *lse_dot;
};

// `stream` is a cudaStream_t; the current device must be the one that holds the operands.
void jvp_cuda(const JvpParams& p, std::uintptr_t stream);

}  // namespace attention_hopper
}  // namespace disca
