# SPDX-License-Identifier: Apache-2.0
"""Eager specification of one step along a mean velocity: value and tangent."""

import torch
from torch import Tensor


def _per_sample(time: Tensor, x: Tensor) -> Tensor:
    """Bring a time [B] to the dtype used inside and to dimensions that broadcast against x."""
    return time.to(torch.promote_types(x.dtype, torch.float32)).reshape(-1, *(1,) * (x.ndim - 1))


def mean_velocity_step_reference(x: Tensor, u: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """Compute `x_r = x - (t - r) * u` in plain PyTorch.

    Differentiable any number of times, in both modes. `t - r` is taken in the dtype of the times,
    the rest in float32 (float64 x: in float64), with one cast at the end.

    Args:
        x: [B, ...], the sample at time t.
        u: shape of x, the mean velocity over [r, t].
        t: [B].
        r: [B].

    Returns:
        The sample at time r, in the shape and dtype of x.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    return (x.to(wide) - _per_sample(t - r, x) * u.to(wide)).to(x.dtype)


def mean_velocity_step_jvp_reference(
    primals: tuple[Tensor, Tensor, Tensor, Tensor],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
) -> tuple[Tensor, Tensor]:
    """Compute the value and, by the closed formula, its directional derivative.

        x_r_dot = x_dot - (t - r) * u_dot - (t_dot - r_dot) * u

    Args:
        primals: `(x, u, t, r)` as in `mean_velocity_step_reference`.
        tangents: `(x_dot, u_dot, t_dot, r_dot)`, each of its primal's shape, or None for zero.

    Returns:
        `(x_r, x_r_dot)`, both in the shape and dtype of x.
    """
    x, u, t, r = primals
    x_dot, u_dot, t_dot, r_dot = tangents
    wide = torch.promote_types(x.dtype, torch.float32)
    moved = torch.zeros_like(x, dtype=wide) if x_dot is None else x_dot.to(wide)
    if u_dot is not None:
        moved = moved - _per_sample(t - r, x) * u_dot.to(wide)
    if t_dot is not None:
        moved = moved - _per_sample(t_dot, x) * u.to(wide)
    if r_dot is not None:
        moved = moved + _per_sample(r_dot, x) * u.to(wide)
    return mean_velocity_step_reference(x, u, t, r), moved.to(x.dtype)
