# SPDX-License-Identifier: Apache-2.0
"""What every backend of attention takes for granted about a call."""

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor

from disca_kernels.backend import Backend, BackendError
from disca_kernels.ops.attention import primal as primal_attention
from disca_kernels.ops.attention.eager import Options
from disca_kernels.ops.attention.reference import resolve_block, resolve_scale

OP = "attention"
_NAMES = ("q", "k", "v")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_MAX_SCALE = torch.finfo(torch.float32).max
_MAX_BLOCK = 2**31 - 1
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


def check_call(
    primals: tuple[Any, ...],
    kv_lengths: Tensor | None,
    causal: Any,
    block_causal: Any,
    scale: Any,
    return_lse: Any = False,
) -> Options:
    """Validate what the calls have in common and return the options as the kernels take them.

    Raises:
        ValueError: wrong rank, shape, device, block or scale, or a length outside 0 .. Nk.
        TypeError: wrong or mixed types or dtypes.
    """
    _check_primals(primals)
    q, k, _ = primals
    if kv_lengths is not None:
        _check_lengths(kv_lengths, q, k.shape[2])
    for name, flag in (("causal", causal), ("return_lse", return_lse)):
        if not isinstance(flag, bool):
            raise TypeError(f"{OP}: {name} must be True or False, got {flag!r}")
    if block_causal is not None:
        _check_block(causal, block_causal)
    _check_scale(scale)
    return Options(
        kv_lengths, resolve_block(causal, block_causal), resolve_scale(scale, q.shape[-1])
    )


def check_value(q: Tensor, o: Any, lse: Any) -> None:
    """Validate the output and the log-sum-exp that a tangent is asked for.

    Raises:
        ValueError: another shape or device than q calls for.
        TypeError: not tensors, or other dtypes.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    for name, tensor, shape, dtype in (("o", o, q.shape, q.dtype), ("lse", lse, q.shape[:3], wide)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{OP}_tangent: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.shape != shape or tensor.device != q.device:
            raise ValueError(
                f"{OP}_tangent: {name} must be {list(shape)} on {q.device} for q {list(q.shape)}, "
                f"got {list(tensor.shape)} on {tensor.device}"
            )
        if tensor.dtype != dtype:
            raise TypeError(
                f"{OP}_tangent: {name} must be {dtype} for q of {q.dtype}, got {tensor.dtype}"
            )


def check_primal(name: str, primals: tuple[Any, ...], options: Options, backend: Backend) -> None:
    """Validate the choice of what computes the value.

    Raises:
        ValueError: no such primal.
        BackendError: it cannot compute this value.
    """
    q, k, _ = primals
    reasons = primal_attention.why_not(name, q, k, options.kv_lengths, options.block)
    if name != primal_attention.OWN and backend is Backend.EAGER:
        reasons.append("backend='eager' computes value and tangent itself")
    if reasons:
        raise BackendError(
            f"{OP}: primal={name!r} was requested and cannot run: {'; '.join(reasons)}. "
            f"Would work: primal={primal_attention.OWN!r}."
        )


def _check_primals(primals: tuple[Any, ...]) -> None:
    for name, tensor in zip(_NAMES, primals, strict=True):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{OP}: {name} must be a tensor, got {type(tensor).__name__}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{OP}: {name} must be a dense tensor, got layout {tensor.layout}")
    q, k, v = primals
    shapes = f"q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(f"{OP}: q, k and v must be [B, H, N, D], got {shapes}")
    if q.dtype not in _DTYPES:
        raise TypeError(f"{OP}: q must be one of {_DTYPES}, got {q.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"{OP}: one dtype is needed, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"{OP}: one device is needed, got {q.device}, {k.device}, {v.device}")
    if k.shape != v.shape or q.shape[3] != k.shape[3] or q.shape[3] == 0:
        raise ValueError(
            f"{OP}: q must be [B, H, Nq, D], k and v both [B, Hk, Nk, D] with the same D > 0, "
            f"got {shapes}"
        )
    heads, key_heads = q.shape[1], k.shape[1]
    if q.shape[0] != k.shape[0]:
        raise ValueError(f"{OP}: q, k and v need the same batch, got {shapes}")
    if heads % key_heads if key_heads else heads:
        raise ValueError(
            f"{OP}: the heads of q must be a multiple of those of k and v (grouped heads), got "
            f"{shapes}"
        )


def _check_lengths(kv_lengths: Any, q: Tensor, n_keys: int) -> None:
    """Validate the key lengths, their values only where looking at them is cheap."""
    if not isinstance(kv_lengths, Tensor) or kv_lengths.dtype not in _INTEGERS:
        got = getattr(kv_lengths, "dtype", type(kv_lengths).__name__)
        raise TypeError(f"{OP}: kv_lengths must be a tensor of integers, got {got}")
    if kv_lengths.shape != q.shape[:1]:
        raise ValueError(
            f"{OP}: kv_lengths must be [B] = [{q.shape[0]}], got {list(kv_lengths.shape)}"
        )
    if kv_lengths.device != q.device:
        raise ValueError(f"{OP}: kv_lengths is on {kv_lengths.device}, q is on {q.device}")
    opaque = torch.compiler.is_compiling() or is_functorch_wrapped_tensor(kv_lengths)
    if opaque or q.device.type != "cpu" or kv_lengths.numel() == 0:
        return
    low, high = (int(x) for x in kv_lengths.aminmax())
    if low < 0 or high > n_keys:
        raise ValueError(f"{OP}: kv_lengths must be in 0 .. {n_keys}, got {low} .. {high}")


def _check_block(causal: bool, block_causal: Any) -> None:
    if isinstance(block_causal, bool) or not isinstance(block_causal, int):
        raise TypeError(
            f"{OP}: block_causal must be a whole number of tokens or None, got {block_causal!r}"
        )
    if block_causal < 1:
        raise ValueError(
            f"{OP}: block_causal must be at least 1 token (None: no mask), got {block_causal}"
        )
    if block_causal > _MAX_BLOCK:
        raise ValueError(f"{OP}: block_causal must be at most {_MAX_BLOCK}, got {block_causal}")
    if causal:
        raise ValueError(
            f"{OP}: causal=True and block_causal={block_causal} exclude each other; causal is "
            "block_causal=1"
        )


def _check_scale(scale: Any) -> None:
    if scale is None:
        return
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(
            f"{OP}: scale must be a number or None (1 / sqrt(D)), got {type(scale).__name__}"
        )
    if not abs(scale) <= _MAX_SCALE:
        raise ValueError(
            f"{OP}: scale must be finite and at most {_MAX_SCALE:g} in float32, got {scale}"
        )
