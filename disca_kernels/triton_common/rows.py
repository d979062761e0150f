# SPDX-License-Identifier: Apache-2.0
"""What kernels on rows of channels share: loads, norms, their Jacobian, and how rows are tiled.

A tile is BLOCK_N rows of one sample by BLOCK_C channels. A pointer that is None stands for an
absent operand; what depends on it is decided when the kernel is compiled.
"""

import triton
import triton.language as tl

_TILE_ELEMENTS = 2048
_MAX_ROWS_PER_TILE = 16
# Programs of a backward pass that sums over tokens: about four for each multiprocessor of the
# largest devices. It is a constant, not the size of this device, so that the order of summation is
# the same everywhere.
_BACKWARD_PROGRAMS = 512


@triton.jit
def load_rows(p_rows, i_b, o_n, o_c, stride_b, stride_n, m_rows):
    """Load a tile of rows as float32."""
    # [BLOCK_N, BLOCK_C]
    p_tile = p_rows + i_b * stride_b + o_n[:, None] * stride_n + o_c[None, :]
    return tl.load(p_tile, mask=m_rows, other=0.0).to(tl.float32)


@triton.jit
def load_modulation(
    p_modulation, i_b, o_n, o_c, stride_b, stride_n, m_rows, m_c, PER_TOKEN: tl.constexpr
):
    """Load what modulates a tile as float32: one row of the sample, or a row for each token."""
    if PER_TOKEN:
        # [BLOCK_N, BLOCK_C]
        b_modulation = load_rows(p_modulation, i_b, o_n, o_c, stride_b, stride_n, m_rows)
    else:
        # [1, BLOCK_C]
        p_row = p_modulation + i_b * stride_b + o_c[None, :]
        b_modulation = tl.load(p_row, mask=m_c[None, :], other=0.0).to(tl.float32)
    return b_modulation


@triton.jit
def load_channels(p_channels, o_c, m_c):
    """Load a vector that is the same for all rows as float32."""
    # [1, BLOCK_C]
    return tl.load(p_channels + o_c[None, :], mask=m_c[None, :], other=0.0).to(tl.float32)


@triton.jit
def normalise(b_x, m_n, m_c, C, eps, RMS: tl.constexpr):
    """Return the normalised rows, zero outside the masks, and their 1 / deviation."""
    if RMS:
        b_centred = b_x
    else:
        b_mean = tl.sum(b_x, axis=1, keep_dims=True) / C
        b_centred = tl.where(m_c[None, :], b_x - b_mean, 0.0)
    b_variance = tl.sum(b_centred * b_centred, axis=1, keep_dims=True) / C
    # A row outside the mask is no row of zeros, which has no finite deviation if eps is zero.
    b_rstd = 1.0 / tl.sqrt_rn(tl.where(m_n[:, None], b_variance + eps, 1.0))
    return b_centred * b_rstd, b_rstd


@triton.jit
def project(b_rows, b_x_hat, b_rstd, C, RMS: tl.constexpr):
    """Apply the Jacobian of the norm, which is symmetric, to rows that are zero outside the mask.

    `rstd * (v - mean(v) - x_hat * mean(x_hat * v))`, without `mean(v)` for an RMS norm.
    """
    b_correlation = tl.sum(b_x_hat * b_rows, axis=1, keep_dims=True) / C
    if RMS:
        b_centred = b_rows
    else:
        b_centred = b_rows - tl.sum(b_rows, axis=1, keep_dims=True) / C
    return b_rstd * (b_centred - b_x_hat * b_correlation)


def tile(n_channels: int, live_rows: int) -> tuple[int, int, int]:
    """Choose BLOCK_N, BLOCK_C and warps so that `live_rows` float32 tiles stay in registers."""
    block_c = max(16, triton.next_power_of_2(n_channels))
    block_n = min(max(1, _TILE_ELEMENTS // block_c), _MAX_ROWS_PER_TILE)
    per_warp = 1024 if live_rows <= 4 else 512
    return block_n, block_c, min(max(block_n * block_c // per_warp, 1), 16)


def rows_per_split(n_batch: int, n_tokens: int, block_n: int) -> int:
    """Choose how many rows of a sample one program of a backward pass sums up.

    Args:
        n_batch: B.
        n_tokens: N.
        block_n: rows of a tile.
    """
    wanted = triton.cdiv(_BACKWARD_PROGRAMS, max(n_batch, 1))
    return block_n * max(1, triton.cdiv(triton.cdiv(n_tokens, block_n), wanted))
