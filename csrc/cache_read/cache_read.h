// SPDX-License-Identifier: Apache-2.0
// SiLU of a linear layer of current and cached tokens side by side.
#pragma once

#include <pybind11/pybind11.h>

namespace disca {

void register_cache_read(pybind11::module_& m);

}  // namespace disca
