// SPDX-License-Identifier: Apache-2.0
// One binary for every x86-64: the loader picks the widest version that the processor runs.
#pragma once

// Put it on the function that works on one row, not on the one that holds the OpenMP loop: GCC
// outlines a parallel region before it makes the clones, and the outlined part would stay baseline.
#if defined(DISCA_HAS_TARGET_CLONES)
#define DISCA_CPU_CLONES \
  __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define DISCA_CPU_CLONES
#endif
