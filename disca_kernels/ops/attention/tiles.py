# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of the attention kernels."""

from typing import NamedTuple


def padded_dim(head_dim: int) -> int:
    """Return the head dimension that a kernel computes with: a power of two, at least 16."""
    return max(1 << (head_dim - 1).bit_length(), 16)


class Tile(NamedTuple):
    """Rows of queries and keys that a program holds, and how it is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


_TILES = {
    # Bytes of a padded row: (value, value with tangent, gradient). No tile spills on sm_80,
    # sm_90 or sm_100, which tests/ops/test_attention.py compiles them for.
    128: (Tile(128, 64, 4, 3), Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
    256: (Tile(128, 64, 8, 2), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2)),
    512: (Tile(64, 32, 8, 2), Tile(64, 32, 8, 1), Tile(32, 32, 8, 1)),
    1024: (Tile(32, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)),
}


def tiles(head_dim: int, itemsize: int) -> tuple[Tile, Tile, Tile]:
    """Return the tiles of the value, the value-with-tangent and the gradient kernels."""
    row_bytes = padded_dim(head_dim) * itemsize
    return _TILES[max(row_bytes, 128)]
