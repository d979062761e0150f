# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of the attention kernels."""

from functools import cache
from typing import NamedTuple

import torch


class Tile(NamedTuple):
    """Rows of queries and keys that a program holds, and how it is compiled."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """The tile of each kernel."""

    fwd: Tile
    jvp: Tile
    dq: Tile
    dkdv: Tile


# Keyed by (multiplies whole warp groups, bytes of an element, padded head dimension). For 2-byte
# elements no tile spills a register; tests/ops/test_attention_codegen.py compiles them. Float32
# goes through the ordinary units, so its tiles are small and only have to fit.
_TILES = {
    (False, 2, 64): Tiles(
        Tile(128, 64, 4, 3), Tile(64, 32, 4, 2), Tile(64, 32, 4, 2), Tile(32, 64, 4, 2)
    ),
    (False, 2, 128): Tiles(
        Tile(64, 64, 8, 2), Tile(32, 32, 8, 2), Tile(64, 64, 8, 2), Tile(32, 64, 8, 2)
    ),
    (False, 2, 256): Tiles(
        Tile(64, 32, 8, 2), Tile(16, 32, 8, 2), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)
    ),
    (True, 2, 64): Tiles(
        Tile(128, 64, 4, 3), Tile(128, 32, 8, 2), Tile(64, 32, 4, 2), Tile(64, 64, 8, 2)
    ),
    (True, 2, 128): Tiles(
        Tile(128, 64, 8, 2), Tile(64, 32, 8, 2), Tile(64, 64, 8, 2), Tile(64, 64, 8, 1)
    ),
    (False, 4, 64): Tiles(
        Tile(32, 32, 4, 1), Tile(16, 16, 8, 1), Tile(32, 32, 8, 1), Tile(32, 32, 8, 1)
    ),
    (False, 4, 128): Tiles(
        Tile(16, 32, 4, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)
    ),
    (False, 4, 256): Tiles(
        Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1), Tile(16, 16, 8, 1)
    ),
}


def padded_dim(head_dim: int) -> int:
    """Return the head dimension that a kernel computes with: a power of two, at least 16."""
    return max(1 << (head_dim - 1).bit_length(), 16)


def tiles_for(capability: int, head_dim: int, itemsize: int) -> Tiles:
    """Return the tiles for a compute capability (times ten), head dimension and element size."""
    # Data-centre devices since 9.0 multiply with groups of four warps; 12.x does not.
    groups = 90 <= capability < 120
    size, dim = max(itemsize, 2), max(padded_dim(head_dim), 64)
    return _TILES.get((groups, size, dim)) or _TILES[False, size, dim]


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def tiles(device: torch.device, head_dim: int, itemsize: int) -> Tiles:
    """Return the tiles on `device`; the interpreter, on a CPU, takes those of 9.0."""
    capability = _capability(device) if device.type == "cuda" else 90
    return tiles_for(capability, head_dim, itemsize)
