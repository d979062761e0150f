// SPDX-License-Identifier: Apache-2.0
// Query-key normalisation with rotary embedding, from a packed projection to attention's layout.
#pragma once

#include <pybind11/pybind11.h>

namespace disca {

void register_qk_norm_rope(pybind11::module_& m);

}  // namespace disca
