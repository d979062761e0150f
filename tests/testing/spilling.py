# SPDX-License-Identifier: Apache-2.0
"""Two tiny kernels for the code-generation checks: one fits its registers, one cannot."""

import triton
import triton.language as tl


@triton.jit
def copy_kernel(p_x, p_y, n, BLOCK: tl.constexpr):
    """Copy one block; 16 bytes a thread when the pointers are aligned."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_y + o, tl.load(p_x + o, mask=o < n, other=0.0), mask=o < n)


@triton.jit
def spilling_kernel(p_x, p_y, n, BLOCK: tl.constexpr):
    """Keep a whole block alive across a reduction: more values than one warp has registers."""
    o = tl.arange(0, BLOCK)
    x = tl.load(p_x + o, mask=o < n, other=0.0)
    largest = tl.max(x, axis=0)
    tl.store(p_y + o, tl.exp(x - largest), mask=o < n)
