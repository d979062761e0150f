// SPDX-License-Identifier: Apache-2.0
// SwiGLU with a bias.
#pragma once

#include <pybind11/pybind11.h>

namespace disca {

void register_swiglu(pybind11::module_& m);

}  // namespace disca
