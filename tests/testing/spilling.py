# SPDX-License-Identifier: Apache-2.0
"""Tiny kernels for the code-generation checks: right ones, and one for each kind of fault."""

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


@triton.jit
def product_kernel(x, y, p_out, SIZE: tl.constexpr):
    """Write the product of two square tiles that come as tensor descriptors."""
    b_x = x.load([0, 0])
    b_y = y.load([0, 0])
    o = tl.arange(0, SIZE)
    tl.store(p_out + o[:, None] * SIZE + o[None, :], tl.dot(b_x, b_y))


@triton.jit
def idle_kernel(p_x, BLOCK: tl.constexpr):
    """Read and do nothing with it: the compiler leaves nothing of it."""
    tl.load(p_x + tl.arange(0, BLOCK))
