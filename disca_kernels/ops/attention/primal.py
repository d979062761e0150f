# SPDX-License-Identifier: Apache-2.0
"""Other libraries' attention as the value beneath the tangent-only pass.

The tangent needs of the forward pass its output and the log-sum-exp, which every fast attention
computes. So the value may come from PyTorch's or from flash-attn, at their speed.
"""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from disca_kernels.ops.attention.reference import repeat_heads

OWN = "own"
"""The kernel of the backend itself."""

_HALF = (torch.float16, torch.bfloat16)


class _Primal(NamedTuple):
    """An attention that returns its log-sum-exp.

    Attributes:
        module: what must be importable, or None.
        why_not: returns what keeps it from these operands.
        run: takes (q, k, v, causal, scale) and returns (o, lse).
    """

    module: str | None
    why_not: Callable[[Tensor, Tensor], list[str]]
    run: Callable[[Tensor, Tensor, Tensor, bool, float], tuple[Tensor, Tensor]]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """PyTorch's fused attention: flash in half precision, memory-efficient in float32."""
    k, v = repeat_heads(q.shape[1], k, v)
    aten: Any = torch.ops.aten
    if q.device.type == "cpu":
        attend = aten._scaled_dot_product_flash_attention_for_cpu
        o, lse = attend(q, k, v, 0.0, causal, scale=scale)
    elif q.dtype in _HALF and q.shape[-1] % 8 == 0:
        attend = aten._scaled_dot_product_flash_attention
        o, lse = attend(q, k, v, 0.0, causal, scale=scale)[:2]
    else:
        attend = aten._scaled_dot_product_efficient_attention
        o, lse = attend(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
    # The memory-efficient kernel pads the rows of lse to a multiple of 32.
    return o, lse[..., : q.shape[2]].float()


def _sdpa_why_not(q: Tensor, k: Tensor) -> list[str]:
    return [] if q.device.type in ("cpu", "cuda") else [f"it has no kernel for {q.device.type}"]


def _flash_attn(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """flash-attn 2, which takes [B, N, H, D]."""
    attend = import_module("flash_attn").flash_attn_func
    rows = (x.transpose(1, 2) for x in (q, k, v))
    o, lse, _ = attend(*rows, softmax_scale=scale, causal=causal, return_attn_probs=True)
    return o.transpose(1, 2), lse


def _flash_attn_3(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """flash-attn 3, whose versions return (o, lse) by themselves or when asked."""
    attend = import_module("flash_attn_interface").flash_attn_func
    rows = [x.transpose(1, 2) for x in (q, k, v)]
    try:
        result = attend(*rows, softmax_scale=scale, causal=causal, return_attn_probs=True)
    except TypeError:
        result = attend(*rows, softmax_scale=scale, causal=causal)
    return result[0].transpose(1, 2), result[1]


def _flash_why_not(q: Tensor, k: Tensor) -> list[str]:
    reasons = []
    if q.device.type != "cuda":
        reasons.append(f"it needs CUDA tensors, got {q.device.type}")
    if q.dtype not in _HALF:
        reasons.append(f"it needs float16 or bfloat16, got {q.dtype}")
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        reasons.append(f"it needs D a multiple of 8 up to 256, got {q.shape[-1]}")
    return reasons


_PRIMALS = {
    "sdpa": _Primal(None, _sdpa_why_not, _sdpa),
    "flash_attn": _Primal("flash_attn", _flash_why_not, _flash_attn),
    "flash_attn_3": _Primal("flash_attn_interface", _flash_why_not, _flash_attn_3),
}

NAMES = (OWN, *_PRIMALS)


def why_not(name: str, q: Tensor, k: Tensor, kv_lengths: Tensor | None, block: int) -> list[str]:
    """Return every reason why a primal cannot compute this value; none for OWN.

    Raises:
        ValueError: no such primal.
    """
    if name == OWN:
        return []
    if not isinstance(name, str) or name not in _PRIMALS:
        raise ValueError(f"attention: primal must be one of {', '.join(NAMES)}, got {name!r}")
    primal = _PRIMALS[name]
    reasons = primal.why_not(q, k)
    if primal.module is not None and find_spec(primal.module) is None:
        reasons.append(f"the package {primal.module} is not installed")
    if kv_lengths is not None:
        reasons.append("it is not given key lengths here")
    if block > 1:
        reasons.append("it has no block-causal mask")
    if block == 1 and q.shape[2] != k.shape[2]:
        reasons.append("its causal mask may be aligned otherwise when Nq != Nk")
    if 0 in q.shape or 0 in k.shape:
        reasons.append("it may not take empty operands")
    return reasons


def run(
    name: str, q: Tensor, k: Tensor, v: Tensor, block: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Compute o [B, H, Nq, D] and lse [B, H, Nq] with a primal other than OWN."""
    o, lse = _PRIMALS[name].run(q, k, v, block == 1, scale)
    return o.contiguous(), lse.contiguous()
