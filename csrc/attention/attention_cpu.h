// SPDX-License-Identifier: Apache-2.0
// Attention on a CPU: what the Python bindings hand to the driver (attention_cpu.cpp), and what the
// driver asks of the kernels, which are compiled once for each instruction set.
//
// The kernels' translation units may use nothing inline from a shared header that is not inlined
// for certain: the linker keeps one copy of such a function, and a copy compiled for a newer
// processor would then run on an older one. So this header holds plain data only.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace disca {
namespace attention {

constexpr std::int64_t kMaxHeadDim = 256;

// Row (b, h, n) of an operand starts at data + b * stride_b + h * stride_h + n * stride_n, in
// elements, and is contiguous. An absent operand is data = nullptr.
struct Operand {
  const void* data = nullptr;
  std::int64_t stride_b = 0;
  std::int64_t stride_h = 0;
  std::int64_t stride_n = 0;
};

// Query head h reads key head h / (n_heads / n_kv_heads). Query i sees the keys below its limit:
// the number of valid keys and, if block > 0, those of its block and of the blocks before it,
// (floor((i + n_keys - n_queries) / block) + 1) * block.
struct Problem {
  std::int64_t n_batch, n_heads, n_kv_heads, n_queries, n_keys, head_dim;
  std::int64_t block;
  double scale;
  Dtype dtype;
  const std::int64_t* kv_lengths;  // [B], clamped to 0 .. n_keys; nullptr: all keys are valid
};

// Value, value and tangent (o_dot beside o), or the tangent alone (known_lse). Outputs are
// contiguous [B, H, Nq, D] in the dtype of the operands, and float32 [B, H, Nq].
struct ForwardParams {
  Problem problem;
  Operand q, k, v, q_dot, k_dot, v_dot;
  void* o = nullptr;
  void* rest = nullptr;  // what o lost to rounding; nullptr: not wanted
  float* lse = nullptr;
  void* o_dot = nullptr;
  float* lse_dot = nullptr;
  Operand known_o, known_rest;  // known_rest may be absent
  const float* known_lse = nullptr;
};

struct BackwardParams {
  Problem problem;
  Operand d_o, q, k, v, o;
  const float* lse = nullptr;
  const float* dlse = nullptr;  // nullptr: zero
  void *dq = nullptr, *dk = nullptr, *dv = nullptr;
};

// One part of the work on a (batch, key head): tasks of a stage are independent of each other and
// need the earlier stages. Scratch is measured in floats and aligned to a cache line.
struct Stage {
  std::int64_t tasks;
  void (*run)(const void* params, std::int64_t head, std::int64_t task, float* head_scratch,
              float* thread_scratch);
};

constexpr int kMaxStages = 4;

struct Job {
  const void* params;
  std::int64_t n_heads;        // batch * key heads
  std::int64_t head_floats;    // scratch that the tasks of one head share
  std::int64_t thread_floats;  // scratch of one thread
  std::int64_t tasks;          // of one head in the stage that takes most of the time
  int n_stages;
  Stage stages[kMaxStages];
};

// The job refers to the parameters it was made from.
struct Kernels {
  const char* isa;
  Job (*forward)(const ForwardParams& params);
  Job (*backward)(const BackwardParams& params);
};

namespace baseline {
extern const Kernels kernels;
}
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
namespace avx512_bf16 {
extern const Kernels kernels;
}

}  // namespace attention
}  // namespace disca
