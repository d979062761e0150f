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
    """The tile of each kernel.

    `fwd_keep` stores z too; `jvp_weight` is for a tangent of the weight.
    """

    fwd: Tile
    fwd_keep: Tile
    jvp: Tile
    jvp_weight: Tile


# Keyed by compute capability (times ten) and bytes of an element. Chosen by what they compile to
# (`make codegen`) with Triton 3.5, 3.6 and 3.9, not by timings: the largest tiles whose kernels
# keep everything in registers.
# - 8.0: single warps multiply, and pointers take registers. 8.6, 8.9 and 12.x have less shared
#   memory and take these too.
# - 9.0: 64 rows for each of two groups of four warps, whose accumulators are 128 registers a
#   thread: 128 x 256 for the value, two of 128 x 128 beside a tangent. Results are stored by
#   descriptors, because the pointers and masks of two results do not fit beside them. With every
#   tangent four tiles are loaded at a time, and half the width is what does not spill.
# - 10.0: accumulators have a memory of their own, but pass through the same registers at the end,
#   where Triton 3.6 has none left for a second result of 128 x 256.
# Float32 goes through the ordinary units.
_TILES = {
    (80, 2): Tiles(
        fwd=Tile(128, 128, 32, 8, 4),
        fwd_keep=Tile(128, 128, 32, 8, 4),
        jvp=Tile(128, 64, 32, 8, 4),
        jvp_weight=Tile(128, 64, 32, 8, 3),
    ),
    (90, 2): Tiles(
        fwd=Tile(128, 256, 64, 8, 4),
        fwd_keep=Tile(128, 256, 64, 8, 4),
        jvp=Tile(128, 128, 64, 8, 4),
        jvp_weight=Tile(128, 64, 64, 8, 3),
    ),
    (100, 2): Tiles(
        fwd=Tile(128, 256, 64, 8, 4),
        fwd_keep=Tile(128, 128, 64, 8, 4),
        jvp=Tile(128, 128, 64, 8, 4),
        jvp_weight=Tile(128, 64, 64, 8, 3),
    ),
    (80, 4): Tiles(
        fwd=Tile(64, 32, 16, 8, 2),
        fwd_keep=Tile(64, 32, 16, 8, 2),
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
