# SPDX-License-Identifier: Apache-2.0
"""Eager specification of the sinusoidal time features: value, tangent and gradient."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the features of a time of `dtype`: float64 stays, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def frequencies(dim: int, max_period: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the [dim // 2] frequencies `max_period ** (-i / (dim // 2))`."""
    half = dim // 2
    exponents = torch.arange(half, dtype=dtype, device=device)
    return torch.exp(-math.log(max_period) * exponents / half)


def band_limit(omega: Tensor, width: Tensor | float) -> Tensor:
    """Return `sin(omega * width) / (omega * width)`, which is 1 where the product is 0.

    Args:
        omega: [half] angular frequencies.
        width: one number, or [B] a number per sample.

    Returns:
        [half], or [B, half] for a width per sample.
    """
    y = omega * (width.to(omega)[:, None] if isinstance(width, Tensor) else width)
    # sin(y) and y are both accurate to one rounding however small y is, so is their quotient.
    return torch.where(y == 0, 1.0, torch.sin(y) / torch.where(y == 0, 1.0, y))


def timestep_features_reference(
    t: Tensor,
    dim: int,
    *,
    scale: float = 1000.0,
    max_period: float = 10000.0,
    tangent_width: float | Tensor = 0.0,
) -> Tensor:
    """Compute `[cos(scale * t * f) | sin(scale * t * f)]` in plain PyTorch.

    Differentiable any number of times, in both modes, and always exactly: `tangent_width` is part
    of the signature only, the band-limited tangent is in `timestep_features_jvp_reference`.

    Args:
        t: [B] times.
        dim: number of features, at least 2.
        scale: factor of the time.
        max_period: the frequencies fall geometrically from 1 to just above 1 / max_period.
        tangent_width: not used by the value.

    Returns:
        [B, dim], float64 for a float64 time, else float32; an odd `dim` ends in a column of 0.
    """
    wide = compute_dtype(t.dtype)
    freqs = frequencies(dim, max_period, wide, t.device)
    angle = (t.to(wide) * scale)[:, None] * freqs
    features = torch.cat((angle.cos(), angle.sin()), -1)
    return pad(features, (0, 1)) if dim % 2 else features


def timestep_features_jvp_reference(
    t: Tensor,
    t_dot: Tensor,
    dim: int,
    *,
    scale: float = 1000.0,
    max_period: float = 10000.0,
    tangent_width: float | Tensor = 0.0,
) -> tuple[Tensor, Tensor]:
    """Compute the features and the derivative of their average over `t - h .. t + h`.

    With w = scale * f the angular frequencies and h the tangent width,

        f_dot = t_dot * w * sin(w h) / (w h) * [-sin(w t) | cos(w t)]

    Args:
        t: [B] times.
        t_dot: [B] tangent of the times.
        dim: as in `timestep_features_reference`.
        scale: as in `timestep_features_reference`.
        max_period: as in `timestep_features_reference`.
        tangent_width: half width h of the average, one number or [B]; 0 gives the derivative.

    Returns:
        `(features, features_dot)`, both [B, dim] in the dtype of `timestep_features_reference`.
    """
    wide = compute_dtype(t.dtype)
    freqs = frequencies(dim, max_period, wide, t.device)
    angle = (t.to(wide) * scale)[:, None] * freqs
    omega = freqs * scale
    speed = t_dot.to(wide)[:, None] * (omega * band_limit(omega, tangent_width))
    cos, sin = angle.cos(), angle.sin()
    features = torch.cat((cos, sin), -1)
    features_dot = torch.cat((-sin * speed, cos * speed), -1)
    if dim % 2:
        features, features_dot = pad(features, (0, 1)), pad(features_dot, (0, 1))
    return features, features_dot


def timestep_features_vjp_reference(
    dfeatures: Tensor, t: Tensor, dim: int, *, scale: float = 1000.0, max_period: float = 10000.0
) -> Tensor:
    """Compute the gradient of the time, `dt = sum_f w (cos(w t) dsin - sin(w t) dcos)`.

    Args:
        dfeatures: [B, dim] gradient of the features.
        t: [B] times.
        dim: as in `timestep_features_reference`.
        scale: as in `timestep_features_reference`.
        max_period: as in `timestep_features_reference`.

    Returns:
        [B] in the dtype of t.
    """
    wide = compute_dtype(t.dtype)
    half = dim // 2
    freqs = frequencies(dim, max_period, wide, t.device)
    angle = (t.to(wide) * scale)[:, None] * freqs
    dcos, dsin = dfeatures[:, :half], dfeatures[:, half : 2 * half]
    dt = (freqs * scale * (angle.cos() * dsin - angle.sin() * dcos)).sum(-1)
    return dt.to(t.dtype)
