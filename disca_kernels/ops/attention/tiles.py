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
    maxnreg: int | None = None


class Tiles(NamedTuple):
    """The tile of each kernel."""

    fwd: Tile
    jvp: Tile
    tangent: Tile
    dq: Tile
    dkdv: Tile


_TILES = {
    (80, 2, 64): Tiles(
        Tile(128, 64, 4, 2),
        Tile(64, 32, 4, 2),
        Tile(64, 64, 4, 2),
        Tile(64, 32, 4, 2),
        Tile(32, 64, 4, 2),
    ),
    (80, 2, 128): Tiles(
        Tile(64, 64, 8, 2),
        Tile(32, 32, 8, 2),
        Tile(64, 32, 8, 2),
        Tile(64, 64, 8, 2),
        Tile(32, 64, 8, 2),
    ),
    (80, 2, 256): Tiles(
        Tile(64, 32, 8, 2),
        Tile(16, 32, 8, 2),
        Tile(32, 32, 8, 1),
        Tile(32, 32, 8, 1),
        Tile(32, 32, 8, 1),
    ),
    (90, 2, 64): Tiles(
        Tile(128, 128, 8, 2),
        Tile(128, 64, 8, 2),
        Tile(128, 128, 8, 2),
        Tile(128, 64, 8, 2),
        Tile(64, 128, 8, 2),
    ),
    (90, 2, 128): Tiles(
        Tile(128, 128, 8, 2),
        Tile(128, 64, 8, 2),
        Tile(128, 64, 8, 2),
        Tile(128, 64, 8, 2),
        Tile(64, 128, 8, 2),
    ),
    (90, 2, 256): Tiles(
        Tile(128, 64, 8, 1),
        Tile(64, 32, 8, 1),
        Tile(64, 32, 8, 1),
        Tile(64, 32, 8, 1),
        Tile(32, 64, 8, 1),
    ),
    (80, 4, 64): Tiles(
        Tile(32, 32, 4, 1),
        Tile(16, 16, 8, 1),
        Tile(16, 16, 8, 1),
        Tile(32, 32, 8, 1),
        Tile(32, 32, 8, 1),
    ),
    (80, 4, 128): Tiles(
        Tile(16, 32, 4, 1),
        Tile(16, 16, 8, 1),
        Tile(16, 16, 8, 1),
        Tile(16, 16, 8, 1),
        Tile(16, 16, 8, 1),
    ),
    (80, 4, 256): Tiles(
        Tile(16, 16, 8, 1),
        Tile(16, 16, 8, 1),
        Tile(16, 16, 8, 1),
        Tile(16, 16, 8, 1),
        Tile(16, 16, 8, 1),
    ),
}


def padded_dim(head_dim: int) -> int:
    """Return the head dimension that a kernel computes with: a power of two, at least 16."""
    return max(1 << (head_dim - 1).bit_length(), 16)


def architecture(capability: int) -> int:
    """Return the compute capability (times ten) whose tiles a device takes: 80, 90 or 100."""
    # 12.x multiplies with single warps and has less shared memory, as 8.x does.
    return next((a for a in (100, 90) if a <= capability < 120), 80)


def has_descriptors(capability: int) -> bool:
    """Whether the hardware copies tiles by tensor descriptors."""
    return capability >= 90


def tiles_for(capability: int, head_dim: int, itemsize: int) -> Tiles:
    """Return the tiles for a compute capability (times ten), head dimension and element size."""
    size, dim = max(itemsize, 2), max(padded_dim(head_dim), 64)
    order = (architecture(capability), 90, 80) if architecture(capability) > 80 else (80,)
    return next(_TILES[a, size, dim] for a in order if (a, size, dim) in _TILES)


@cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def capability(device: torch.device) -> int:
    """Return the compute capability of `device` times ten; the interpreter, on a CPU, is 9.0."""
    return _capability(device) if device.type == "cuda" else 90
