// SPDX-License-Identifier: Apache-2.0
// GELU in its tanh form with a bias, behind a prefix.
#pragma once

#include <pybind11/pybind11.h>

namespace disca {

void register_gelu_tanh(pybind11::module_& m);

}  // namespace disca
