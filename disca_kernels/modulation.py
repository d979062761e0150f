# SPDX-License-Identifier: Apache-2.0
"""Checks of the operands of modulation and of gated residuals, which are alike.

Tokens are [B, N, C]; a modulation (shift, scale, gate) is [B, C], one row per sample, or [B, N, C],
one row per token; an affine vector (weight, bias) is [C].
"""

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "check_affine",
    "check_alike",
    "check_modulation",
    "check_norm",
    "check_tokens",
    "check_update",
    "widen_in_autocast",
    "width_reasons",
]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_WIDTH = 8192
_NORMS = ("layer", "rms")


def widen_in_autocast(tensor: Any, x: Any) -> Any:
    """Widen what autocast left in half precision beside tokens x in float32.

    Under autocast a linear layer makes updates and modulations in half precision, while the
    residual stream stays in float32. What is not a tensor is returned as it is.
    """
    if not (isinstance(tensor, Tensor) and isinstance(x, Tensor)):
        return tensor
    if x.dtype != torch.float32 or tensor.dtype not in (torch.bfloat16, torch.float16):
        return tensor
    device = x.device.type
    in_autocast = device != "meta" and torch.is_autocast_enabled(device)
    return tensor.float() if in_autocast else tensor


def check_tokens(op: str, x: Any) -> None:
    """Check that x is [B, N, C] in a dtype that the operations on tokens take.

    Raises:
        TypeError: x is not a tensor, or has another dtype.
        ValueError: x has another rank, or no channel.
    """
    _check_tensor(op, "x", x)
    if x.ndim != 3:
        raise ValueError(f"{op}: x must be [B, N, C], got {list(x.shape)}")
    if x.shape[-1] == 0:
        raise ValueError(f"{op}: x must have at least one channel, got {list(x.shape)}")
    if x.dtype not in _DTYPES:
        names = ", ".join(map(str, _DTYPES))
        raise TypeError(f"{op}: x must be one of {names}, got {x.dtype}")


def check_update(op: str, x: Tensor, y: Any) -> None:
    """Check that an update y has the shape, the dtype and the device of the tokens x.

    Raises:
        TypeError: y is not a tensor, or has another dtype.
        ValueError: y has another shape or device.
    """
    _check_tensor(op, "y", y)
    if y.shape != x.shape or y.device != x.device:
        raise ValueError(
            f"{op}: y must match x, got x {_describe(x)} and y {_describe(y)}; nothing is broadcast"
        )
    if y.dtype != x.dtype:
        raise TypeError(f"{op}: y must have the dtype of x ({x.dtype}), got {y.dtype}")


def check_modulation(op: str, name: str, modulation: Any, x: Tensor) -> None:
    """Check that a modulation has a row for each sample or for each token of x.

    Raises:
        TypeError: it is not a tensor, or its dtype is neither that of x nor float32.
        ValueError: it has another shape or device.
    """
    _check_tensor(op, name, modulation)
    n_batch, n_tokens, n_channels = x.shape
    if tuple(modulation.shape) not in ((n_batch, n_channels), (n_batch, n_tokens, n_channels)):
        raise ValueError(
            f"{op}: {name} must be [B, C] = [{n_batch}, {n_channels}] (one row per sample) or "
            f"[B, N, C] = [{n_batch}, {n_tokens}, {n_channels}] (one row per token) for x "
            f"{list(x.shape)}, got {list(modulation.shape)}; nothing is broadcast"
        )
    _check_companion(op, name, modulation, x)


def check_alike(op: str, shift: Tensor, scale: Tensor) -> None:
    """Check that shift and scale have one shape and one dtype.

    Raises:
        ValueError: they differ.
    """
    if shift.shape != scale.shape or shift.dtype != scale.dtype:
        raise ValueError(
            f"{op}: shift and scale must be alike, got shift {_describe(shift)} "
            f"and scale {_describe(scale)}"
        )


def check_norm(op: str, norm: Any) -> None:
    """Check the name of a normalisation.

    Raises:
        ValueError: it is neither "layer" nor "rms".
    """
    if norm not in _NORMS:
        raise ValueError(f"{op}: norm must be 'layer' or 'rms', got {norm!r}")


def check_affine(op: str, weight: Any, bias: Any, x: Tensor, norm: str) -> None:
    """Check the affine part of a normalisation of x.

    Raises:
        TypeError: weight or bias is not a tensor, or its dtype is neither that of x nor float32.
        ValueError: another shape or device, a bias without weight or beside an RMS norm.
    """
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is None:
            continue
        _check_tensor(op, name, vector)
        if tuple(vector.shape) != (x.shape[-1],):
            raise ValueError(
                f"{op}: {name} must be [C] = [{x.shape[-1]}] for x {list(x.shape)}, "
                f"got {list(vector.shape)}"
            )
        _check_companion(op, name, vector, x)
    if bias is None:
        return
    if weight is None:
        raise ValueError(f"{op}: bias was given without weight; pass a weight of ones")
    if norm == "rms":
        raise ValueError(f"{op}: an RMS norm has no bias; pass bias=None, or norm='layer'")
    if weight.dtype != bias.dtype:
        raise TypeError(
            f"{op}: weight and bias must have one dtype, got {weight.dtype} and {bias.dtype}"
        )


def width_reasons(x: Tensor, *_: Tensor | None) -> list[str]:
    """Say how wide a row the GPU kernels can keep in registers, if x is wider."""
    width = x.shape[-1]
    if width <= _MAX_WIDTH:
        return []
    return [f"at most {_MAX_WIDTH} channels fit the registers that share a row, got {width}"]


def _check_tensor(op: str, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {type(value).__name__}")


def _check_companion(op: str, name: str, tensor: Tensor, x: Tensor) -> None:
    """Check dtype and device of what belongs to the tokens x."""
    if tensor.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"{op}: {name} must have the dtype of x ({x.dtype}) or torch.float32, "
            f"got {tensor.dtype}"
        )
    if tensor.device != x.device:
        raise ValueError(f"{op}: {name} is on {tensor.device}, x is on {x.device}")


def _describe(tensor: Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
