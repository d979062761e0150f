// SPDX-License-Identifier: Apache-2.0
// See CMakeLists.txt for the options that this file is compiled with.
#define DISCA_ISA avx512
#include "common/activation_rows.h"
