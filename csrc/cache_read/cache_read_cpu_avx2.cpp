// SPDX-License-Identifier: Apache-2.0
// See CMakeLists.txt for the options that this file is compiled with.
#define DISCA_ISA avx2
#include "cache_read/cache_read_cpu_tile.h"
