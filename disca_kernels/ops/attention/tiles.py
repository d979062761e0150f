# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of the attention kernels."""

from typing import NamedTuple

import torch

from disca_kernels.triton_common.descriptors import capability


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
    tangent: Tile
    dq: Tile
    dkdv: Tile


# Keyed by compute capability (times ten), bytes of an element and padded head dimension. Chosen by
# what they compile to (`make codegen`) with Triton 3.6 and 3.9, not by timings: the largest tiles
# whose kernels keep everything in registers, or as large as the matrix units use whole.
# - 8.0: single warps multiply, and pointers take registers; larger tiles of jvp, tangent and dkdv
#   spill, or their warps repeat each other's products.
# - 9.0: 64 rows for each group of four warps, for D <= 128 always two groups. In jvp at D = 128 two
#   accumulators of 128 x 128 leave room for scores of 128 x 64; at D = 256 they leave none, so that
#   jvp and tangent fall back to single warps.
# - 10.0: accumulators have a memory of their own. A kernel that needs more of it than there is
#   compiles to nothing at all, without an error: 3.6 does that with jvp at 128 x 64 for D = 128,
#   which 3.9 compiles.
# Float32 goes through the ordinary units. Above D = 64 jvp and tangent spill even with these tiles.
_TILES = {
    (80, 2, 64): Tiles(
        fwd=Tile(128, 64, 4, 2),
        jvp=Tile(64, 32, 4, 2),
        tangent=Tile(64, 32, 4, 2),
        dq=Tile(128, 64, 8, 2),
        dkdv=Tile(32, 64, 4, 2),
    ),
    (80, 2, 128): Tiles(
        fwd=Tile(64, 64, 4, 2),
        jvp=Tile(32, 32, 4, 2),
        tangent=Tile(32, 32, 8, 2),
        dq=Tile(64, 64, 8, 2),
        dkdv=Tile(32, 64, 8, 2),
    ),
    (80, 2, 256): Tiles(
        fwd=Tile(64, 32, 8, 2),
        jvp=Tile(16, 32, 8, 2),
        tangent=Tile(16, 32, 8, 1),
        dq=Tile(32, 32, 8, 1),
        dkdv=Tile(32, 32, 8, 1),
    ),
    (90, 2, 64): Tiles(
        fwd=Tile(128, 128, 8, 2),
        jvp=Tile(128, 64, 8, 2),
        tangent=Tile(128, 64, 8, 3),
        dq=Tile(128, 64, 8, 2),
        dkdv=Tile(64, 128, 8, 2),
    ),
    (90, 2, 128): Tiles(
        fwd=Tile(128, 128, 8, 2),
        jvp=Tile(128, 64, 8, 2),
        tangent=Tile(128, 64, 8, 2),
        dq=Tile(128, 64, 8, 2),
        dkdv=Tile(64, 128, 8, 2),
    ),
    (90, 2, 256): Tiles(
        fwd=Tile(128, 32, 8, 1),
        jvp=Tile(16, 32, 8, 1),
        tangent=Tile(16, 64, 8, 1),
        dq=Tile(64, 32, 8, 1),
        dkdv=Tile(32, 64, 8, 1),
    ),
    (100, 2, 64): Tiles(
        fwd=Tile(128, 128, 8, 2),
        jvp=Tile(128, 64, 8, 2),
        tangent=Tile(128, 64, 8, 2),
        dq=Tile(128, 64, 8, 2),
        dkdv=Tile(64, 128, 8, 2),
    ),
    (100, 2, 128): Tiles(
        fwd=Tile(128, 128, 8, 2),
        jvp=Tile(128, 32, 8, 2),
        tangent=Tile(128, 64, 8, 2),
        dq=Tile(128, 64, 8, 2),
        dkdv=Tile(64, 128, 8, 2),
    ),
    (100, 2, 256): Tiles(
        fwd=Tile(128, 64, 8, 1),
        jvp=Tile(16, 32, 8, 1),
        tangent=Tile(64, 32, 8, 1),
        dq=Tile(64, 32, 8, 1),
        dkdv=Tile(32, 64, 8, 1),
    ),
    (80, 4, 64): Tiles(
        fwd=Tile(32, 32, 8, 1),
        jvp=Tile(16, 16, 8, 1),
        tangent=Tile(16, 16, 8, 1),
        dq=Tile(32, 32, 8, 1),
        dkdv=Tile(32, 32, 8, 1),
    ),
    (80, 4, 128): Tiles(
        fwd=Tile(32, 32, 8, 1),
        jvp=Tile(16, 16, 8, 1),
        tangent=Tile(16, 16, 8, 1),
        dq=Tile(16, 16, 8, 1),
        dkdv=Tile(16, 16, 8, 1),
    ),
    (80, 4, 256): Tiles(
        fwd=Tile(16, 16, 8, 1),
        jvp=Tile(16, 16, 8, 1),
        tangent=Tile(16, 16, 8, 1),
        dq=Tile(16, 16, 8, 1),
        dkdv=Tile(16, 16, 8, 1),
    ),
}


def padded_dim(head_dim: int) -> int:
    """Return the head dimension that a kernel computes with: a power of two, at least 16."""
    return max(1 << (head_dim - 1).bit_length(), 16)


def tiles_for(capability: int, head_dim: int, itemsize: int, descriptors: bool) -> Tiles:
    """Return the tiles of a device.

    Args:
        capability: compute capability times ten.
        head_dim: D.
        itemsize: bytes of an element.
        descriptors: whether operands are tensor descriptors; pointers need more registers.
    """
    size, dim = max(itemsize, 2), max(padded_dim(head_dim), 64)
    # 12.x multiplies with single warps and has less shared memory, as 8.x does.
    order = [arch for arch in (100, 90) if descriptors and arch <= capability] + [80]
    return next(_TILES[arch, size, dim] for arch in order if (arch, size, dim) in _TILES)


def tiles(device: torch.device, head_dim: int, itemsize: int, descriptors: bool) -> Tiles:
    """Return the tiles on `device`, arguments as `tiles_for`.

    The interpreter has no registers to run out of, but is slow on many small tiles.
    """
    if device.type != "cuda":
        itemsize, descriptors = 2, True
    return tiles_for(capability(device), head_dim, itemsize, descriptors)
