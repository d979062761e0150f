# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding over frames, rows and columns."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Rope", "normalise_and_rotate", "rope_tables"]

Rope = tuple[Tensor, Tensor]


def rope_tables(
    grid: tuple[int, int, int],
    n_text: int,
    dims: tuple[int, int, int],
    theta: float,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Rope:
    """Return cosine and sine of the rotation angles of a video grid followed by text.

    Channel pair (2i, 2i + 1) of an axis share of width d turns by `position * theta**(-2i / d)`.
    Text tokens do not
    turn: their rows are cosine 1 and sine 0, so that one table serves the whole sequence without a
        copy.

    Args:
        grid: token grid (frames, rows, columns), the column index running fastest.
        n_text: text tokens behind the video tokens.
        dims: head-dimension shares of the three axes.
        theta: base of the frequencies.
        dtype: type of the tables; the angles are computed in float64.
        device: where the tables live.

    Returns:
        Two tensors [f * h * w + n_text, sum(dims) / 2], computed once per argument set and shared.
    """
    # A tensor made inside a functorch transform is tied to that transform, and one made while
    # tracing to the trace: neither may outlive it in a cache.
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _make_tables(grid, n_text, dims, theta, dtype, device)
    return _cached_tables(grid, n_text, dims, theta, dtype, device)


def _make_tables(
    grid: tuple[int, int, int],
    n_text: int,
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
    angles = F.pad(angles, (0, 0, 0, n_text))
    return angles.cos().to(dtype), angles.sin().to(dtype)


@lru_cache(maxsize=32)
def _cached_tables(
    grid: tuple[int, int, int],
    n_text: int,
    dims: tuple[int, int, int],
    theta: float,
    dtype: torch.dtype,
    device: torch.device,
) -> Rope:
    # An inference tensor could not be saved for a later backward pass.
    with torch.inference_mode(False):
        return _make_tables(grid, n_text, dims, theta, dtype, device)


def normalise_and_rotate(x: Tensor, weight: Tensor, rope: Rope | None, eps: float = 1e-6) -> Tensor:
    """RMS-normalise queries and keys over the head dimension and turn them by their position.

    `y = x / sqrt(mean(x²) + eps) * weight`; then each channel pair (a, b) of a token with angle φ
    becomes `(a·cos φ − b·sin φ, a·sin φ + b·cos φ)` (the interleaved convention). Computed in
    float32 or wider.

    Args:
        x: packed queries and keys [B, N, G, H, D]; G is 2 for both, 1 for one of them.
        weight: weights of the normalisation [G, D].
        rope: tables [N, D / 2] from `rope_tables`, or None for tokens without a position.
        eps: added to the mean square.

    Returns:
        A tensor of the shape and type of x.
    """
    dtype = x.dtype
    wide = x if dtype == torch.float64 else x.float()
    y = F.rms_norm(wide, wide.shape[-1:], None, eps) * weight.unsqueeze(1)
    if rope is not None:
        # The rotation as one complex product: a third of the time of the same in real parts.
        turn = torch.complex(*rope)[:, None, None, :]
        pairs = torch.view_as_complex(y.view(*y.shape[:-1], -1, 2))
        y = torch.view_as_real(pairs * turn).flatten(-2)
    return y.to(dtype)
