# SPDX-License-Identifier: Apache-2.0
"""Public `timestep_features` and `timestep_features_jvp`: contract, validation, backend."""

import math
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from disca_kernels.backend import Backend, resolve
from disca_kernels.ops.timestep_features import function

_OP = "timestep_features"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def timestep_features(
    t: Tensor,
    dim: int,
    *,
    scale: float = 1000.0,
    max_period: float = 10000.0,
    tangent_width: float | Tensor = 0.0,
    backend: str | Backend = "auto",
) -> Tensor:
    """Compute sinusoidal features of the time, with a tangent that leaves out what is too fast.

    With the frequencies `f_i = max_period ** (-i / (dim // 2))`, i = 0 .. dim // 2 - 1,

        features = [cos(scale * t * f) | sin(scale * t * f)]

    cosines first, as in HunyuanVideo and in the usual diffusion code, whose embedders expect
    `scale = 1000` for times in [0, 1].

    WARNING: forward and reverse mode differ on purpose unless `tangent_width` is 0. Value and
    gradient are exact. The tangent of the sinusoid of angular frequency `w = scale * f` is
    multiplied by `sin(w h) / (w h)` with h the tangent width: it is the exact derivative of the
    features' average over `t - h .. t + h`. Sinusoids that turn many times within h are noise to a
    network that was trained on samples of t, and its du/dt is then mostly noise amplified by their
    frequency; docs/ops/timestep_features.md has the derivation.

    In forward mode (`torch.func.jvp`, `forward_ad.dual_level`) the tangent is detached.

    Args:
        t: [B] times, float32, bfloat16, float16 or float64 (float64 only on eager).
        dim: number of features, at least 2; an odd one ends in a column of 0.
        scale: factor of the time.
        max_period: the frequencies fall geometrically from 1 to just above 1 / max_period.
        tangent_width: h, one number or [B] one per sample, not negative. It has no effect on the
            value or on the gradient, and takes no gradient.
        backend: "auto", "triton" or "eager"; see `disca_kernels.backend`.

    Returns:
        [B, dim] features, float64 for a float64 time, else float32.

    Raises:
        ValueError: wrong rank, device, `dim`, `max_period` or `tangent_width`.
        TypeError: wrong dtype, or not a tensor.
        BackendError: the backend that was asked for cannot run this call.
    """
    if has_torch_function((t, tangent_width)):
        result: Tensor = handle_torch_function(
            timestep_features, (t, tangent_width), t, dim, scale=scale, max_period=max_period,
            tangent_width=tangent_width, backend=backend,
        )  # fmt: skip
        return result
    _check(t, dim, max_period, tangent_width)
    chosen = resolve(_OP, backend, t, *_tensors(tangent_width))
    return function.value(t, dim, tangent_width, float(scale), float(max_period), chosen)


def timestep_features_jvp(
    t: Tensor,
    t_dot: Tensor | None,
    dim: int,
    *,
    scale: float = 1000.0,
    max_period: float = 10000.0,
    tangent_width: float | Tensor = 0.0,
    backend: str | Backend = "auto",
) -> tuple[Tensor, Tensor]:
    """Compute `timestep_features` and its band-limited tangent in one pass.

    With `w = scale * f` and h the tangent width,

        features_dot = t_dot * w * sin(w h) / (w h) * [-sin(w t) | cos(w t)]

    The features are tracked by autograd; the tangent is not, and nothing of it is kept.

    Args:
        t: [B] times as in `timestep_features`.
        t_dot: [B] tangent of the times, of their dtype, or None for zero.
        dim: as in `timestep_features`.
        scale: as in `timestep_features`.
        max_period: as in `timestep_features`.
        tangent_width: as in `timestep_features`.
        backend: as in `timestep_features`.

    Returns:
        `(features, features_dot)`, both [B, dim].

    Raises:
        ValueError: as `timestep_features`, or a tangent of another shape or device.
        TypeError: as `timestep_features`, or a tangent of another dtype.
        BackendError: the backend that was asked for cannot run this call.
        NotImplementedError: an operand of a kernel carries a tangent of forward-mode AD itself.
    """
    relevant: tuple[Any, ...] = (t, t_dot, tangent_width)
    if has_torch_function(relevant):
        pair: tuple[Tensor, Tensor] = handle_torch_function(
            timestep_features_jvp, relevant, t, t_dot, dim, scale=scale, max_period=max_period,
            tangent_width=tangent_width, backend=backend,
        )  # fmt: skip
        return pair
    _check(t, dim, max_period, tangent_width)
    if t_dot is not None:
        _check_tangent(t, t_dot)
    chosen = resolve(_OP, backend, t, t_dot, *_tensors(tangent_width))
    return function.value_and_tangent(
        t, t_dot, dim, tangent_width, float(scale), float(max_period), chosen
    )


def _tensors(*values: float | Tensor) -> tuple[Tensor, ...]:
    return tuple(x for x in values if isinstance(x, Tensor))


def _check(t: Tensor, dim: int, max_period: float, tangent_width: float | Tensor) -> None:
    """Validate what every backend takes for granted."""
    if not isinstance(t, Tensor) or t.dtype not in _DTYPES:
        got = getattr(t, "dtype", type(t).__name__)
        raise TypeError(f"{_OP}: t must be a tensor of one of {_DTYPES}, got {got}")
    if t.ndim != 1:
        raise ValueError(f"{_OP}: t must be [B], got {list(t.shape)}")
    if dim < 2:
        raise ValueError(f"{_OP}: dim must be at least 2, got {dim}")
    if not max_period > 0 or not math.isfinite(max_period):
        raise ValueError(f"{_OP}: max_period must be positive and finite, got {max_period}")
    if not isinstance(tangent_width, Tensor):
        if not tangent_width >= 0 or not math.isfinite(tangent_width):
            raise ValueError(
                f"{_OP}: tangent_width must be finite and not negative, got {tangent_width}"
            )
        return
    if tangent_width.dtype not in _DTYPES:
        raise TypeError(f"{_OP}: tangent_width must be one of {_DTYPES}, got {tangent_width.dtype}")
    if tangent_width.shape != t.shape or tangent_width.device != t.device:
        raise ValueError(
            f"{_OP}: tangent_width must be a number or [B] = {list(t.shape)} on {t.device}, got "
            f"{list(tangent_width.shape)} on {tangent_width.device}"
        )


def _check_tangent(t: Tensor, t_dot: Tensor) -> None:
    """Validate that the tangent matches the time."""
    if not isinstance(t_dot, Tensor) or t_dot.dtype != t.dtype:
        got = getattr(t_dot, "dtype", type(t_dot).__name__)
        raise TypeError(f"{_OP}_jvp: t_dot must have the dtype of t, {t.dtype}, got {got}")
    if t_dot.shape != t.shape or t_dot.device != t.device:
        raise ValueError(
            f"{_OP}_jvp: t_dot must match t {list(t.shape)} on {t.device}, "
            f"got {list(t_dot.shape)} on {t_dot.device}"
        )
