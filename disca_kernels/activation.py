# SPDX-License-Identifier: Apache-2.0
"""Operands of activations, which are alike, x [B, N, M] and a bias [M]: checks, conversion."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["DTYPES", "check_bias", "check_x", "widened"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What x may be; float64 on the eager backend alone."""


def check_x(op: str, x: Any, shape: str) -> None:
    """Check that x has three dimensions, at least one channel and a dtype that activations take.

    Raises:
        TypeError: x is not a tensor, or has another dtype.
        ValueError: x has another rank, or no channel.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: x must be a tensor, got {type(x).__name__}")
    if x.ndim != 3 or x.shape[-1] == 0:
        raise ValueError(f"{op}: x must be {shape} with at least one channel, got {list(x.shape)}")
    if x.dtype not in DTYPES:
        names = ", ".join(map(str, DTYPES))
        raise TypeError(f"{op}: x must be one of {names}, got {x.dtype}")


def check_bias(op: str, bias: Any, x: Tensor, shape: str) -> None:
    """Check that a bias, unless it is None, has one number for each channel of x.

    Raises:
        TypeError: it is not a tensor, or its dtype is neither that of x nor float32.
        ValueError: it has another shape or device.
    """
    if bias is None:
        return
    if not isinstance(bias, Tensor):
        raise TypeError(f"{op}: bias must be a tensor or None, got {type(bias).__name__}")
    if tuple(bias.shape) != (x.shape[-1],):
        raise ValueError(
            f"{op}: bias must be {shape} = [{x.shape[-1]}] for x {list(x.shape)}, "
            f"got {list(bias.shape)}"
        )
    if bias.dtype not in (x.dtype, torch.float32):
        raise TypeError(
            f"{op}: bias must have the dtype of x ({x.dtype}) or torch.float32, got {bias.dtype}"
        )
    if bias.device != x.device:
        raise ValueError(f"{op}: bias is on {bias.device}, x is on {x.device}")


def widened(*biases: Tensor | None) -> tuple[Tensor | None, ...]:
    """Return biases as C++ reads them, contiguous float32; absent ones as they are."""
    return tuple(None if x is None else x.float().contiguous() for x in biases)
