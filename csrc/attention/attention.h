// SPDX-License-Identifier: Apache-2.0
// Softmax attention o = softmax(scale * q k^T) v with its derivatives. Operands are [B, H, N, D]
// with a contiguous last dimension; several query heads may read one key head.
#pragma once

#include <pybind11/pybind11.h>

#include <string>
#include <vector>

#include "attention/attention_cpu.h"

namespace disca {

namespace attention {

// The instruction sets that kernels are there for and this processor runs, the widest first.
std::vector<std::string> cpu_isas();

// `isa` is one of cpu_isas(), or empty for the first.
void forward_cpu(const ForwardParams& p, const std::string& isa, int threads);
void backward_cpu(const BackwardParams& p, const std::string& isa, int threads);

}  // namespace attention

void register_attention(pybind11::module_& m);

}  // namespace disca
