// SPDX-License-Identifier: Apache-2.0
// The gated residual x + gate * y. Tokens are [B, N, C]; a modulation has one row
// per sample [B, C] or per token [B, N, C].
#pragma once

#include <pybind11/pybind11.h>

namespace disca {

void register_gated_residual(pybind11::module_& m);

}  // namespace disca
