# SPDX-License-Identifier: Apache-2.0
"""Tables of the rotary position embedding over frames, rows and columns."""

from functools import lru_cache

import torch
from torch import Tensor

__all__ = ["Rope", "rope_tables"]

Rope = tuple[Tensor, Tensor]


def rope_tables(
    grid: tuple[int, int, int],
    dims: tuple[int, int, int],
    theta: float,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Rope:
    """Return cosine and sine of the rotation angles of a video grid.

    Channel pair (2i, 2i + 1) of an axis share of width d turns by `position * theta**(-2i / d)`.
    Text tokens do not turn and have no rows.

    Args:
        grid: token grid (frames, rows, columns), the column index running fastest.
        dims: head-dimension shares of the three axes.
        theta: base of the frequencies.
        dtype: type of the tables; the angles are computed in float64.
        device: where the tables live.

    Returns:
        Two tensors [f * h * w, sum(dims) / 2], computed once per argument set and shared.
    """
    # A tensor made inside a functorch transform is tied to that transform, and one made while
    # tracing to the trace: neither may outlive it in a cache.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _make_tables(grid, dims, theta, dtype, device)
    return _cached_tables(grid, dims, theta, dtype, device)


def _make_tables(
    grid: tuple[int, int, int],
    dims: tuple[int, int, int],
    theta: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Rope:
    shares = []
    for axis, (size, width) in enumerate(zip(grid, dims, strict=True)):
        exponent = torch.arange(0, width, 2, dtype=torch.float64, device=device) / max(width, 1)
        position = torch.arange(size, dtype=torch.float64, device=device)
        angle = position[:, None] * theta**-exponent  # [size, width / 2]
        shape = [1, 1, 1, width // 2]
        shape[axis] = size
        shares.append(angle.view(shape).expand(*grid, -1))
    angles = torch.cat(shares, dim=-1).flatten(0, 2)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@lru_cache(maxsize=32)
def _cached_tables(
    grid: tuple[int, int, int],
    dims: tuple[int, int, int],
    theta: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Rope:
    # An inference tensor could not be saved for a later backward pass.
    with torch.inference_mode(False):
        return _make_tables(grid, dims, theta, dtype, device)
