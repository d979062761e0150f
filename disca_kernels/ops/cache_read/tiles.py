# SPDX-License-Identifier: Apache-2.0
"""Tile sizes of the cache_read kernels."""

from typing import NamedTuple

# Tiles of tokens that run next to each other with all their tiles of outputs: few enough for their
# operands to stay in the second-level cache, enough to read the weight seldom.
GROUP_M = 8


class Tile(NamedTuple):
    """Tokens, outputs and channels that a program holds, and how it is compiled."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


class Tiles(NamedTuple):
    """The tile of each kernel; `jvp` without and `jvp_weight` with a tangent of the weight."""

    fwd: Tile
    jvp: Tile
    jvp_weight: Tile


_TILES = {
    (80, 2): Tiles(
        fwd=Tile(128, 128, 32, 8, 3),
        jvp=Tile(128, 64, 32, 8, 3),
        jvp_weight=Tile(128, 64, 32, 8, 3),
    ),
    (90, 2): Tiles(
        fwd=Tile(128, 256, 64, 8, 4),
        jvp=Tile(128, 128, 64, 8, 4),
        jvp_weight=Tile(128, 64, 64, 8, 3),
    ),
    (100, 2): Tiles(
        fwd=Tile(128, 256, 64, 8, 4),
        jvp=Tile(128, 128, 64, 8, 4),
        jvp_weight=Tile(128, 64, 64, 8, 3),
    ),
    (80, 4): Tiles(
        fwd=Tile(64, 64, 16, 8, 2),
        jvp=Tile(64, 32, 16, 8, 2),
        jvp_weight=Tile(64, 32, 16, 8, 2),
    ),
}


def tiles_for(capability: int, itemsize: int, descriptors: bool) -> Tiles:
    """Return the tiles of a device.

    Args:
        capability: compute capability times ten.
        itemsize: bytes of an element.
        descriptors: whether operands are tensor descriptors; pointers need more registers.
    """
    size = max(itemsize, 2)
    order = [arch for arch in (100, 90) if descriptors and arch <= capability] + [80]
    return next(_TILES[arch, size] for arch in order if (arch, size) in _TILES)
