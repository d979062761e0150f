// SPDX-License-Identifier: Apache-2.0
// Apart from attention_cuda.h: nvcc takes longer over pybind11 than over the kernels.
#pragma once

#include <pybind11/pybind11.h>

namespace disca {

void register_attention_cuda(pybind11::module_& m);

}  // namespace disca
