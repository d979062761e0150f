# SPDX-License-Identifier: Apache-2.0
"""Quality of clips that nobody has labelled: how far two sets lie apart, patch by patch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from disca.data.source import ClipSource, check_integer
from disca.errors import UserError

__all__ = ["RealDistances", "SlicedWasserstein", "real_distances", "sliced_wasserstein"]


@dataclass(frozen=True)
class SlicedWasserstein:
    """Sliced Wasserstein distance between two sets of clips; 0 for equal sets.

    Attributes:
        values: distance of the patches' values (brightness, colour, contrast, texture), in standard
            deviations of the reference's values.
        differences: distance of the patches' differences from frame to frame (how much moves, and
            how fast), in root mean squares of the reference's differences.
        mean: mean of the two.
    """

    values: float
    differences: float
    mean: float

    def as_dict(self) -> dict[str, float]:
        """The fields as a plain mapping."""
        return asdict(self)


@dataclass(frozen=True)
class RealDistances:
    """What real clips score: the levels that generated clips are to be read against.

    Attributes:
        same: distance between two draws from the train split, the floor that the number of clips
            sets.
        held_out: distance from train clips to held-out (test split) clips.
    """

    same: SlicedWasserstein
    held_out: SlicedWasserstein


def sliced_wasserstein(
    clips: Tensor,
    reference: Tensor,
    *,
    patch: int = 8,
    frames: int = 4,
    patches: int = 8192,
    projections: int = 256,
    scales: Sequence[int] | None = None,
    seed: int = 0,
) -> SlicedWasserstein:
    """Sliced Wasserstein distance between the patches of two sets of clips.

    Patches ``[C, frames, patch, patch]`` are cut at random places of random clips, as they are and
    from clips shrunk by each of `scales`; at each scale, with their values as rows p_i of the one
    set, q_i of the other, and w_k uniform on the unit sphere,

        W = mean_k mean_i |sort(w_k·p)_i - sort(w_k·q)_i| / s

    s is the standard deviation of all q. `SlicedWasserstein.values` is the mean over the scales;
    `differences` is the same for the differences of successive frames within the patches, with
    their root mean square for s. Sliced Wasserstein distances of generated data: Kolouri et al.
    2018 (arXiv 1804.01947); of patches at several scales: Karras et al. 2017 (arXiv 1710.10196,
    section 5), for images. Here patches also span time, and both sets are divided by one s, so
    that a difference in brightness or contrast counts.

    Both sets are read at the same places and along the same projections, all drawn from `seed`.
    Patches know neither labels nor their place: a set that is right in each patch and wrong as a
    whole scores well. Comparable only for one reference, one number of clips and one choice of
    options. Computed in float64 on the CPU.

    Args:
        clips: ``[B, C, F, H, W]`` in [-1, 1].
        reference: ``[B', C, F, H, W]``; its clips need not correspond to those of `clips`.
        patch: rows and columns of a patch.
        frames: frames of a patch, at least 2.
        patches: patches drawn at each scale.
        projections: random directions at each scale.
        scales: factors by which the frames are shrunk (by area averaging); None takes 1, 2, 4 and
            so on while a patch fits.
        seed: seed of places and directions.

    Raises:
        UserError: shapes that do not fit, values not finite, a patch larger than the clips, an
            option out of range, or a reference that is flat or stands still.
    """
    _check(clips, reference)
    length, height, width = clips.shape[2:]
    check_integer("patch", patch, 1)
    check_integer("frames", frames, 2)
    check_integer("patches", patches, 1)
    check_integer("projections", projections, 1)
    side = min(height, width)
    if frames > length or patch > side:
        raise UserError(
            f"a patch of {frames} frames of {patch}x{patch} pixels does not fit into clips of "
            f"{length} frames of {height}x{width}: set 'frames' and 'patch' to smaller values"
        )
    generator = torch.Generator().manual_seed(check_integer("seed", seed, 0))
    found: list[tuple[float, float]] = []
    for scale in _scales(scales, side, patch):
        both = [_shrink(x.detach().cpu().double(), scale) for x in (clips, reference)]
        places = torch.rand(4, patches, generator=generator, dtype=torch.float64)
        p, q = (_cut(x, places, frames, patch) for x in both)  # [patches, C, f, p, p]
        value = _distance(p, q, q.std(correction=0), projections, generator, "is flat")
        p, q = p.diff(dim=2), q.diff(dim=2)
        spread = q.square().mean().sqrt()
        found.append((value, _distance(p, q, spread, projections, generator, "stands still")))
    values, differences = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
    return SlicedWasserstein(values, differences, (values + differences) / 2)


def real_distances(source: ClipSource, n: int, *, seed: int = 0) -> RealDistances:
    """Measure how far real clips lie from real clips, as `sliced_wasserstein` sees it.

    Args:
        source: clips with a train and a test split.
        n: number of clips of each draw; compare generated clips in the same number.
        seed: seed of the draws and of the distances.

    Raises:
        UserError: n is below 1, or the source has no test split.
    """
    check_integer("number of real clips", n, 1)
    generator = torch.Generator().manual_seed(check_integer("seed", seed, 0))
    train = source.sample(n, generator, split="train").clips
    again = source.sample(n, generator, split="train").clips
    test = source.sample(n, generator, split="test").clips
    return RealDistances(
        same=sliced_wasserstein(again, train, seed=seed),
        held_out=sliced_wasserstein(train, test, seed=seed),
    )


def _check(clips: Tensor, reference: Tensor) -> None:
    for name, x in (("clips", clips), ("reference", reference)):
        if x.dim() != 5 or x.numel() == 0:
            raise UserError(
                f"{name} must be [B, C, F, H, W] with at least one clip, got shape {list(x.shape)}"
            )
        if not torch.isfinite(x).all():
            raise UserError(f"{name} holds values that are not finite")
    if clips.shape[1:] != reference.shape[1:]:
        raise UserError(
            f"clips and reference must have clips of one shape [C, F, H, W], got "
            f"{list(clips.shape[1:])} and {list(reference.shape[1:])}"
        )


def _scales(scales: Sequence[int] | None, side: int, patch: int) -> list[int]:
    if scales is None:
        return [2**k for k in range(side.bit_length()) if side // 2**k >= patch]
    if not scales:
        raise UserError("scales must name at least one factor, for instance [1, 2]")
    for scale in scales:
        if side // check_integer("scale", scale, 1) < patch:
            raise UserError(
                f"scale {scale} leaves {side // scale} of {side} pixels, less than a patch of "
                f"{patch}; the largest scale that fits is {side // patch}"
            )
    return list(scales)


def _shrink(clips: Tensor, scale: int) -> Tensor:
    """Average over blocks of `scale` x `scale` pixels; an incomplete block at the edge is cut."""
    return F.avg_pool3d(clips, (1, scale, scale)) if scale > 1 else clips


def _cut(clips: Tensor, places: Tensor, frames: int, patch: int) -> Tensor:
    """Cut one patch for each column of `places` (uniform in [0, 1): clip, frame, row, column)."""
    count, _, length, height, width = clips.shape
    ends = (count, length - frames + 1, height - patch + 1, width - patch + 1)
    clip, frame, row, column = (
        (u * end).long()[:, None, None, None] for u, end in zip(places, ends, strict=True)
    )
    frame = frame + torch.arange(frames)[:, None, None]
    row = row + torch.arange(patch)[:, None]
    column = column + torch.arange(patch)
    return clips.movedim(1, -1)[clip, frame, row, column].movedim(-1, 1)


def _distance(
    p: Tensor, q: Tensor, spread: Tensor, projections: int, generator: torch.Generator, flat: str
) -> float:
    """Mean over directions of the distance of the sorted projections, relative to `spread`."""
    if spread == 0:
        raise UserError(f"the reference {flat}: a distance relative to it is undefined")
    directions = torch.randn(
        projections, p[0].numel(), generator=generator, dtype=torch.float64
    )  # [K, D]
    directions = directions / directions.norm(dim=1, keepdim=True)
    # PyTorch's sort carries indices along, which takes longer and is not needed.
    one, other = (np.sort((directions @ x.flatten(1).T).numpy(), axis=1) for x in (p, q))
    return float(np.abs(one - other).mean() / float(spread))
