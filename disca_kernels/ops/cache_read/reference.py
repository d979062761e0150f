# SPDX-License-Identifier: Apache-2.0
"""Eager specification of cache_read: value and tangent."""

import contextlib

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

Primals = tuple[Tensor, Tensor, Tensor, Tensor | None]
Tangents = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype used inside for tensors of `dtype`: float64 stays, all else is float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[None]:
    """Return a context in which matrix products keep the dtype of their operands."""
    if device.type == "meta":
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _widened(operands: tuple[Tensor | None, ...], dtype: torch.dtype) -> list[Tensor | None]:
    """Return operands in the dtype that is computed in."""
    wide = compute_dtype(dtype)
    return [None if x is None else x.to(wide) for x in operands]


def _pre_activation(
    current: Tensor | None, cache: Tensor | None, weight: Tensor, bias: Tensor | None
) -> Tensor | None:
    """Return `[current, cache] weight^T + bias` without the term of an absent operand."""
    halves = weight.chunk(2, dim=1)
    z = None
    for x, half in zip((current, cache), halves, strict=True):
        if x is not None:
            z = linear(x, half, bias) if z is None else z + linear(x, half)
    return z


def cache_read_reference(
    current: Tensor, cache: Tensor, weight: Tensor, bias: Tensor | None = None
) -> Tensor:
    """Compute `SiLU([current, cache] weight^T + bias)` in plain PyTorch.

    Differentiable any number of times, in both modes. It computes in float32 (float64 inputs: in
    float64) and casts once, at the end.

    Args:
        current: [B, N, C] tokens.
        cache: [B, N, C] tokens.
        weight: [O, 2C]; its first C columns meet `current`.
        bias: [O], or None.

    Returns:
        [B, N, O] in the dtype of `current`.
    """
    with without_autocast(current.device):
        wide = _widened((current, cache, weight, bias), current.dtype)
        return silu(_pre_activation(*wide)).to(current.dtype)  # type: ignore[arg-type]


def cache_read_jvp_reference(primals: Primals, tangents: Tangents) -> tuple[Tensor, Tensor]:
    """Compute the value and, by the closed formula, its directional derivative.

    With `z` the argument of SiLU and `s` its logistic function,

        z_dot = [current_dot, cache_dot] weight^T + [current, cache] weight_dot^T + bias_dot
        y_dot = s * (1 + z * (1 - s)) * z_dot

    Args:
        primals: `(current, cache, weight, bias)` as in `cache_read_reference`.
        tangents: a tensor of its primal's shape for each of them, or None for zero.

    Returns:
        `(y, y_dot)`, both [B, N, O] in the dtype of `current`.
    """
    dtype = primals[0].dtype
    with without_autocast(primals[0].device):
        current, cache, weight, bias = _widened(primals, dtype)
        current_dot, cache_dot, weight_dot, bias_dot = _widened(tangents, dtype)
        assert weight is not None
        z = _pre_activation(current, cache, weight, bias)
        assert z is not None
        terms = [_pre_activation(current_dot, cache_dot, weight, bias_dot)]
        if weight_dot is not None:
            terms.append(_pre_activation(current, cache, weight_dot, None))
        if terms[0] is None and bias_dot is not None:
            terms[0] = bias_dot.expand_as(z)
        z_dot = sum((x for x in terms if x is not None), torch.zeros((), dtype=z.dtype))
        logistic = torch.sigmoid(z)
        y_dot = logistic * (1 + z * (1 - logistic)) * z_dot
        return (z * logistic).to(dtype), y_dot.to(dtype)
